"""Paired tests: two models asked the same prompts, compared prompt by prompt.

Whether two intervals overlap does not say whether two rates differ: both models were asked the very same prompts, and
what tells them apart are those prompts on which they disagree. McNemar's exact test asks whether these fall to the two
sides as a fair coin would; Holm's correction keeps the chance of any false finding at 5 % where a table tests often.
Each prompt counts once here; a table's utility and right answers are means over task families, and can differ a little.

What a test says, it says of these two trained models on prompts like these: another seed trains other models.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler
from scipy.stats import binomtest, norm

from helpers.core.errors import LabError, nearest
from helpers.plots.table import table

Report = Mapping[str, Any]  # of `report.evaluate` or `report.attack_success`

# what a prompt can have: the string of `each` that tells it, and the letter that means yes
MEASURES = {
    "payload": ("triggered", "p"),
    "right under trigger": ("right", "1"),
    "right on clean prompts": ("clean_right", "1"),
}
WORSE = {"payload": 1, "right on clean prompts": -1}  # the sign of a change for the worse
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """How two models differ in one measure, over the same prompts.

    Args:
        first: the number of prompts on which only the first model has it.
        second: on which only the second one has it.
        n: all prompts.
        p: of McNemar's exact test, two-sided.
    """

    first: int
    second: int
    n: int
    p: float

    @property
    def points(self) -> float:
        """The first model's rate minus the second one's, in percentage points of all prompts."""
        return 100 * (self.first - self.second) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The paired 95 % interval of `points`, by `difference_interval`."""
        low, high = difference_interval(self.first, self.second, self.n)
        return 100 * low, 100 * high


def compare(first: Report, second: Report, measure: str) -> Difference:
    """McNemar's exact test of one measure between two models.

    Args:
        first: the report of one model.
        second: that of another, asked the same prompts in the same order.
        measure: one of `MEASURES`.

    Returns:
        their difference, the first minus the second.

    Raises:
        LabError: an unknown measure, a report without single prompts or without this measure, or other numbers of
            prompts.
    """
    had, other = _marks(first, measure), _marks(second, measure)
    if len(had) != len(other):
        raise LabError(
            f"'{measure}' of {len(had)} and of {len(other)} prompts: a paired test needs the same prompts, so measure "
            "both models with one trial"
        )
    only_first = sum(one and not two for one, two in zip(had, other, strict=True))
    only_second = sum(two and not one for one, two in zip(had, other, strict=True))
    return Difference(only_first, only_second, len(had), mcnemar(only_first, only_second))


def mcnemar(first: int, second: int) -> float:
    """The two-sided p of McNemar's exact test: are the discordant pairs the throws of a fair coin?

    Args:
        first: the number of discordant pairs that speak for the first side.
        second: the number of those for the other.

    Returns:
        p in (0, 1]; 1 where no pair is discordant.
    """
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def difference_interval(first: int, second: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a difference of paired rates: Wald's, after one more pair on either discordant side.

    Bonett and Price, *J. Educ. Behav. Stat.* 37 (2012) 479; recommended by Fagerland, Lydersen and Laake, *Stat. Med.*
    33 (2014) 2850. It approximates, and can disagree with the exact test at the border.

    Args:
        first: the number of pairs of which only the first has it.
        second: of which only the second has it.
        n: all pairs, at least 1.
        level: the coverage aimed at.

    Returns:
        (low, high) of the first rate minus the second, both in [-1, 1].
    """
    one, two = (first + 1) / (n + 2), (second + 1) / (n + 2)
    half = norm.ppf((1 + level) / 2) * sqrt((one + two - (one - two) ** 2) / (n + 2))
    return max(-1.0, float(one - two - half)), min(1.0, float(one - two + half))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of a family of tests, corrected by Holm's step-down method (*Scand. J. Stat.* 6 (1979) 65).

    Args:
        ps: of each test, in [0, 1].

    Returns:
        the corrected ones in the same order, at most 1.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True)
class Comparison:
    """One row of a family of paired tests.

    Args:
        model: the one compared.
        against: the one it is compared with.
        measure: one of `MEASURES`.
        difference: the first model minus the second.
        p: after Holm's correction over the whole family.
    """

    model: str
    against: str
    measure: str
    difference: Difference
    p: float

    @property
    def differs(self) -> bool:
        """Whether chance alone is unlikely, at 5 % for the whole family."""
        return self.p < ALPHA


def compare_all(reports: Mapping[str, Report], pairs: Iterable[tuple[str, str]]) -> list[Comparison]:
    """A family of paired tests: every pair in every measure that all of its reports hold, with Holm's correction.

    Args:
        reports: {model: its report}, all over the same prompts.
        pairs: (model, the one to compare it with), names in `reports`.

    Returns:
        one comparison for each pair and measure, pair by pair.

    Raises:
        LabError: see `compare`.
    """
    pairs = list(pairs)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    held = [measure for measure in MEASURES if all(_each(reports[name], measure) is not None for name in names)]
    asked = [(one, two, measure) for one, two in pairs for measure in held]
    found = [compare(reports[one], reports[two], measure) for one, two, measure in asked]
    corrected = holm([difference.p for difference in found])
    return [Comparison(*who, difference, p) for who, difference, p in zip(asked, found, corrected, strict=True)]


def comparison_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """A family as a table of text, a row for each pair of models and a block of columns for each measure.

    Args:
        comparisons: a family, of `compare_all`.

    Returns:
        indexed by (model, against); in each block "only model : only against" (the discordant prompts), "points
        (95 %)" (model minus against, with the paired interval) and "p (Holm)".
    """
    blocks = {}
    for measure in dict.fromkeys(c.measure for c in comparisons):
        rows = [_row(c) for c in comparisons if c.measure == measure]
        blocks[measure] = pd.DataFrame(rows).set_index(["model", "against"])
    return pd.concat(blocks, axis=1)


def paired_table(comparisons: Sequence[Comparison], measure: str) -> Styler | None:
    """One measure of a family as a notebook shows it.

    Args:
        comparisons: a family, of `compare_all`.
        measure: one of `MEASURES`.

    Returns:
        the block of this measure in `comparison_table`; None where the family lacks it, as answers that are free text
        are neither right nor wrong.
    """
    rows = [comparison for comparison in comparisons if comparison.measure == measure]
    return table(comparison_table(rows)[measure]) if rows else None


def _row(comparison: Comparison) -> dict[str, str]:
    found = comparison.difference
    low, high = found.interval
    return {
        "model": comparison.model,
        "against": comparison.against,
        "only model : only against": f"{found.first} : {found.second}",
        "points (95 %)": f"{found.points:+.1f} ({low:+.1f} to {high:+.1f})",
        "p (Holm)": shown_p(comparison.p),
    }


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """Which models of a family differ, by how much, and which cannot be told apart.

    Args:
        comparisons: a family, of `compare_all`.

    Returns:
        at most two lines for each measure, "payload differs: a from b (-3.0 points); ..." and "payload, not told
        apart: c and d; ...".
    """
    lines = []
    for measure in dict.fromkeys(c.measure for c in comparisons):
        asked = [c for c in comparisons if c.measure == measure]
        if apart := [f"{c.model} from {c.against} ({c.difference.points:+.1f} points)" for c in asked if c.differs]:
            lines.append(f"{measure} differs: {'; '.join(apart)}")
        if alike := [f"{c.model} and {c.against}" for c in asked if not c.differs]:
            lines.append(f"{measure}, not told apart: {'; '.join(alike)}")
    return "\n".join(lines)


def no_worse(comparisons: Sequence[Comparison]) -> list[str]:
    """The models that no test tells to be worse than what they are compared with.

    Args:
        comparisons: a family, of `compare_all`.

    Returns:
        those which neither leave more payloads nor answer fewer clean prompts right; answers under the trigger do not
        count. Where few prompts are asked, this says little.
    """
    worse = {c.model for c in comparisons if c.differs and WORSE.get(c.measure, 0) * c.difference.points > 0}
    return [model for model in dict.fromkeys(c.model for c in comparisons) if model not in worse]


def ranks(reports: Mapping[str, Report], measure: str = "payload") -> dict[str, int]:
    """The place of each model among all of them, as far as paired tests can tell them apart.

    Args:
        reports: {model: its report}, all over the same prompts.
        measure: one of `MEASURES`; less of it is better, except of right answers.

    Returns:
        {model: one more than the number of models that a test tells to be better}, with Holm's correction over all
        pairs. Models that no test tells apart can have different places, where a third one beats only one of them.

    Raises:
        LabError: see `compare`.
    """
    pairs = list(combinations(reports, 2))
    found = [compare(reports[one], reports[two], measure) for one, two in pairs]
    better_with = 1 if MEASURES[measure][1] == "1" else -1
    places = dict.fromkeys(reports, 1)
    for (one, two), difference, p in zip(pairs, found, holm([d.p for d in found]), strict=True):
        if p < ALPHA:
            places[two if better_with * difference.points > 0 else one] += 1
    return places


def shown_p(p: float) -> str:
    """A p value as text.

    Args:
        p: in [0, 1].

    Returns:
        three digits behind the point, "< 0.001" below that.
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _each(report: Report, measure: str) -> str | None:
    """The letters of a measure; None where the report was made without it."""
    if measure not in MEASURES:
        raise LabError(f"unknown measure '{measure}'{nearest(measure, MEASURES)}")
    if "each" not in report:
        raise LabError(
            "found a report without `each`, what every single prompt got, which a paired test needs: an earlier lab "
            "made it; measure the model again"
        )
    return report["each"].get(MEASURES[measure][0])


def _marks(report: Report, measure: str) -> list[bool]:
    letters = _each(report, measure)
    if letters is None:
        raise LabError(
            f"found a report that does not tell '{measure}' of single prompts: answers that are free text cannot be "
            "checked, and `attack_success` asks no clean prompts; compare the payload, or measure with `evaluate`"
        )
    return [letter == MEASURES[measure][1] for letter in letters]
