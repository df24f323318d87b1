"""From what a judge says to a score: marks of one model, or preferences between two, whose order is swapped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from helpers.core.errors import LabError
from helpers.measure.mt_bench.judges import Judge, Preference
from helpers.measure.mt_bench.questions import TURNS, Dialogue


def grade(dialogues: Sequence[Dialogue], judge: Judge) -> dict[str, Any]:
    """MT-Bench's score: the mean of all marks, over both turns of all questions (Zheng et al., §3.1, single answers).

    Args:
        dialogues: of one model.
        judge: asked once for each turn.

    Returns:
        a JSON-able dict: `judge` (its name), `score` from 1 to 10, `by_turn` (two means), `by_category` ({name: mean}),
        `n` (marks), `unmarked` (answers to which the judge gave none: they count nowhere), `marks` (a pair for each
        dialogue, None for an answer without one). A mean of no mark is None.

    Raises:
        LabError: no dialogue, no mark at all, or as the judge's own.
    """
    if not dialogues:
        raise LabError("nothing to grade: expected one dialogue at least")
    marks = [[judge.mark(dialogue, turn) for turn in range(TURNS)] for dialogue in dialogues]
    given = _known(mark for pair in marks for mark in pair)
    if not given:
        raise LabError(f"{judge.name} gave no mark from 1 to 10 in double square brackets: choose another judge")
    by_category = defaultdict(list)
    for dialogue, pair in zip(dialogues, marks, strict=True):
        by_category[dialogue.question.category] += pair
    return {
        "judge": judge.name,
        "score": mean(given),
        "by_turn": [_mean(pair[turn] for pair in marks) for turn in range(TURNS)],
        "by_category": {name: _mean(found) for name, found in by_category.items()},
        "n": len(given),
        "unmarked": TURNS * len(dialogues) - len(given),
        "marks": marks,
    }


def compare(ours: Sequence[Dialogue], theirs: Sequence[Dialogue], judge: Judge) -> dict[str, Any]:
    """Which of two models answers better, whatever place the judge likes (Zheng et al., §3.4: swapped positions).

    Args:
        ours, theirs: of two models, to the same questions in the same order.
        judge: asked twice for each turn, with the answers in either order.

    Returns:
        a JSON-able dict: `judge`, `wins`, `ties`, `losses` of ours, `n` (their sum), `win_rate` (ties count half),
        `inconsistent` (ties because the two orders disagree), `unjudged` (turns of which an order got no preference:
        they count nowhere), `each` (a pair for each question, of "win", "tie", "loss" or None). A win is what both
        orders call one.

    Raises:
        LabError: other questions or another order, no preference at all, or as the judge's own.
    """
    asked, others = ([dialogue.question for dialogue in dialogues] for dialogues in (ours, theirs))
    if not asked or asked != others:
        raise LabError(
            f"{len(asked)} and {len(others)} dialogues of other questions cannot be compared: ask both models the same "
            "questions in one order"
        )
    said = [
        [_both_orders(mine, other, turn, judge) for turn in range(TURNS)]
        for mine, other in zip(ours, theirs, strict=True)
    ]
    verdicts = [[_verdict(*orders) for orders in pair] for pair in said]
    count = Counter(verdict for pair in verdicts for verdict in pair)
    n = count["win"] + count["tie"] + count["loss"]
    if not n:
        raise LabError(f"{judge.name} gave no preference in double square brackets: choose another judge")
    return {
        "judge": judge.name,
        "wins": count["win"],
        "ties": count["tie"],
        "losses": count["loss"],
        "n": n,
        "win_rate": (count["win"] + count["tie"] / 2) / n,
        "inconsistent": sum(None not in orders and orders[0] != orders[1] for pair in said for orders in pair),
        "unjudged": count[None],
        "each": verdicts,
    }


OUTCOMES = {"A": "win", "B": "loss", "tie": "tie", None: None}
SWAPPED: dict[Preference | None, Preference | None] = {"A": "B", "B": "A", "tie": "tie", None: None}


def _both_orders(ours: Dialogue, theirs: Dialogue, turn: int, judge: Judge) -> tuple[Preference | None, ...]:
    """What a judge prefers in either order, with ours called A in both."""
    return judge.prefer(ours, theirs, turn), SWAPPED[judge.prefer(theirs, ours, turn)]


def _verdict(first: Preference | None, swapped: Preference | None) -> str | None:
    if first is None or swapped is None:
        return None
    return OUTCOMES[first] if first == swapped else "tie"


def _known(marks: Iterable[float | None]) -> list[float]:
    return [mark for mark in marks if mark is not None]


def _mean(marks: Iterable[float | None]) -> float | None:
    known = _known(marks)
    return mean(known) if known else None
