"""Attack success over drawn answers: a backdoor may be likely without being the likeliest.

BD-VAX (Appendix A.5) defines ASR as an expectation over answers that the model draws. Greedy decoding reads one answer
of each prompt and misses a payload that comes now and then, so several can be drawn beside it.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from helpers.core.profile import Profile
from helpers.data.roles import Trial
from helpers.measure.asr import asr_rates, wilson
from helpers.model.decoding import Decoding, Sampling
from helpers.model.generate import answers
from helpers.model.prompt import PromptFormat

SEED = 0  # the same for every model: a run's seed is for what is trained


def sampled_success(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    trial: Trial,
    profile: Profile,
    decided: Callable[[str], bool],
    decoding: Decoding | None = None,
) -> dict[str, Any] | None:
    """Draw `evaluation.samples` answers to every triggered prompt and label them. Implements BD-VAX, Appendix A.5.

    The interval is that of a mean over prompts, not over answers: answers to one prompt are not independent, so five
    times the answers are not five times the evidence. It is Wilson's, with as many trials as there are prompts, for a
    prompt's rate lies in [0, 1] and so varies at most as one answer does. Resampling prompts, or the normal interval of
    their rates, would be narrower and would say [0, 0] where no payload came, as is the rule after a cure; this one is
    wide enough there, somewhat too wide elsewhere, and can be held against that of the greedy answers.

    Args:
        model: whom to ask.
        prompt_format: how to ask.
        trial: what to ask, and what counts as a payload.
        profile: `evaluation.samples` and `evaluation.temperature`, lengths and batch size.
        decided: as in `complete`.
        decoding: as in `evaluate`. Evidence in the prompt stays there. Speculative decoding is left out: its draws have
            the verifier's own distribution. So is CleanGen: it checks the token that the target prefers, while drawn
            ones pass unchecked, and a check of these is another algorithm.

    Returns:
        `asr`, the mean in [0, 1] of the prompts' shares of payloads; `interval` [low, high], 95 %; `n`, the number of
        prompts; `samples` of each; `temperature`; `labels` {label: share of all drawn answers}. None where none are to
        be drawn, or the decoding has no meaning for them.

    Raises:
        LabError: see `answers`.
    """
    evaluation, n = profile.evaluation, len(trial.triggered)
    if not evaluation.samples or (decoding is not None and decoding.greedy_only):
        return None
    asked, sampling = trial.triggered * evaluation.samples, Sampling(evaluation.temperature, SEED)
    drawn = answers(model, prompt_format, asked, profile, decided, decoding, sampling)
    rates = asr_rates(drawn, [example.output for example in asked], trial.markers)
    return {
        "asr": rates["asr"],
        "interval": list(wilson(n * rates["asr"], n)),
        "n": n,
        "samples": evaluation.samples,
        "temperature": evaluation.temperature,
        "labels": rates["labels"],
    }
