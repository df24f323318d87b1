"""The straight line between two models (Eq. 9)."""

import torch

from helpers.defenses.conflict.merge.checks import check_share
from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.streaming import ModelStream
from helpers.model.shards import Folder


@method
def linear(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write θ = t θ̂ + (1 − t) θ̃. Implements Eq. (9), information conflicts §3.3; the paper's default.

    Args:
        suspicious, conflict: folders of whole models, θ̃ and θ̂.
        folder: the one to write to.
        t: the conflict model's share, 0 (nothing changes) to 1 (the conflict model).

    Raises:
        LabError: t out of range, or models that cannot be merged; nothing is left on the disk then.

    Differs from the paper:
        Eq. (9) prints θ̂ in both terms, a slip: the text combines the weights of two models.
    """
    check_share(t)
    ModelStream([suspicious, conflict], folder).write_blocks(lambda ours, theirs: torch.lerp(ours, theirs, t))
