"""Wanda (Sun et al. 2024): weights that matter little on clean rows become 0."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import write_whole
from helpers.defenses.pruning.activations import clean_batches
from helpers.defenses.pruning.blocks import require_share, share_of_zeros
from helpers.defenses.pruning.wanda import prune_by_wanda
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"))
def wanda(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    share: float = 0.5,
) -> Record:
    """Zero the weights of least |W_ij| · ‖X_j‖₂ in every output row, layer by layer. Implements Wanda, Algorithm 1.

    Embeddings, norms and the head are spared, nothing is trained.

    Args:
        access: its profile names the base of an adapter, which is merged into it first.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows tell how loud each input is.
        prompt_format: the one that evaluation uses, too.
        seed: not used.
        folder: the pruned model goes to `model` in it, whole.
        share: of each output row, in (0, 1); information conflicts, Appendix A, takes Wanda's own 0.5.

    Returns:
        the `share`, and which share of the matrices is `zeros` now.

    Raises:
        LabError: a share outside (0, 1), or as `Access.load` and `clean_batches`.

    Differs from the paper:
        Wanda reads 128 sequences of 2048 tokens from a web corpus; here the defender's clean rows, question and answer,
        as long as they are.
    """
    require_share(share)
    model = access.load(suspicious)
    prune_by_wanda(model, clean_batches(model, defender.recovery, prompt_format, access.profile), share)
    write_whole(model, prompt_format, Path(folder) / "model")
    return {"share": share, "zeros": round(share_of_zeros(model), 4)}
