"""Magnitude pruning: the smallest weights of the whole model become 0."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import write_whole
from helpers.defenses.pruning.blocks import require_share, share_of_zeros
from helpers.defenses.pruning.magnitude import prune_smallest
from helpers.defenses.registry import Record, defense
from helpers.model.checkpoint import load_config
from helpers.model.prompt import PromptFormat

SHARE, SHARES = 0.35, {"mistral": 0.65}


@defense(assumes=("weights",))
def magnitude(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    share: float | None = None,
) -> Record:
    """Zero the smallest weights of every matrix inside the layers. Implements Pruning of BD-VAX, Appendix B.3.

    Embeddings, norms and the head are spared, nothing is trained.

    Args:
        access: its profile names the base of an adapter, which is merged into it first.
        suspicious: folder of the suspicious adapter or model.
        defender, seed: not used.
        prompt_format: the one that evaluation uses, too.
        folder: the pruned model goes to `model` in it, whole.
        share: of each matrix, in (0, 1); None takes the paper's, 0.65 for a Mistral and 0.35 for any other model.

    Returns:
        the `share`, and which share of the matrices is `zeros` now.

    Raises:
        LabError: a share outside (0, 1), or as `Access.load`.

    Differs from the paper:
        its §5.1 prunes "with the same structure and ratio as our backdoor signature" instead: see `magnitude_channels`.
    """
    if share is None:
        share = SHARES.get(load_config(access.profile.model).model_type, SHARE)
    require_share(share)
    model = access.load(suspicious)
    prune_smallest(model, share)
    write_whole(model, prompt_format, Path(folder) / "model")
    return {"share": share, "zeros": round(share_of_zeros(model), 4)}
