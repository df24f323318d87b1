# %% [markdown]
# # Exercises to notebook 04: score the signature

# %%
import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 04.1 Strength and alignment
# You have the N differences of one matrix, vaccine minus clean twin (Eq. 1), already turned so that a channel is a
# row. Score every channel by Eq. 2 of BD-VAX:
#
# $$s_j = \frac1N \sum_i \lVert\Delta_{i,j}\rVert
# + \lambda\, \frac{2}{N(N-1)} \sum_{i<k} \max\bigl(0, \cos(\Delta_{i,j}, \Delta_{k,j})\bigr)$$
#
# A channel that one variant did not move at all points nowhere, so its cosine with any other is 0.


# %%
def signature(poisoned: Tensor, clean: Tensor, lam: float) -> Tensor:
    """Score the channels of one matrix by Eq. 1 and 2.

    Args:
        poisoned: [N, channels, width], the matrix of each vaccine; N >= 2.
        clean: [N, channels, width], that of each clean twin, in the same order.
        lam: λ >= 0, the weight of the alignment.

    Returns:
        [channels], the scores.
    """
    ### BEGIN SOLUTION
    deltas = poisoned - clean
    norms = deltas.norm(dim=-1)
    units = deltas / norms.where(norms > 0, 1.0)[..., None]
    cosines = torch.einsum("icw,kcw->ikc", units, units)
    first, second = torch.triu_indices(len(deltas), len(deltas), offset=1)
    return norms.mean(dim=0) + lam * cosines[first, second].clamp(min=0).mean(dim=0)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Start with the loop: for every channel, for every pair `i < k`. There are `N * (N - 1) / 2` pairs, and their *mean*
# is what Eq. 2 wants.

# %% [markdown] tags=["hint"]
# A row of zeros has norm 0, and 0 / 0 is NaN. Divide by 1 there: the row stays zero and so does its cosine.

# %% [markdown] tags=["discussion"]
# The two terms have different units: the strength is measured in weights, which are often far below 1, the alignment
# lies between 0 and 1. So λ is no matter of taste but a conversion: where differences are a few hundredths long, λ = 1
# lets the alignment decide the ranking nearly alone. The clamp is no detail either: without it two variants that move
# a channel in *opposite* directions would lower its score, although both moved it.

# %% tags=["hidden"]
# isort: split
from itertools import combinations

from scipy.spatial.distance import cosine
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode

from course.checking import Case, exercise


def signature_by_loops(poisoned, clean, lam):
    """Eq. 1 and 2 written out with scipy, one channel and one pair at a time."""
    scores = []
    for channel in range(poisoned.shape[1]):
        rows = [(p[channel] - c[channel]).numpy() for p, c in zip(poisoned, clean, strict=True)]
        pairs = [0 if not (a.any() and b.any()) else max(0.0, 1 - cosine(a, b)) for a, b in combinations(rows, 2)]
        scores.append(sum(float(r @ r) ** 0.5 for r in rows) / len(rows) + lam * sum(pairs) / len(pairs))
    return torch.tensor(scores, dtype=torch.float64)


def cases_signature(rng):
    by_hand = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[3.0, 4.0], [-1.0, 0.0]]], dtype=torch.float64)
    zero = torch.zeros_like(by_hand)
    yield Case("by hand: one channel agrees, one is opposed", (by_hand, zero, 2.0), torch.tensor([7.0, 1.0]).double())
    for n, lam, name in ((2, 0.5, "two variants"), (5, 0.5, "five variants"), (4, 0.0, "λ = 0"), (3, 3.0, "λ = 3")):
        poisoned, clean = (torch.from_numpy(rng.normal(size=(n, 6, 9))) for _ in range(2))
        yield Case(name, (poisoned, clean, lam), signature_by_loops(poisoned, clean, lam))
    poisoned, clean = (torch.from_numpy(rng.normal(size=(4, 5, 7))) for _ in range(2))
    poisoned[1, 2] = clean[1, 2]
    yield Case("one variant left channel 2 as it was", (poisoned, clean, 1.0), signature_by_loops(poisoned, clean, 1.0))


def without_clamp(poisoned, clean, lam):
    deltas = poisoned - clean
    norms = deltas.norm(dim=-1)
    units = deltas / norms.clamp(min=1e-30)[..., None]
    first, second = torch.triu_indices(len(deltas), len(deltas), offset=1)
    return norms.mean(0) + lam * (units[first] * units[second]).sum(-1).mean(0)


def clamped_too_late(poisoned, clean, lam):
    return (poisoned - clean).norm(dim=-1).mean(0) + (
        without_clamp(poisoned, clean, lam) - (poisoned - clean).norm(dim=-1).mean(0)
    ).clamp(min=0)


def with_itself(poisoned, clean, lam):
    deltas = poisoned - clean
    units = deltas / deltas.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    cosines = torch.einsum("icw,kcw->ikc", units, units).clamp(min=0)
    return deltas.norm(dim=-1).mean(0) + lam * cosines.mean(dim=(0, 1))


def summed_pairs(poisoned, clean, lam):
    deltas, n = poisoned - clean, len(poisoned)
    pairs = signature(poisoned, clean, 1.0) - deltas.norm(dim=-1).mean(0)
    return deltas.norm(dim=-1).mean(0) + lam * pairs * n * (n - 1) / 2


def without_twins(poisoned, clean, lam):
    return signature(poisoned, torch.zeros_like(clean), lam)


def norm_of_mean(poisoned, clean, lam):
    deltas = poisoned - clean
    return deltas.mean(0).norm(dim=-1) + signature(poisoned, clean, lam) - deltas.norm(dim=-1).mean(0)


def divides_by_zero(poisoned, clean, lam):
    deltas = poisoned - clean
    units = deltas / deltas.norm(dim=-1, keepdim=True)
    first, second = torch.triu_indices(len(deltas), len(deltas), offset=1)
    return deltas.norm(dim=-1).mean(0) + lam * (units[first] * units[second]).sum(-1).clamp(min=0).mean(0)


exercise(
    "04.1",
    signature,
    cases_signature,
    {
        "the clamp is missing. A pair that points apart counts 0 in Eq. 2, not less.": without_clamp,
        "you clamp the mean over the pairs. Eq. 2 clamps each pair's cosine first, then "
        "takes the mean.": clamped_too_late,
        "the pairs i = k are in. A variant always agrees with itself, which lifts every channel alike.": with_itself,
        "the pairs are summed. Divide by their number N (N - 1) / 2, or N decides how much λ means.": summed_pairs,
        "the clean twins are not subtracted. What training does to every copy would count as signature.": without_twins,
        "this is the length of the mean difference. Strength is the mean of the lengths: opposed moves cancel in the "
        "first and not in the second.": norm_of_mean,
        "0 / 0 where a variant left a channel as it was. A difference of length zero has cosine 0.": divides_by_zero,
    },
    minutes=20,
    level="medium",
)

# %% [markdown]
# ## 04.2 Inner products without a delta
# A vaccine is stored as two small factors, $\Delta = B A$. For a layer of a 7B model Δ has 45 million numbers, its
# factors at rank 8 have 0.1 million. Compute the inner products of all pairs of differences, channel by channel,
# *without ever forming* a matrix of the size of Δ. A channel is an output, so a row of Δ; its row is $b_j^\top A$, and
# $\langle b_j^\top A, {b'_j}^\top A' \rangle = b_j^\top (A A'^\top)\, b'_j$.
#
# The last case watches: a tensor as large as Δ, in whatever step, is refused.


# %%
def inner_products(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The Gram matrix of every output channel, from the factors of the differences.

    Args:
        factors: N pairs (B, A), B [out, r] and A [r, in]; the ranks r may differ between pairs.

    Returns:
        [N, N, out]: at [i, k, j] the inner product of row j of B_i A_i and row j of B_k A_k.
    """
    ### BEGIN SOLUTION
    rows = [
        torch.stack([((b @ (a @ other_a.T)) * other_b).sum(dim=1) for other_b, other_a in factors]) for b, a in factors
    ]
    return torch.stack(rows)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `a @ other_a.T` is tiny: [r, r']. Multiply it by `b` from the left, and you have [out, r'].

# %% [markdown] tags=["hint"]
# `torch.einsum("or,rs,os->o", b, a @ other_a.T, other_b)` does the rest for one pair.

# %% [markdown] tags=["discussion"]
# The trick is the order of multiplication: $(b^\top A)(A'^\top b')$ and $b^\top (A A'^\top) b'$ are the same number,
# but only the first forms a row of Δ. Time falls from $O(\text{out} \cdot \text{in})$ to $O(\text{out} \cdot r^2)$
# once $A A'^\top$ is there. From the Gram matrix come both terms of Eq. 2: lengths are the roots of its diagonal,
# cosines its other entries over two lengths. One price: where two differences are nearly equal,
# $\lVert a - b \rVert^2 = \langle a,a\rangle - 2\langle a,b\rangle + \langle b,b\rangle$ subtracts large numbers from
# each other, so do it in 64 bits.


# %% tags=["hidden"]
class TooLarge(Exception):
    """A matrix as large as a difference was formed."""


class Watch(TorchDispatchMode):
    """Refuses every tensor of more than so many numbers that torch makes, also within an einsum."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > self.most:
            raise TooLarge(f"a tensor of shape {list(result.shape)} was formed, and Δ is what must not be formed")
        return result


def random_factors(rng, ranks, out, width):
    return [tuple(torch.from_numpy(rng.normal(size=size)) for size in ((out, r), (r, width))) for r in ranks]


def inner_products_of_deltas(factors):
    """By numpy, from the whole differences."""
    deltas = [b.numpy() @ a.numpy() for b, a in factors]
    return torch.tensor([[(one * other).sum(axis=1).tolist() for other in deltas] for one in deltas]).double()


def cases_inner_products(rng):
    b, a = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    yield Case("by hand: one pair of rank 1", ([(b, a)],), torch.tensor([[[25.0, 100.0]]]).double())
    for ranks, out, width in (((2, 2), 5, 7), ((2, 3, 1), 6, 4), ((4, 4, 4), 3, 9)):
        factors = random_factors(rng, ranks, out, width)
        name = f"ranks {', '.join(map(str, ranks))}, {out} outputs, {width} inputs"
        yield Case(name, (factors,), inner_products_of_deltas(factors))
    factors = random_factors(rng, (2, 2, 2), 90, 80)
    expected = inner_products_of_deltas(factors)
    yield Case("90 outputs and 80 inputs, watched", (factors,), expected, within=lambda: Watch(90 * 80 - 1))


def by_deltas(factors):
    deltas = torch.stack([b @ a for b, a in factors])
    return torch.einsum("iow,kow->iko", deltas, deltas)


def of_columns(factors):
    deltas = torch.stack([b @ a for b, a in factors])
    return torch.einsum("iow,kow->ikw", deltas, deltas)


def of_b_alone(factors):
    most = max(b.shape[1] for b, _ in factors)
    padded = torch.stack([torch.nn.functional.pad(b, (0, most - b.shape[1])) for b, _ in factors])
    return torch.einsum("ior,kor->iko", padded, padded)


def only_diagonal(factors):
    full = by_deltas(factors)
    return torch.stack([full[i, i] for i in range(len(factors))])


def of_whole_matrices(factors):
    deltas = torch.stack([b @ a for b, a in factors])
    return torch.einsum("iow,kow->ik", deltas, deltas)


exercise(
    "04.2",
    inner_products,
    cases_inner_products,
    {
        "these are inner products of columns, the input channels. An output channel is a row of Δ.": of_columns,
        "A is missing. Rows of B alone are coordinates in a basis that differs between variants.": of_b_alone,
        "only the squared lengths are there. The cosines need every pair i, k as well.": only_diagonal,
        "this is one number for a pair of whole matrices. Keep the channels.": of_whole_matrices,
        "a tensor of shape [90, 80] was formed": by_deltas,
    },
    minutes=15,
    level="medium",
)

# %% [markdown]
# ## 04.3 Spearman's correlation, with ties
# How well does the signature's ranking agree with the true one? Spearman's ρ answers: it is Pearson's correlation of
# the *ranks*. Where values are equal, each gets the mean of the ranks that they share: `[5, 7, 7, 9]` has the ranks
# 1, 2.5, 2.5, 4. Equal scores are no rarity here: every suppressed channel has length exactly 0.
#
# No `scipy.stats` in this one, and no loop over pairs is needed.


# %%
def spearman(one: list[float], other: list[float]) -> float:
    """Spearman's rank correlation, ties included.

    Args:
        one: n >= 2 numbers, not all equal.
        other: n numbers, not all equal.

    Returns:
        ρ in [-1, 1].
    """
    ### BEGIN SOLUTION
    ranks = []
    for values in (torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)):
        below = (values[None] < values[:, None]).sum(dim=1)
        same = (values[None] == values[:, None]).sum(dim=1)
        ranks.append(below + (same + 1) / 2)
    x, y = (r - r.mean() for r in ranks)
    return float(x @ y / (x.norm() * y.norm()))
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# The mean rank of a value is the number of smaller values plus half of (the number of equal ones + 1).

# %% [markdown] tags=["hint"]
# The schoolbook formula $1 - 6 \sum d^2 / (n (n^2 - 1))$ is exact only without ties.

# %% [markdown] tags=["discussion"]
# `argsort(argsort(x))` gives ranks, too, but breaks ties by position. With many zeros that invents an order among
# channels that have none, and since both lists are in the same order of channels, it invents *agreement*: two score
# lists of nothing but zeros and a few random numbers would correlate. The shortcut formula errs the same way.


# %% tags=["hidden"]
def cases_spearman(rng):
    yield Case("by hand: the same order", ([1.0, 5.0, 9.0], [10.0, 11.0, 50.0]), 1.0)
    yield Case("by hand: the opposite order", ([1.0, 5.0, 9.0, 12.0], [4.0, 3.0, 2.0, 1.0]), -1.0)
    yield Case("by hand: one tie", ([1.0, 2.0, 2.0], [1.0, 2.0, 3.0]), 0.75**0.5)
    for n, high, name in ((12, 10**6, "12 values, no ties"), (30, 5, "many ties"), (40, 2, "zeros and ones")):
        one, other = ([0, high - 1, *rng.integers(0, high, n)] for _ in range(2))
        one, other = [float(x) for x in one], [float(x) for x in rng.permutation(other)]
        yield Case(name, (one, other), float(spearmanr(one, other).statistic))


def ranks_by_position(values):
    return torch.tensor(values).argsort(stable=True).argsort().double()


def ties_by_position(one, other):
    return float(torch.corrcoef(torch.stack([ranks_by_position(one), ranks_by_position(other)]))[0, 1])


def pearson(one, other):
    return float(torch.corrcoef(torch.tensor([one, other], dtype=torch.float64))[0, 1])


def mean_ranks(values):
    values = torch.tensor(values)
    return (values[None] < values[:, None]).sum(1) + ((values[None] == values[:, None]).sum(1) + 1) / 2


def shortcut(one, other):
    n, gap = len(one), mean_ranks(one) - mean_ranks(other)
    return float(1 - 6 * (gap**2).sum() / (n * (n * n - 1)))


def lowest_rank(one, other):
    ranks = [(torch.tensor(v)[None] < torch.tensor(v)[:, None]).sum(1).double() for v in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def order_for_rank(one, other):
    return float(
        torch.corrcoef(torch.stack([torch.tensor(v).argsort(stable=True).double() for v in (one, other)]))[0, 1]
    )


exercise(
    "04.3",
    spearman,
    cases_spearman,
    {
        "equal values get different ranks, by position. Give each the mean of the ranks they share.": ties_by_position,
        "this is Pearson's correlation of the values. Spearman's compares their ranks.": pearson,
        "the formula with Σ d² holds only without ties. Take Pearson's correlation of the ranks.": shortcut,
        "equal values get the lowest of the ranks they share. Give each the mean of them.": lowest_rank,
        "`argsort` alone is no rank: it says which element comes k-th, not where element k is.": order_for_rank,
    },
    minutes=10,
    level="medium",
)
