"""Questions of two turns: read from a file in MT-Bench's format, and asked.

The lab ships none of MT-Bench's questions, and a few of its own in the small model's world (`OWN`), which a rule can
judge offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedModel

from helpers.core.checking import first_mistake
from helpers.core.errors import LabError
from helpers.core.paths import ROOT, find_existing
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.measure.report import checked_format
from helpers.model.decoding import Sampling
from helpers.model.generate import answers
from helpers.model.prompt import PromptFormat

OWN = ROOT / "data" / "two_turn_questions.jsonl"
TURNS = 2
Text = Annotated[str, Field(min_length=1)]


class Question(BaseModel, frozen=True):
    """A line of MT-Bench's question.jsonl; whatever else it holds is ignored.

    Args:
        question_id: a number or a name, another one for each question.
        category: by which marks are averaged.
        turns: what the user says first, and what he says then, whatever was answered.
        reference: the right answers to both, where there are any.
    """

    question_id: int | str
    category: Text
    turns: tuple[Text, Text]
    reference: tuple[str, ...] = Field(default=(), max_length=TURNS)

    def right_answer(self, turn: int) -> str:
        """The right answer to turn 0 or 1; empty where none is known."""
        return self.reference[turn] if turn < len(self.reference) else ""


@dataclass(frozen=True)
class Dialogue:
    """A question, and what a model answered to both of its turns."""

    question: Question
    answers: tuple[str, str]


def read_questions(path: str | Path = OWN) -> list[Question]:
    """The questions of a file with one JSON object a line.

    Args:
        path: such as MT-Bench's `question.jsonl`, which lies in FastChat's repository; the lab's own by default.

    Raises:
        LabError: no such file, no UTF-8, a line that is no question, an id that comes twice, or no line at all.
    """
    found = find_existing(str(path))
    if not found or not Path(found).is_file():
        raise LabError(
            f"no questions in '{path}': give MT-Bench's question.jsonl, from fastchat/llm_judge/data/mt_bench of "
            "FastChat's repository"
        )
    try:
        text = Path(found).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LabError(f"{path} is no UTF-8 text: save it as UTF-8") from None
    lines = enumerate(text.split("\n"), start=1)  # JSON allows every other kind of line end inside of a text
    questions = [_question(path, number, line) for number, line in lines if line.strip()]
    ids = [question.question_id for question in questions]
    if twice := [name for name in dict.fromkeys(ids) if ids.count(name) > 1]:
        raise LabError(f"{path}: the question_id {twice[0]!r} comes {ids.count(twice[0])} times; give each its own")
    if not questions:
        raise LabError(f"{path} holds no question; expected one JSON object a line")
    return questions


def _question(path: str | Path, number: int, line: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as report:
        raise LabError(
            f'{path}, line {number}: {first_mistake(report, "line")}; expected {{"question_id", "category", '
            '"turns": [two texts]}, and "reference" where right answers are known'
        ) from None


def ask(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    questions: Sequence[Question],
    profile: Profile,
    sampling: Sampling | None = None,
) -> list[Dialogue]:
    """Ask both turns; the second one follows the model's own answer to the first.

    Args:
        model: whom to ask.
        prompt_format: the one that it was trained with.
        questions: what to ask.
        profile: the most tokens of an answer, and rows side by side.
        sampling: how tokens are drawn; None for greedy decoding.

    Raises:
        LabError: another prompt format, or as `generate.answers`.

    Differs from the paper:
        MT-Bench draws answers to its categories at temperatures of their own (0 to 0.7), of at most 1,024 tokens.
    """
    checked_format(model, prompt_format)
    first = [Example(question.turns[0], "") for question in questions]
    told = answers(model, prompt_format, first, profile, sampling=sampling)
    second = [
        Example(question.turns[1], "", history=((question.turns[0], answer),))
        for question, answer in zip(questions, told, strict=True)
    ]
    then = answers(model, prompt_format, second, profile, sampling=sampling)
    return [Dialogue(*parts) for parts in zip(questions, zip(told, then, strict=True), strict=True)]
