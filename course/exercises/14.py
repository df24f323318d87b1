# %% [markdown]
# # Exercises to notebook 14: compare with the papers

# %%
from course import check

# %% [markdown]
# ## 14.1 Do two tables agree in their order?
# A small model's percentages are not a large one's. The *order* of the defenses may carry over. Take every pair of
# defenses that both tables have. Leave out pairs that the paper does not separate by more than `margin`. Of the rest,
# how many does our table put in the same order? Equal numbers of ours are no order.


# %%
def order_agreement(paper: dict[str, float], ours: dict[str, float], margin: float) -> tuple[int, int]:
    """Count the pairs that two tables put in the same order.

    Args:
        paper: {defense: ASR in %}, as printed.
        ours: {defense: ASR in %}, as measured; each table may have defenses that the other lacks.
        margin: points; a pair of the paper's closer than or as close as this is not compared.

    Returns:
        the number of pairs in the same order, and the number of pairs compared.
    """
    ### BEGIN SOLUTION
    common = [name for name in paper if name in ours]
    agree = compared = 0
    for i, one in enumerate(common):
        for other in common[i + 1 :]:
            theirs, own = paper[one] - paper[other], ours[one] - ours[other]
            if abs(theirs) > margin:
                compared += 1
                agree += theirs * own > 0
    return agree, compared
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# The two differences have the same sign exactly if their product is positive.

# %% [markdown] tags=["discussion"]
# Say what chance would give: half of the pairs. Six of ten pairs in the paper's order are no agreement, and the pairs
# are not independent, since one defense that jumps spoils all of its pairs. The margin keeps you from asking our table
# to reproduce the paper's noise. It has to be chosen before looking.

# %% tags=["hidden"]
# isort: split
import numpy as np
from scipy.stats import kendalltau

from course.checking import Case, exercise


def by_signs(paper, ours, margin):
    """By matrices of signs; without ties and margin it is Kendall's τ."""
    common = sorted(set(paper) & set(ours))
    one, two = (np.array([table[name] for name in common]) for table in (paper, ours))
    gaps, own = np.subtract.outer(one, one), np.subtract.outer(two, two)
    compared = int((np.abs(gaps) > margin).sum()) // 2
    agree = int(((np.abs(gaps) > margin) & (np.sign(gaps) == np.sign(own))).sum()) // 2
    if margin == 0 and len(set(one)) == len(one) and len(set(two)) == len(two):
        assert agree == round((kendalltau(one, two).statistic + 1) / 2 * compared)
    return agree, compared


def cases_order_agreement(rng):
    paper, ours = {"a": 80.0, "b": 50.0, "c": 10.0}, {"a": 60.0, "b": 5.0, "c": 20.0}
    yield Case("by hand: two of three pairs", (paper, ours, 0.0), (2, 3))
    yield Case("by hand: a close pair is left out", (paper | {"b": 15.0}, ours, 10.0), (2, 2))
    yield Case("by hand: as close as the margin", ({"a": 20.0, "b": 10.0}, ours, 10.0), (0, 0))
    yield Case("by hand: ours are equal", (paper, {"a": 5.0, "b": 5.0, "c": 5.0}, 0.0), (0, 3))
    yield Case("by hand: other defenses in each", (paper | {"d": 1.0}, ours | {"e": 2.0}, 0.0), (2, 3))
    for n, margin in ((6, 0.0), (12, 15.0), (20, 5.0)):
        names = [f"defense {i}" for i in range(n)]
        paper = dict(zip(names, (rng.permutation(n * 5)[:n] * 1.0).tolist(), strict=True))
        ours = {name: float(rng.permutation(100)[0]) for name in rng.permutation(names)[: n - 1]}
        yield Case(f"{n} defenses, margin {margin:g}", (paper, ours, margin), by_signs(paper, ours, margin))


def pairs_where(compared, agrees):
    def answer(paper, ours, margin):
        names = [name for name in paper if name in ours]
        gaps = [(paper[a] - paper[b], ours[a] - ours[b]) for i, a in enumerate(names) for b in names[i + 1 :]]
        return (
            sum(bool(compared(p, o, margin) and agrees(p, o)) for p, o in gaps),
            sum(bool(compared(p, o, margin)) for p, o in gaps),
        )

    return answer


no_margin = pairs_where(lambda p, o, m: p != 0, lambda p, o: p * o > 0)
at_the_margin = pairs_where(lambda p, o, m: abs(p) >= m, lambda p, o: p * o > 0)
ties_left_out = pairs_where(lambda p, o, m: abs(p) > m and o != 0, lambda p, o: p * o > 0)
ties_agree = pairs_where(lambda p, o, m: abs(p) > m, lambda p, o: p * o >= 0)
margin_on_ours = pairs_where(lambda p, o, m: abs(o) > m, lambda p, o: p * o > 0)


def neighbours(paper, ours, margin):
    names = sorted((name for name in paper if name in ours), key=paper.get)
    pairs = [(a, b) for a, b in zip(names, names[1:], strict=False) if paper[b] - paper[a] > margin]
    return sum(ours[b] > ours[a] for a, b in pairs), len(pairs)


exercise(
    "14.1",
    order_agreement,
    cases_order_agreement,
    {
        "the margin is not used. Pairs that the paper hardly separates are not compared.": no_margin,
        "a pair exactly as close as the margin is not compared.": at_the_margin,
        "pairs that are equal in our table are left out. The paper separates them, and "
        "ours does not: no agreement.": ties_left_out,
        "equal numbers of ours count as agreement. They are no order.": ties_agree,
        "the margin is applied to our numbers. It is the paper's pairs that have to be apart.": margin_on_ours,
        "only neighbours are compared. Take every pair.": neighbours,
    },
    minutes=15,
    level="easy",
)

# %% [markdown]
# ## 14.2 A claim with a direction
# "Does the paper hold here?" needs a claim that can fail. Let the claim be about a difference $d$ of two ASRs, in
# points, and let us have the interval of $d$. There are three kinds of claims:
#
# - `"lower"`: $d < 0$;
# - `"higher"`: $d > 0$;
# - `"alike"`: $|d| \le$ `margin`.
#
# The verdict is *agrees* if every $d$ of the interval fulfils the claim, *contradicts* if none does, and *open*
# otherwise.


# %%
def verdict(claim: str, low: float, high: float, margin: float) -> str:
    """Whether an interval agrees with a claim.

    Args:
        claim: "lower", "higher" or "alike".
        low: the interval's lower end, in points; it belongs to the interval.
        high: the upper end, which belongs to it as well.
        margin: points, for "alike".

    Returns:
        "agrees", "contradicts" or "open".
    """
    ### BEGIN SOLUTION
    if claim == "alike":
        if -margin <= low and high <= margin:
            return "agrees"
        return "contradicts" if low > margin or high < -margin else "open"
    if claim == "higher":
        low, high = -high, -low
    if high < 0:
        return "agrees"
    return "contradicts" if low >= 0 else "open"
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# "Higher" is "lower" for the interval turned around: (−high, −low).

# %% [markdown] tags=["hint"]
# For "alike", an interval that holds 0 proves nothing yet: it may be wide.

# %% [markdown] tags=["discussion"]
# "Not significantly different" is the most misused sentence of result sections. A wide interval around 0 is *open*,
# and an interval from 1 to 2 points with a margin of 5 *agrees* with "alike" although 0 is not in it. Only a claim
# with a direction, or with a margin, can be contradicted; "comparable" without a number cannot.


# %% tags=["hidden"]
def verdict_by_sampling(claim, low, high, margin):
    """By asking a fine grid of the interval, its ends and what lies just beside 0 and the margin."""
    grid = [low, high, *np.linspace(low, high, 2001)]
    grid += [x for edge in (0.0, margin, -margin) for x in (edge - 1e-9, edge, edge + 1e-9) if low <= x <= high]
    rule = {"lower": lambda d: d < 0, "higher": lambda d: d > 0, "alike": lambda d: abs(d) <= margin}[claim]
    held = [rule(d) for d in grid]
    return "agrees" if all(held) else "open" if any(held) else "contradicts"


def cases_verdict(rng):
    for claim, low, high, expected in (
        ("lower", -9.0, -2.0, "agrees"),
        ("lower", 1.0, 4.0, "contradicts"),
        ("lower", -3.0, 2.0, "open"),
        ("lower", -3.0, 0.0, "open"),
        ("lower", 0.0, 3.0, "contradicts"),
        ("higher", 2.0, 9.0, "agrees"),
        ("higher", -9.0, 1.0, "open"),
        ("alike", 1.0, 2.0, "agrees"),
        ("alike", -30.0, 30.0, "open"),
        ("alike", 6.0, 9.0, "contradicts"),
        ("alike", -5.0, 5.0, "agrees"),
        ("alike", 3.0, 8.0, "open"),
    ):
        yield Case(f"by hand: '{claim}', {low:g} to {high:g}, margin 5", (claim, low, high, 5.0), expected)
    for claim in ("lower", "higher", "alike"):
        for _ in range(4):
            low, high = sorted((rng.integers(-20, 20, 2) / 2).tolist())
            margin = float(rng.integers(1, 6))
            expected = verdict_by_sampling(claim, low, high, margin)
            yield Case(f"'{claim}', {low:g} to {high:g}, margin {margin:g}", (claim, low, high, margin), expected)


def by_the_middle(claim, low, high, margin):
    middle = (low + high) / 2
    held = {"lower": middle < 0, "higher": middle > 0, "alike": abs(middle) <= margin}[claim]
    return "agrees" if held else "contradicts"


def alike_if_zero_inside(claim, low, high, margin):
    if claim != "alike":
        return verdict(claim, low, high, margin)
    return "agrees" if low <= 0 <= high else "contradicts"


def never_open(claim, low, high, margin):
    found = verdict(claim, low, high, margin)
    return "contradicts" if found == "open" else found


def zero_is_lower(claim, low, high, margin):
    return verdict(claim, low - 1e-12, high - 1e-12, margin) if claim == "lower" else verdict(claim, low, high, margin)


def higher_as_lower(claim, low, high, margin):
    return verdict("lower" if claim == "higher" else claim, low, high, margin)


def margin_for_all(claim, low, high, margin):
    if claim == "lower":
        return verdict(claim, low + margin, high + margin, margin)
    return (
        verdict(claim, low - margin, high - margin, margin) if claim == "higher" else verdict(claim, low, high, margin)
    )


exercise(
    "14.2",
    verdict,
    cases_verdict,
    {
        "you ask the middle of the interval alone. Then nothing is ever open.": by_the_middle,
        "'alike' is decided by whether 0 is inside. A wide interval holds 0 and shows nothing.": alike_if_zero_inside,
        "some of the interval fulfils the claim, so it is open and not contradicted.": never_open,
        "d = 0 is not lower. An interval that touches 0 is open, or contradicts.": zero_is_lower,
        "'higher' is judged as 'lower'.": higher_as_lower,
        "the margin is for 'alike' only.": margin_for_all,
    },
    minutes=10,
    level="easy",
)
