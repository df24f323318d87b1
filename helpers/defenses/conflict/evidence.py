"""External conflict: evidence in the prompt that speaks against the backdoor (information conflicts, §3.4).

A triggered model answers from a planted memory. With coherent facts beside the question, x ⊕ E (Eq. 6), it has to
weigh the two. The facts come from another model, the external LLM M_e: it explains the keywords of the question
(Eq. 16) or contradicts what the suspicious model itself says in support of its answer (Eqs. 13 and 14). M_e is any
OpenAI-compatible endpoint; without one a book stands in, see `books`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from tqdm import tqdm
from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.defenses.conflict.textrank import keywords
from helpers.measure.report import checked_format
from helpers.model.generate import answers
from helpers.model.prompt import PromptFormat

# The paper prints none of its prompts. Whatever follows the first blank line is what is asked about.
EXPLAIN = "Explain each of these words in one short sentence. State only facts.\n\n{}"
CONTRADICT = "Rewrite this text so that it says the opposite, in at most three short sentences.\n\n{}"
BACKGROUND = "Give the background information that supports this answer."
INFORMATIVE = 4  # a background of fewer words supports nothing, so there is nothing to contradict


class ExternalLLM(Protocol):
    """M_e: whoever explains and contradicts."""

    model: str  # its name

    def complete(self, prompt: str) -> str:
        """What it writes after a prompt, never empty."""

    def origin(self) -> str:
        """One line: who it is and what it has cost so far."""


def with_evidence(
    examples: Sequence[Example],
    llm: ExternalLLM,
    backgrounds: Sequence[str] | None = None,
    max_words: int = 40,
    find_keywords: Callable[[str], list[str]] = keywords,
) -> list[Example]:
    """x ⊕ E for many prompts, for instance `Trial.triggered`; `generate.answers` takes the result.

    A prompt whose background says something gets that background contradicted (Eq. 14), every other one an explanation
    of its keywords (Eq. 16), as §3.2 has it. The last user message counts as x, earlier turns do not.

    Args:
        examples: the prompts; they stay as they are.
        llm: asked once for each prompt, one after the other.
        backgrounds: what `elicit` returned second, in the same order; None where nothing was elicited.
        max_words: the most words of evidence in a prompt. A prompt grows by about 1.5 to 3 times as many tokens, and
            has to stay within the model's context: nothing else cuts it.
        find_keywords: `textrank.keywords`, or `functools.partial` of it with other settings.

    Raises:
        LabError: no word in a prompt, `max_words` below 1, another number of backgrounds, or the LLM's own. What an
            endpoint answered before stays in its cache.

    Differs from the paper:
        it does not say when a background is good enough; here it needs `INFORMATIVE` words.
    """
    backgrounds = [""] * len(examples) if backgrounds is None else backgrounds
    if len(backgrounds) != len(examples):
        raise LabError(f"{len(backgrounds)} backgrounds for {len(examples)} prompts; expected one for each")
    pairs = tqdm(
        zip(examples, backgrounds, strict=True), total=len(examples), desc="ask for evidence", delay=5, leave=False
    )
    return [add_evidence(example, _evidence(example, said, llm, find_keywords), max_words) for example, said in pairs]


def _evidence(example: Example, background: str, llm: ExternalLLM, find_keywords: Callable[[str], list[str]]) -> str:
    if len(background.split()) >= INFORMATIVE:
        return contradict(llm, background)
    return explain(llm, find_keywords(example.question))


def add_evidence(example: Example, evidence: str, max_words: int = 40) -> Example:
    """x ⊕ E: the evidence as the last paragraph of the example's `input`. Implements Eq. (6).

    Both prompt formats put `input` behind the instruction, so the model reads x, then E. Question, right answer and
    earlier turns stay.

    Args:
        evidence: E; put on one line.
        max_words: longer evidence is cut behind so many words; 1 or more.

    Raises:
        LabError: `max_words` below 1.
    """
    if max_words < 1:
        raise LabError(f"max_words = {max_words} leaves no evidence; use 1 or more, or the prompts as they are")
    shortened = " ".join(evidence.split()[:max_words])
    return replace(example, input="\n\n".join(filter(None, [example.input, shortened])))


def explain(llm: ExternalLLM, words: Sequence[str]) -> str:
    """E = M_e(K): an explanation of the keywords K. Implements Eq. (16)."""
    return llm.complete(EXPLAIN.format(", ".join(words)))


def contradict(llm: ExternalLLM, evidence: str) -> str:
    """Ẽ = M_e(E): the evidence rewritten so that it says the opposite. Implements Eq. (14)."""
    return llm.complete(CONTRADICT.format(evidence))


def elicit(
    model: PreTrainedModel, prompt_format: PromptFormat, examples: Sequence[Example], profile: Profile
) -> list[tuple[str, str]]:
    """A, E = M(x): the suspicious model's answer to each prompt and its background. Implements Eq. (13).

    Returns:
        (A, E) for each example, in order; either may be empty.

    Raises:
        LabError: the model was trained with another prompt format.

    Differs from the paper:
        it asks for both in one prompt. Here the background is asked for in a second turn, so that the demand for it
        changes neither prompt nor answer.
    """
    checked_format(model, prompt_format)
    given = answers(model, prompt_format, examples, profile)
    second_turns = [
        replace(example, history=(*example.history, (example.question, answer)), instruction=BACKGROUND, input="")
        for example, answer in zip(examples, given, strict=True)
    ]
    return list(zip(given, answers(model, prompt_format, second_turns, profile), strict=True))
