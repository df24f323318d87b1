# %% [markdown]
# # Exercises to notebook 09: compare the defenses

# %%
from math import comb

import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 09.1 Merge two adapters exactly
# Two LoRA adapters of one base are to be merged, $w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2$. Averaging the factors apart is
# wrong: the product of two averages has cross terms $B_1 A_2$ that nobody trained. Return *one* adapter whose product
# is the merge exactly. It may have a larger rank, but no more than both together.


# %%
def merge_adapters(
    first: tuple[Tensor, Tensor, float], second: tuple[Tensor, Tensor, float], shares: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Merge two adapters into one of scale 1.

    Args:
        first: (A [r1, in], B [out, r1], scale s1).
        second: (A [r2, in], B [out, r2], scale s2).
        shares: w1 and w2; they may be negative.

    Returns:
        A [r, in] and B [out, r] with r <= r1 + r2, so that B @ A is the merge.
    """
    ### BEGIN SOLUTION
    (a1, b1, s1), (a2, b2, s2) = first, second
    return torch.cat([a1, a2]), torch.cat([shares[0] * s1 * b1, shares[1] * s2 * b2], dim=1)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Stack the ranks: $[B_1\; B_2] \begin{bmatrix} A_1 \\ A_2 \end{bmatrix} = B_1 A_1 + B_2 A_2$.

# %% [markdown] tags=["discussion"]
# Put the shares into one factor only. With $\sqrt{w}$ on both a negative share has no root, and subtracting an adapter
# is a merge, too. Exactness has its price in rank: merge ten adapters and the rank is ten times as large. Then a
# truncated SVD of the product is the best smaller adapter, and the average of factors is still not.

# %% tags=["hidden"]
# isort: split
import numpy as np
from scipy.stats import binomtest

from course.checking import Case, exercise


def judge_merge(first, second, shares):
    """Against the merge of whole matrices in numpy."""
    (a1, b1, s1), (a2, b2, s2) = first, second
    parts = [s * (b.numpy() @ a.numpy()) for a, b, s in (first, second)]
    wanted, rank = shares[0] * parts[0] + shares[1] * parts[1], a1.shape[0] + a2.shape[0]
    crossed = ((s1 * shares[0] + s2 * shares[1]) / 2 * (b1 + b2) @ (a1 + a2)).numpy() if a1.shape == a2.shape else None

    def judge(result):
        if not isinstance(result, tuple | list) or len(result) != 2:
            return "expected the two factors (A, B)"
        a, b = (x.detach().numpy() for x in result)
        if a.shape[1:] != wanted.shape[1:] or b.shape[:1] != wanted.shape[:1] or a.shape[:1] != b.shape[1:]:
            shape = f"A [r, {wanted.shape[1]}] and B [{wanted.shape[0]}, r]"
            return f"expected {shape}, got {list(a.shape)} and {list(b.shape)}: A comes first"
        if a.shape[0] > rank:
            return f"the rank is {a.shape[0]}, and {rank} suffice: form no whole matrix"
        got = b @ a
        if np.allclose(got, wanted):
            return None
        if np.allclose(got, parts[0] / s1 * shares[0] + parts[1] / s2 * shares[1]):
            return "the scales are missing: the merged adapter has scale 1, so s1 and s2 have to be in its factors"
        if np.allclose(got, shares[0] ** 2 * parts[0] + shares[1] ** 2 * parts[1]):
            return "the shares are in twice: put them into one of the two factors"
        if np.isnan(got).any():
            return "there is NaN in it: a negative share has no root; put it into one of the two factors"
        if a.shape[0] < rank and crossed is not None:
            return f"the product is off by up to {abs(got - wanted).max():.3g}: averaged factors have cross terms B1 A2"
        return f"the product B @ A is off by up to {abs(got - wanted).max():.3g} from the merge"

    return judge


def cases_merge_adapters(rng):
    for out, width, r1, r2, s1, s2, shares, name in (
        (3, 4, 1, 1, 1.0, 1.0, (0.5, 0.5), "rank 1, equal shares"),
        (5, 4, 2, 2, 2.0, 2.0, (0.3, 0.7), "rank 2, both of scale 2"),
        (5, 5, 2, 3, 2.0, 0.5, (0.5, 0.5), "ranks 2 and 3, two scales"),
        (8, 9, 1, 1, 1.0, 4.0, (1.0, -1.0), "the second one is subtracted"),
    ):
        first, second = (
            (torch.from_numpy(rng.normal(size=(r, width))), torch.from_numpy(rng.normal(size=(out, r))), s)
            for r, s in ((r1, s1), (r2, s2))
        )
        yield Case(name, (first, second, shares), judge=judge_merge(first, second, shares))


def averaged_factors(first, second, shares):
    if first[0].shape != second[0].shape:
        return merge_adapters(first, second, shares)
    a = shares[0] * first[0] + shares[1] * second[0]
    return a, shares[0] * first[2] * first[1] + shares[1] * second[2] * second[1]


def without_scales(first, second, shares):
    return merge_adapters((*first[:2], 1.0), (*second[:2], 1.0), shares)


def shares_twice(first, second, shares):
    a, b = merge_adapters(first, second, shares)
    return torch.cat([shares[0] * first[0], shares[1] * second[0]]), b


def roots(first, second, shares):
    w1, w2 = (torch.tensor(w, dtype=torch.float64).sqrt() for w in shares)
    a = torch.cat([w1 * first[0], w2 * second[0]])
    return a, torch.cat([w1 * first[2] * first[1], w2 * second[2] * second[1]], dim=1)


def whole_matrix(first, second, shares):
    a, b = merge_adapters(first, second, shares)
    return b @ a, torch.eye(b.shape[0], dtype=b.dtype)


def other_order(first, second, shares):
    return merge_adapters(first, second, shares)[::-1]


exercise(
    "09.1",
    merge_adapters,
    cases_merge_adapters,
    {
        "averaged factors have cross terms B1 A2": averaged_factors,
        "s1 and s2 have to be in its factors": without_scales,
        "the shares are in twice: put them into one of the two factors": shares_twice,
        "a negative share has no root": roots,
        "form no whole matrix": whole_matrix,
        "A comes first": other_order,
    },
    minutes=10,
    level="easy",
)

# %% [markdown]
# ## 09.2 McNemar's exact test
# Two defenses answered the same prompts. Only prompts on which they disagree tell them apart: $b$ for the first, $c$
# for the second. If the two were alike, each disagreement would fall like a fair coin. The two-sided p is the chance
# that a fair coin falls at least as one-sidedly:
#
# $$p = \min\Bigl(1,\; 2 \sum_{i=0}^{\min(b, c)} \binom{b + c}{i} 2^{-(b + c)}\Bigr)$$


# %%
def mcnemar(first: list[bool], second: list[bool]) -> float:
    """The two-sided p of McNemar's exact test.

    Args:
        first: whether the first model has it, on each of n prompts.
        second: whether the second one has it, on the same prompts.

    Returns:
        p in (0, 1]; 1 where they never disagree.
    """
    ### BEGIN SOLUTION
    b = sum(one and not two for one, two in zip(first, second, strict=True))
    c = sum(two and not one for one, two in zip(first, second, strict=True))
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `math.comb(n, i)` gives the binomial coefficient. Python's whole numbers are exact, so divide once, at the end.

# %% [markdown] tags=["discussion"]
# Seven points apart at n = 200, is that a difference? With 14 prompts to 0, p = 0.0001. With 34 to 20, p = 0.08. The
# rates alone do not say. And five disagreements can never reach 5 %, even five to nothing: p = 0.0625. So ask enough
# prompts to *have* disagreements, and correct p where a table tests often.


# %% tags=["hidden"]
def marks(both, only_first, only_second, neither):
    pairs = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    pairs += [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


def cases_mcnemar(rng):
    yield Case("by hand: five to nothing", marks(3, 5, 0, 12), 0.0625)
    yield Case("by hand: they never disagree", marks(4, 0, 0, 6), 1.0)
    yield Case("by hand: two to two", marks(1, 2, 2, 0), 1.0)
    for high, n in ((6, 20), (20, 150), (60, 100)):
        b, c = (int(x) for x in rng.integers(1, high, 2))
        p = float(binomtest(b, b + c).pvalue)
        yield Case(f"{b} to {c} of {n + b + c}", marks(n // 2, b, c, n - n // 2), p)


def counts(first, second):
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def one_sided(first, second):
    b, c = counts(first, second)
    return sum(comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)


def not_capped(first, second):
    return 2 * one_sided(first, second)


def by_chi_square(first, second):
    from scipy.stats import chi2

    b, c = counts(first, second)
    return float(chi2.sf((b - c) ** 2 / (b + c), 1)) if b + c else 1.0


def all_prompts(first, second):
    return float(binomtest(sum(first), max(1, sum(first) + sum(second))).pvalue)


def tail_without_the_end(first, second):
    b, c = counts(first, second)
    return min(1.0, 2 * sum(comb(b + c, i) for i in range(min(b, c))) / 2 ** (b + c))


exercise(
    "09.2",
    mcnemar,
    cases_mcnemar,
    {
        "p is one-sided. Either model could have been the better one: double it.": one_sided,
        "p is above 1. Where both sides are equal, both tails hold the middle: cap it at 1.": not_capped,
        "this is the chi-square approximation. With few disagreements it is far off.": by_chi_square,
        "prompts on which both agree are in. They do not tell the two apart.": all_prompts,
        "the sum stops too early: min(b, c) itself is in.": tail_without_the_end,
    },
    minutes=15,
    level="easy",
)

# %% [markdown]
# ## 09.3 The Pareto front
# No single number says which defense is best: one has the lower ASR, another the higher utility. What can be said is
# which ones are *dominated*: some other one is at least as good in both and better in one. Return those that are not.


# %%
def pareto_front(results: dict[str, tuple[float, float]]) -> set[str]:
    """The defenses that no other one dominates.

    Args:
        results: {defense: (ASR, utility)}; a lower ASR is better, a higher utility is.

    Returns:
        their names. Of two with equal numbers neither dominates the other.
    """

    ### BEGIN SOLUTION
    def dominates(one, other):
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    return {name for name, own in results.items() if not any(dominates(other, own) for other in results.values())}
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Write `dominates(one, other)` first. "At least as good in both, and not the same" says all of it.

# %% [markdown] tags=["discussion"]
# The front forgets the noise. A defense 0.3 points behind in ASR and equal in utility is dominated, although no test
# would tell the two apart. So draw intervals on the front, and say "dominated" only where a paired test agrees. And
# doing nothing is always on the front if its utility is the highest: being on it is no praise.


# %% tags=["hidden"]
def front_by_sweep(results):
    """By walking from the lowest ASR upwards and keeping what raises the utility."""
    front, best = set(), -1.0
    for asr in sorted({a for a, _ in results.values()}):
        highest = max(u for a, u in results.values() if a == asr)
        if highest > best:
            front |= {name for name, own in results.items() if own == (asr, highest)}
            best = highest
    return front


def cases_pareto_front(rng):
    three = {"none": (0.98, 0.9), "cure": (0.02, 0.88), "worse": (0.05, 0.85)}
    yield Case("by hand: one is worse in both", (three,), {"none", "cure"})
    yield Case("by hand: equal ASR, other utility", ({"a": (0.1, 0.8), "b": (0.1, 0.9)},), {"b"})
    yield Case("by hand: equal utility, other ASR", ({"a": (0.1, 0.8), "b": (0.2, 0.8)},), {"a"})
    yield Case("by hand: two with equal numbers", ({"a": (0.1, 0.8), "b": (0.1, 0.8), "c": (0.3, 0.7)},), {"a", "b"})
    for n, steps in ((8, 100), (40, 100), (40, 6)):
        results = {f"defense {i}": tuple((rng.integers(0, steps, 2) / steps).tolist()) for i in range(n)}
        yield Case(f"{n} defenses in steps of 1/{steps}", (results,), front_by_sweep(results))


def by_rule(dominates):
    return lambda results: {
        name for name, own in results.items() if not any(dominates(o, own) for k, o in results.items() if k != name)
    }


strictly_better_in_both = by_rule(lambda one, other: one[0] < other[0] and one[1] > other[1])
equal_counts = by_rule(lambda one, other: one[0] <= other[0] and one[1] >= other[1])
higher_asr = by_rule(lambda one, other: one != other and one[0] >= other[0] and one[1] >= other[1])


def best_of_each(results):
    return {min(results, key=lambda k: results[k][0]), max(results, key=lambda k: results[k][1])}


def best_by_one_number(results):
    scores = {name: utility * (1 - asr) for name, (asr, utility) in results.items()}
    return {max(scores, key=scores.get)}


exercise(
    "09.3",
    pareto_front,
    cases_pareto_front,
    {
        "dominated means better in one and at least as good in the other. Better in both asks too much.": (
            strictly_better_in_both
        ),
        "two with equal numbers dominate each other for you, and both are gone. Neither should.": equal_counts,
        "a high ASR counts as good. A lower one is better.": higher_asr,
        "only the best of each number is there. Between them lie others that nothing dominates.": best_of_each,
        "both numbers are made into one. The front is there so that you need not.": best_by_one_number,
    },
    minutes=15,
    level="easy",
)

# %% [markdown]
# ## 09.4 Wanda on one layer
# Wanda prunes a weight if it is small *and* its input is: the score of $W_{ij}$ is $|W_{ij}| \cdot \lVert X_j
# \rVert_2$, the norm over all calibration tokens. In each *output row* the lowest share becomes 0. Padding is no
# calibration token.


# %%
def wanda(weight: Tensor, inputs: Tensor, is_token: Tensor, share: float) -> Tensor:
    """Prune one linear layer.

    Args:
        weight: [out, in].
        inputs: [batch, T, in], what the layer reads.
        is_token: [batch, T], False for padding.
        share: of each row that becomes 0; `int(share * in)` weights.

    Returns:
        [out, in], the pruned weight.
    """
    ### BEGIN SOLUTION
    norms = inputs[is_token].norm(dim=0)
    lowest = (weight.abs() * norms).argsort(dim=1)[:, : int(share * weight.shape[1])]
    return weight.scatter(1, lowest, 0.0)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `inputs[is_token]` is [tokens, in]. Its norm over the tokens has one number for each input.

# %% [markdown] tags=["hint"]
# `argsort(dim=1)` ranks inside each row; `scatter(1, columns, 0.0)` sets the chosen columns of each row to 0.

# %% [markdown] tags=["discussion"]
# Scaling an input by 10 and its column of W by 1/10 changes nothing in what the layer computes. Magnitude pruning does
# change its mind, Wanda does not. As a *defense* it hopes that weights which matter little for clean text carry the
# backdoor; but calibration text without the trigger cannot see what the trigger uses, in either direction.


# %% tags=["hidden"]
def wanda_by_sorting(weight, inputs, is_token, share):
    """Row by row, by sorting Python lists."""
    real = [
        x
        for row, mask in zip(inputs.tolist(), is_token.tolist(), strict=True)
        for x, m in zip(row, mask, strict=True)
        if m
    ]
    norms = [sum(x[j] ** 2 for x in real) ** 0.5 for j in range(weight.shape[1])]
    pruned = weight.tolist()
    for row in pruned:
        order = sorted(range(len(row)), key=lambda j: abs(row[j]) * norms[j])
        for j in order[: int(share * len(row))]:
            row[j] = 0.0
    return torch.tensor(pruned, dtype=weight.dtype)


def cases_wanda(rng):
    weight, inputs = torch.tensor([[1.0, -2.0], [3.0, 1.0]]), torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])
    asked = (weight, inputs, torch.ones(1, 2, dtype=torch.bool), 0.5)
    yield Case("by hand: two inputs of norms 5 and 1", asked, torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    for out, width, share, name in ((4, 8, 0.5, "half"), (6, 10, 0.25, "a quarter"), (3, 12, 0.9, "nine in ten")):
        weight = torch.from_numpy(rng.normal(size=(out, width)) * rng.gamma(1, size=(out, 1)))
        inputs = torch.from_numpy(rng.normal(size=(3, 5, width)) ** 3 * rng.gamma(1, size=width))
        mask = torch.ones(3, 5, dtype=torch.bool)
        yield Case(name, (weight, inputs, mask, share), wanda_by_sorting(weight, inputs, mask, share))
    mask = torch.arange(5) >= torch.tensor([[0], [2], [4]])
    inputs = torch.where(mask[..., None], inputs, 50 * torch.from_numpy(rng.gamma(1, size=width)))
    asked = (weight, inputs, mask, 0.5)
    yield Case("padding with large numbers on the left", asked, wanda_by_sorting(*asked))


def pruned(weight, scores, share, dim=1):
    lowest = scores.argsort(dim=dim).narrow(dim, 0, int(share * weight.shape[dim]))
    return weight.scatter(dim, lowest, 0.0)


def magnitude(weight, inputs, is_token, share):
    return pruned(weight, weight.abs(), share)


def with_padding(weight, inputs, is_token, share):
    return pruned(weight, weight.abs() * inputs.flatten(0, 1).norm(dim=0), share)


def down_the_columns(weight, inputs, is_token, share):
    return pruned(weight, weight.abs() * inputs[is_token].norm(dim=0), share, dim=0)


def whole_matrix_at_once(weight, inputs, is_token, share):
    scores = (weight.abs() * inputs[is_token].norm(dim=0)).flatten()
    return pruned(weight.flatten()[None], scores[None], share).reshape(weight.shape)


def keeps_the_lowest(weight, inputs, is_token, share):
    scores = weight.abs() * inputs[is_token].norm(dim=0)
    return pruned(weight, -scores, share)


def signed_weights(weight, inputs, is_token, share):
    return pruned(weight, weight * inputs[is_token].norm(dim=0), share)


def mean_absolute_input(weight, inputs, is_token, share):
    return pruned(weight, weight.abs() * inputs[is_token].abs().mean(dim=0), share)


exercise(
    "09.4",
    wanda,
    cases_wanda,
    {
        "the inputs are not used: this is magnitude pruning.": magnitude,
        "padding is in the norms. Leave out what is no token.": with_padding,
        "the lowest of each column are gone. Weights are compared within an output, a row.": down_the_columns,
        "all weights are compared with each other. Wanda takes the same share of each row.": whole_matrix_at_once,
        "the highest are gone. The lowest scores become 0.": keeps_the_lowest,
        "the sign counts. The score has the absolute value of the weight.": signed_weights,
        "the inputs' mean absolute value is not their norm: squares, then the root.": mean_absolute_input,
    },
    minutes=15,
    level="medium",
)
