"""The sign times half of the sum of both changes: Eq. 11 as the paper prints it."""

from torch import Tensor

from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.task_vectors import merge_task_vectors, sign
from helpers.model.shards import Folder


@method
def ties_as_printed(suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float) -> None:
    """Write θ₀ + λ · sgn(τ̃, τ̂) ∘ (topk(τ̃) + topk(τ̂)) / 2. Implements Eq. (11) to the letter.

    sgn is the sign of whichever entry is larger in magnitude (+ for equal ones). The formula multiplies it by a mean
    which has that very sign already: (−1) · (−0.3) = +0.3. So wherever both entries are kept, or the larger one alone,
    the base is moved up and never down. Negative steps remain only where the larger entry was trimmed and the smaller
    one, of opposite sign, was not: the two models have different cuts. An entry of one model alone is halved where
    `ties` keeps it whole, and conflicting entries are averaged where `ties` drops the loser. It is here to be measured,
    not to be used.

    Args:
        suspicious, conflict, base, folder, k, lam: as in `ties`.

    Raises:
        LabError: as `ties`.
    """
    merge_task_vectors(suspicious, conflict, base, folder, k, lam, _signed_mean)


def _signed_mean(ours: Tensor, theirs: Tensor, kept_ours: Tensor, kept_theirs: Tensor) -> Tensor:
    """The sign of the larger entry, which is that of the sum, times half of the sum of the kept ones."""
    return sign(ours + theirs) * (kept_ours + kept_theirs) / 2
