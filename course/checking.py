"""How an answer is checked: cases with known results, and wrong answers that are known by what they return.

An exercise draws its cases from a seed. What is right comes from an oracle, which is neither the solution nor the lab's
own code: a library, brute force, or numbers worked out by hand. Where an answer fails, its results are held against
those of the typical wrong answers, and the one that errs alike says what the mistake was.
"""

import copy
import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from course.comparing import changed, difference, shown
from helpers.core.errors import LabError, nearest

Answer = Callable[..., Any]
LEVELS = ("easy", "medium", "hard")
FOLDER = Path(__file__).parent / "exercises"


@dataclass(frozen=True)
class Case:
    """One call of an answer, and how its result is judged.

    Args:
        name: what is special about it, for the student to read.
        arguments: of the call; the answer gets a copy.
        expected: the result by the oracle, unless `judge` decides.
        judge: for tasks with many right results: says what is wrong with one, or None.
        tolerance: the largest relative error of a number.
        may_change: whether the answer may change its arguments.
        within: makes the context in which the answer is called, such as one that watches it.
    """

    name: str
    arguments: tuple[Any, ...]
    expected: Any = None
    judge: Callable[[Any], str | None] | None = None
    tolerance: float = 1e-5
    may_change: bool = False
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def complaint(self, result: Any) -> str | None:
        """What is wrong with a result, in one or more lines; None where it is right."""
        if self.judge:
            return self.judge(result)
        return difference(result, self.expected, self.tolerance)


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer, and the message that whoever gives it must get."""

    message: str
    answer: Answer


@dataclass(frozen=True)
class Exercise:
    """A task, its solution, its cases and its typical wrong answers.

    Args:
        number: of the lesson and within it, "04.1".
        solution: the function of the sheet, solved.
        cases: draws them with a generator.
        wrong: at least three.
        minutes: that it takes.
        level: one of `LEVELS`.
    """

    number: str
    solution: Answer
    cases: Callable[[np.random.Generator], Iterable[Case]]
    wrong: Sequence[Wrong]
    minutes: int
    level: str


@dataclass(frozen=True)
class Verdict:
    """What a check found: how many cases are right, and the text that the student reads."""

    passed: int
    total: int
    text: str

    @property
    def right(self) -> bool:
        """Whether every case is right."""
        return self.passed == self.total


@dataclass
class Outcome:
    """What an answer did in one case."""

    case: Case
    result: Any = None
    error: Exception | None = None
    complaints: list[str] = field(default_factory=list)


EXERCISES: dict[str, Exercise] = {}


def exercise(
    number: str,
    solution: Answer,
    cases: Callable[[np.random.Generator], Iterable[Case]],
    wrong: Mapping[str, Answer],
    *,
    minutes: int,
    level: str,
) -> None:
    """Make an exercise known; `wrong` is {message: the wrong answer that gets it}, the rest as in `Exercise`."""
    known = [Wrong(message, answer) for message, answer in wrong.items()]
    EXERCISES[number] = Exercise(number, solution, cases, known, minutes, level)


def lessons() -> list[str]:
    """The numbers of the lessons that have exercises, such as "04"."""
    return sorted(path.stem for path in FOLDER.glob("[0-9][0-9].py"))


def load_exercises(names: Iterable[str]) -> None:
    """Make the exercises of these lessons known, in `EXERCISES`."""
    for name in names:
        importlib.import_module(f"course.exercises.{name}")


def find_exercise(number: str) -> Exercise:
    """An exercise by its number.

    Raises:
        LabError: there is none of that number.
    """
    if number not in EXERCISES:
        lesson = str(number).partition(".")[0]
        load_exercises([lesson] if lesson in lessons() else lessons())
    if number not in EXERCISES:
        raise LabError(f"there is no exercise '{number}'{nearest(str(number), EXERCISES)}")
    return EXERCISES[number]


def check(number: str, answer: Answer, seed: int = 0) -> None:
    """Say how far an answer is: "not done yet", "6 of 6", or the first case that fails with the likely mistake.

    Args:
        number: of the exercise, such as "04.1".
        answer: your function.
        seed: of the random inputs; another one asks other cases.

    Raises:
        LabError: there is no such exercise, or `answer` is no function.
    """
    print(judge(number, answer, seed).text)


def judge(number: str, answer: Answer, seed: int = 0) -> Verdict:
    """What `check` prints, as a value.

    Raises:
        LabError: as `check`.
    """
    task = find_exercise(number)
    if not callable(answer):
        raise LabError(f'check("{number}", …) got {shown(answer)}: hand over the function itself, not its result')
    outcomes = try_all(task, answer, seed)
    passed = sum(not outcome.complaints for outcome in outcomes)
    if any(isinstance(outcome.error, NotImplementedError) for outcome in outcomes):
        return Verdict(0, len(outcomes), f"{number}: not done yet")
    if passed == len(outcomes):
        return Verdict(passed, passed, f"{number}: {passed} of {passed}, all right")
    first = next(i for i, outcome in enumerate(outcomes) if outcome.complaints)
    lines = [
        f"{number}: {passed} of {len(outcomes)}; case {first + 1} fails: {outcomes[first].case.name}",
        *outcomes[first].complaints,
    ]
    if message := likely_mistake(task, outcomes, first):
        lines.append(f"A likely mistake: {message}")
    return Verdict(passed, len(outcomes), "\n  ".join(lines))


def try_all(task: Exercise, answer: Answer, seed: int) -> list[Outcome]:
    """What an answer does in every case; the same cases for the same seed."""
    return [try_case(case, answer) for case in task.cases(np.random.default_rng(seed))]


def try_case(case: Case, answer: Answer) -> Outcome:
    """What an answer does in one case."""
    outcome, given = Outcome(case), copy.deepcopy(case.arguments)
    try:
        with case.within():
            outcome.result = answer(*given)
    except Exception as error:  # whatever a student's code raises is an outcome
        outcome.error = error
        outcome.complaints.append(_told(error, answer))
        return outcome
    if outcome.result is None and case.expected is not None:
        outcome.complaints.append("it returned None: is there a `return` on every path?")
    elif complaint := _complaint(case, outcome.result):
        outcome.complaints.append(complaint)
    elif not case.may_change and (which := changed(given, case.arguments)):
        outcome.complaints.append(f"the result is right, but {which} was changed on the way: work on a copy")
    return outcome


def _complaint(case: Case, result: Any) -> str | None:
    """What is wrong with a result; a judge reads what it expects, and fails on a result of another form."""
    try:
        return case.complaint(result)
    except Exception:
        return f"a result of another form than asked for: got {shown(result)}"


def likely_mistake(task: Exercise, outcomes: Sequence[Outcome], first: int) -> str:
    """The message of the wrong answer that errs most alike; "" where none gives the same in the first failing case."""
    if outcomes[first].error or outcomes[first].case.judge:  # both say themselves what is wrong
        return ""
    best, message = 0, ""
    for wrong in task.wrong:
        theirs = [try_case(outcome.case, wrong.answer) for outcome in outcomes]
        alike = [_alike(mine, other) for mine, other in zip(outcomes, theirs, strict=True)]
        if alike[first] and theirs[first].complaints and sum(alike) > best:
            best, message = sum(alike), wrong.message
    return message


def _alike(mine, other):
    if mine.error or other.error:
        return type(mine.error) is type(other.error)
    same_end = bool(mine.complaints) == bool(other.complaints)
    return same_end and difference(mine.result, other.result, mine.case.tolerance) is None


def _told(error, answer):
    """An exception in one line, with the line of the student's code that raised it."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    where = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file and frame.line]
    place = f" in `{where[-1]}`" if where else ""
    return (
        f"{type(error).__name__}{place}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    )
