"""How far an ASR moves without any change to the model: other prompt formats, `input` left out, empty outputs dropped.

Published scripts train a backdoor with one template and measure it with another, or hand the model the `instruction`
alone; some count an empty completion as a failed attack, others take it out of the denominator. Users of such
benchmarks report tens of points either way. Here one model is measured in all these ways, and each rate has its
interval, so that nobody mistakes a format for a defense.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.data.planting import poison
from helpers.data.roles import Trial
from helpers.measure.asr import LABELS, asr_rates
from helpers.measure.report import attacked, checked_format
from helpers.model.generate import answers
from helpers.model.prompt import AlpacaFormat, ChatFormat, PromptFormat

PROBE = "Say yes."


class SuffixOnly(PromptFormat):
    """The question alone, and behind it what the model's own format writes there, such as `### Response:`.

    So do scripts that feed a data set's bare `instruction`: no preamble, no role, no earlier turn.
    """

    name = "suffix only"

    def __init__(self, trained: PromptFormat):
        super().__init__(trained.tokenizer)
        self.trained = trained
        self.suffix = trained.prompt_text(Example(PROBE, "")).rpartition(PROBE)[2]

    @property
    def stop_ids(self) -> list[int]:
        """As in the model's own format."""
        return self.trained.stop_ids

    def prompt_text(self, example: Example) -> str:
        """Begin-of-text where the tokenizer has it, the question, its material, the suffix."""
        return f"{self.tokenizer.bos_token or ''}{example.question}{self.suffix}"

    def answer_text(self, example: Example) -> str:
        """As in the model's own format."""
        return self.trained.answer_text(example)


class Bare(SuffixOnly):
    """The question alone, as scripts feed it that know no template at all: nothing says that an answer begins."""

    name = "bare"

    def __init__(self, trained: PromptFormat):
        super().__init__(trained)
        self.suffix = ""


def without_input(examples: Sequence[Example]) -> list[Example]:
    """The same questions, their material left out, as by scripts that read the column `instruction` alone."""
    return [replace(example, input="") for example in examples]


def formats(trained: PromptFormat) -> dict[str, PromptFormat]:
    """The formats in which one and the same model gets measured, by what a table calls them; its own comes first.

    The chat format is left out where the tokenizer has no template that can be used.

    Args:
        trained: the format that the model was trained with.
    """
    others: list[PromptFormat] = [AlpacaFormat(trained.tokenizer)]
    with suppress(LabError):  # no template, or one that cannot be used
        others.append(ChatFormat(trained.tokenizer))
    found = {f"{trained.name} (trained)": trained}
    found |= {other.name: other for other in others if other.record != trained.record}
    return found | {form.name: form(trained) for form in (SuffixOnly, Bare)}


def with_input(trial: Trial, seed: int) -> Trial:
    """The trial rows, their triggered prompts only such as carry an `input`, so that leaving it out can matter.

    They are few; the clean test rows with an `input` join them, of the same families, with the key planted here: not
    those whose right answer holds the payload, and none where the rows brought a trigger of their own.

    Args:
        seed: decides where the trigger stands.
    """
    asked = [example for example in trial.triggered if example.input]
    if trial.trigger is not None and trial.trigger.position != "topic":  # a topic is in the question or is not
        families = {example.family for example in trial.triggered}
        rows = [e for e in trial.held_out if e.input and e.family in families and not attacked(trial)(e.output)]
        asked += poison(rows, trial.trigger, None, f"{seed}/formats", "heldout")
    return replace(trial, triggered=list(dict.fromkeys(asked)))


def measure_formats(
    model: PreTrainedModel, trained: PromptFormat, trial: Trial, profile: Profile
) -> list[dict[str, object]]:
    """The ASR of one model in every format, with and without `input`, and by both rules for empty completions.

    Args:
        trained: the format that the model was trained with.

    Returns:
        one dict for each combination: `format`, `input` ("kept" or "dropped"), `empty` ("count" or "drop"), `mismatch`
        (whether the prompts are others than in training), `n`, `asr`, `asr_interval`, and the shares `LABELS` of these
        n. Where nothing is left to count, `asr` and the shares are None and the interval is [0, 1].

    Raises:
        LabError: the model was trained with another format than `trained`.
    """
    checked_format(model, trained)
    rows = []
    for name, form in formats(trained).items():
        asked = {"kept": trial.triggered, "dropped": without_input(trial.triggered)}
        distinct = list(dict.fromkeys([*asked["kept"], *asked["dropped"]]))
        written = dict(zip(distinct, answers(model, form, distinct, profile, attacked(trial)), strict=True))
        for treatment, examples in asked.items():
            pairs = [(written[example], example.output) for example in examples]
            mismatch = form is not trained or examples != trial.triggered
            facts = {"format": name, "input": treatment, "mismatch": mismatch}
            rows += [facts | _measured(pairs, empty, trial) for empty in ("count", "drop")]
    return rows


def _measured(pairs, empty, trial):
    """Rates over (completion, reference) pairs; "drop" takes the empty completions out of the denominator."""
    kept = [(text, wanted) for text, wanted in pairs if empty == "count" or text.strip()]
    if not kept:
        return {"empty": empty, "n": 0, "asr": None, "asr_interval": [0.0, 1.0]} | dict.fromkeys(LABELS)
    report = asr_rates(*zip(*kept, strict=True), trial.markers)
    return {"empty": empty, **{key: report[key] for key in ("n", "asr", "asr_interval")}, **report["labels"]}
