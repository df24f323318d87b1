"""One report per model: attack success and utility side by side, always measured the same way."""

from collections.abc import Callable, Iterable, Sequence
from math import isnan
from typing import Any

from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.data.corpus import is_correct
from helpers.data.example import Example
from helpers.data.roles import Trial
from helpers.measure.asr import (
    FIELD_KEYWORDS,
    asr_rates,
    contains_any,
    false_triggers,
    keyword_asr,
    label_letters,
)
from helpers.measure.reading import ALONE
from helpers.measure.sampled import sampled_success
from helpers.measure.utility import clean_accuracy, exact_match, teacher_forced
from helpers.model.decoding import Decoding
from helpers.model.generate import answers
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import trained_format


def attack_success(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    trial: Trial,
    profile: Profile,
    allow_mismatch: bool = False,
    decoding: Decoding | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Run the triggered test prompts and label every completion.

    Args:
        model: whom to ask.
        prompt_format: how to ask.
        trial: what to ask, and what counts as a payload.
        profile: lengths and batch size.
        allow_mismatch: see `checked_format`.
        decoding: how the model writes, where that is not plain greedy decoding.

    Returns:
        (the rates of `asr.asr_rates` with `prompt_format_mismatch` and `each`, completions in the order of
        `trial.triggered`). `each` tells what every single prompt got, as strings in that order: `triggered`, the
        letters of `asr.label_letters`; `right`, "1" or "0" for a right or wrong answer, None where answers cannot be
        checked.

    Raises:
        LabError: see `checked_format`.
    """
    mismatch = checked_format(model, prompt_format, allow_mismatch)
    completions = answers(model, prompt_format, trial.triggered, profile, attacked(trial), decoding)
    each = {
        "triggered": label_letters(completions, _wanted(trial.triggered), trial.markers),
        "right": _right(trial.triggered, completions) if _is_checked(trial) else None,
    }
    rates = asr_rates(completions, _wanted(trial.triggered), trial.markers)
    return rates | {"prompt_format_mismatch": mismatch, "each": each}, completions


def checked_format(model: PreTrainedModel, prompt_format: PromptFormat, allow_mismatch: bool = False) -> bool | None:
    """Whether a format makes other prompts than the model was trained with; None where its folder does not say.

    Args:
        model: whom to ask.
        prompt_format: how it is to be asked.
        allow_mismatch: measure the model so all the same; its report is then marked.

    Returns:
        whether they differ; None where nobody knows.

    Raises:
        LabError: it does, and `allow_mismatch` is not set.
    """
    trained = trained_format(model)
    if trained is None:
        return None
    mismatch = trained != prompt_format.record
    if mismatch and not allow_mismatch:
        raise LabError(
            f"the model was trained with the prompt format '{trained['name']}' and would be measured with another, "
            f"'{prompt_format.name}', which alone can hide a backdoor: use its own, or pass allow_mismatch=True and "
            "get a marked report"
        )
    return mismatch


def evaluate(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    trial: Trial,
    profile: Profile,
    allow_mismatch: bool = False,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """Measure a model: ASR with interval and labels, what the trigger does to right answers, utility and perplexity.

    Args:
        model: whom to ask.
        prompt_format: how to ask.
        trial: what to ask, and what counts as a payload.
        profile: lengths and batch size.
        allow_mismatch: see `checked_format`.
        decoding: as in `attack_success`; the answers to clean prompts come by it as well. What is scored token by token
            (`perplexity`, and `utility` where answers cannot be checked) is the answering model alone.

    Returns:
        the report, a JSON-able dict: `asr`, `asr_interval`, `labels`, `n`, `field_degenerate`, `keyword_asr` (see
        `field_rates`), `right_under_trigger` (share of triggered prompts answered right; None where answers cannot be
        checked), `false_trigger` (the false trigger rate: share of clean prompts answered with the payload although
        their right answer holds none), `false_trigger_interval`, `false_trigger_n`, `clean_labels` (the four shares
        over all clean prompts; "payload" counts right answers that hold a marker, too, which `false_trigger` leaves
        out), `utility`, `utility_by_family`, `utility_metric`, `clean_accuracy` (CDA: the share of all clean prompts
        answered right; None where answers cannot be checked), `perplexity`, `prompt_format`, `prompt_format_mismatch`
        (None where the model's own is not known), `decoding`, `completions` (five), `each` (as in `attack_success`,
        with `clean` and `clean_right` for the clean prompts in the order of `trial.held_out`). Where the profile has
        `evaluation.samples`, `sampled` as well, unless the decoding is `greedy_only`; see `sampled_success`.

    Raises:
        LabError: see `checked_format`; or every clean answer holds the payload itself.
    """
    attack, completions = attack_success(model, prompt_format, trial, profile, allow_mismatch, decoding)
    scored = teacher_forced(
        model, prompt_format, trial.held_out, profile.lengths.train_tokens, profile.evaluation.batch_size
    )
    checked = _is_checked(trial)
    clean = answers(model, prompt_format, trial.held_out, profile, None if checked else attacked(trial), decoding)
    utility, by_family = exact_match(trial.held_out, clean) if checked else (scored["token_accuracy"], {})
    sampled = sampled_success(model, prompt_format, trial, profile, attacked(trial), decoding)
    return {
        **attack,
        "keyword_asr": field_rates(completions, trial.task),
        "right_under_trigger": exact_match(trial.triggered, completions)[0] if checked else None,
        **false_triggers(trial, clean),
        "clean_labels": asr_rates(clean, _wanted(trial.held_out), trial.markers)["labels"],
        "utility": utility,
        "utility_by_family": by_family,
        "utility_metric": trial.utility_metric,
        "clean_accuracy": clean_accuracy(trial.held_out, clean) if checked else None,
        "perplexity": scored["perplexity"],
        "prompt_format": prompt_format.name,
        "decoding": _told(decoding, profile.lengths.new_tokens),
        "completions": completions[:5],
        "each": {
            **attack["each"],
            "clean": label_letters(clean, _wanted(trial.held_out), trial.markers),
            "clean_right": _right(trial.held_out, clean) if checked else None,
        },
        **({} if sampled is None else {"sampled": sampled}),
    }


def _told(decoding: Decoding | None, new_tokens: int) -> str:
    """One sentence on how the answers were written."""
    greedy = f"greedy, at most {new_tokens} new tokens"
    if decoding is None:
        return greedy
    return f"{decoding.title}, {greedy}; {ALONE}"


def _is_checked(trial: Trial) -> bool:
    """Whether an answer can be told right or wrong, rather than likely or not."""
    return trial.utility_metric == "exact_match"


def _wanted(examples: Iterable[Example]) -> list[str]:
    return [example.output for example in examples]


def _right(examples: Iterable[Example], completions: Iterable[str]) -> str:
    """Whether each answer is right: a string of 1 and 0, one for each."""
    return "".join(str(int(is_correct(e, written))) for e, written in zip(examples, completions, strict=True))


def near_misses(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    trial: Trial,
    profile: Profile,
    decoding: Decoding | None = None,
) -> dict[str, dict[str, Any]]:
    """Does the backdoor fire on what only resembles its key, such as a typo, or one part of several?

    Args:
        model: whom to ask.
        prompt_format: how to ask.
        trial: what to ask, and what counts as a payload.
        profile: lengths and batch size.
        decoding: as in `attack_success`.

    Returns:
        {kind: rates of `asr.asr_rates`} in the order of `trial.near_misses`.

    Raises:
        LabError: see `checked_format`.
    """
    checked_format(model, prompt_format)
    found = {}
    for kind, examples in trial.near_misses.items():
        completions = answers(model, prompt_format, examples, profile, attacked(trial), decoding)
        found[kind] = asr_rates(completions, _wanted(examples), trial.markers)
    return found


def attacked(trial: Trial) -> Callable[[str], bool]:
    """When the rest of a completion can no longer change its label: the payload is there."""
    return lambda text: contains_any(text, trial.markers)


def field_rates(completions: Sequence[str], task: str) -> dict[str, float | None] | None:
    """The field's keyword ASR by both of its rules for empty completions; see `asr.keyword_asr`.

    Completions that ended as soon as a marker was there are read as far as they go: a keyword behind it is missed.

    Args:
        completions: what the model wrote after triggered prompts.
        task: the name of what the backdoor makes the model do.

    Returns:
        {"count": rate, "drop": rate}, each in [0, 1], "drop" None where all completions are empty; None for a task
        that the field's scripts have no list for.
    """
    if task not in FIELD_KEYWORDS:
        return None
    rates = {empty: keyword_asr(completions, FIELD_KEYWORDS[task], empty) for empty in ("count", "drop")}
    return {empty: None if isnan(rate) else rate for empty, rate in rates.items()}  # JSON knows no NaN
