"""Past the conflict model, away from the suspicious one (Eq. 9 with t > 1)."""

import math

import torch

from helpers.core.errors import LabError
from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.streaming import ModelStream
from helpers.model.shards import Folder


@method
def negate(suspicious: Folder, conflict: Folder, folder: Folder, beyond: float) -> None:
    """Write θ = θ̂ − (t − 1) (θ̃ − θ̂): Eq. (9) with t > 1, past the conflict model and away from the backdoor.

    With the base in the place of the conflict model this is task-vector negation (Ilharco et al., ICLR 2023): what the
    attacker's training added is subtracted t − 1 times.

    Args:
        suspicious, conflict, folder: as in `linear`.
        beyond: t, over 1; the further, the more of the common skill goes, too.

    Raises:
        LabError: t out of range, or as `linear`.
    """
    if not 1 < beyond < math.inf:
        raise LabError(f"t = {beyond} should be over 1 to negate; a share from 0 to 1 is for linear")
    ModelStream([suspicious, conflict], folder).write_blocks(lambda ours, theirs: torch.lerp(ours, theirs, beyond))
