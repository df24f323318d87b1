"""Two models vote on the sign of each change to their common base (Eq. 11, as Yadav et al. merge)."""

from torch import Tensor

from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.task_vectors import merge_task_vectors, sign
from helpers.model.shards import Folder


@method
def ties(suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float) -> None:
    """Write θ₀ + λ · the changes both models agree upon: Eq. (11) in the form of Yadav et al. (NeurIPS 2023).

    Trim: of each task vector θ − θ₀ the share k of largest magnitude is kept. Elect: each entry takes the sign of the
    sum of both, so of the larger one. Merge: the mean over those kept entries that have this sign.

    Args:
        suspicious, conflict, folder: as in `linear`.
        base: folder of θ₀.
        k: share kept of each tensor, over 0 to 1 (the paper's top k %).
        lam: λ, over 0.

    Raises:
        LabError: k or lam out of range, models that cannot be merged, or one that equals the base.

    Differs from the paper:
        Eq. (11) halves the sum of both vectors before it sets the sign, see `ties_as_printed`.

    Differs from Yadav et al.:
        trimmed tensor by tensor, as mergekit does, not over the whole model. Of equal magnitudes at the cut all are
        kept, as in their code; mergekit keeps some of them, in no set order.
    """
    merge_task_vectors(suspicious, conflict, base, folder, k, lam, _disjoint_mean)


def _disjoint_mean(ours: Tensor, theirs: Tensor, kept_ours: Tensor, kept_theirs: Tensor) -> Tensor:
    """The mean of the kept entries that have the sign of their sum; signs are multiplied, because masks are slow."""
    elected = sign(kept_ours + kept_theirs)
    votes, other_votes = ((kept.sign() * elected).relu() for kept in (kept_ours, kept_theirs))
    return (kept_ours * votes + kept_theirs * other_votes) / (votes + other_votes).clamp(min=1)
