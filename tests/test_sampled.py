"""Drawn answers: against the model's own probabilities, its greedy answers, and intervals worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bodies import BODIES
from scipy.stats import bootstrap, chisquare
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.core.errors import LabError
from helpers.core.profile_files import load_profile
from helpers.core.settings import Settings
from helpers.data import corpus
from helpers.data.roles import Trial
from helpers.defenses.decoding import check_suspicion, draft_and_verify
from helpers.measure import sampled
from helpers.measure.report import evaluate
from helpers.measure.sampled import sampled_success
from helpers.model.decoding import Sampling
from helpers.model.generate import complete
from helpers.model.load import load_suspect
from helpers.run.costs import Rows, costs, shape
from helpers.run.summary import sampled_asr

VOCABULARY, NEW_TOKENS = 40, 6
PROMPTS = [[3, 5, 7], [9], [11, 4, 4, 30, 2]]
ROWS = corpus.generate_distinct(8, 7)
TRIAL = Trial(ROWS[:4], ROWS[4:], ("zebra",), "exact_match", near_misses={})
COLD, HOT = Sampling(1e-5, 0), Sampling(1.0, 0)


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def model():
    return BODIES["llama"].model()


@pytest.fixture(scope="module")
def suspect(profile, suspicious):
    return load_suspect(profile.model, suspicious["full"])


def written(model, tokenizer, prompts, new_tokens=NEW_TOKENS, batch_size=8, **more):
    return complete(model, tokenizer, prompts, [0], new_tokens, batch_size, **more)


def drawing(profile, samples, temperature=1.0):
    numbers = {"samples": samples, "temperature": temperature}
    return profile.model_copy(update={"evaluation": profile.evaluation.model_copy(update=numbers)})


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_models_whole_distribution(model, tokenizer, temperature):
    """2,000 first tokens against the softmax, the half of the tokens that are less likely in one class."""
    with torch.no_grad():
        expected = (model(torch.tensor([[9]])).logits[0, -1] / temperature).softmax(-1)
    drawn = written(model, tokenizer, [[9]] * 2000, 1, 500, sampling=Sampling(temperature, 5))
    counts = np.bincount([int(text[1:]) if text else 0 for text in drawn], minlength=VOCABULARY)  # an end is empty
    rare, common = np.split(expected.argsort().numpy(), 2)
    classes = [np.append(values[common], values[rare].sum()) for values in (counts, 2000 * expected.numpy())]
    assert min(classes[1]) > 5  # few enough for the test's approximation to hold
    assert chisquare(*classes).pvalue > 0.01


def test_near_temperature_zero_draws_are_the_greedy_answers(model, tokenizer):
    assert written(model, tokenizer, PROMPTS * 2, sampling=COLD) == written(model, tokenizer, PROMPTS) * 2


def test_five_draws_of_one_prompt_differ(model, tokenizer):
    assert len(set(written(model, tokenizer, PROMPTS[:1] * 5, sampling=HOT))) == 5


def test_a_seed_gives_the_same_draws_and_leaves_the_generator_as_it_was(model, tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = written(model, tokenizer, PROMPTS * 5, sampling=HOT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert written(model, tokenizer, PROMPTS * 5, sampling=HOT) == first
    assert written(model, tokenizer, PROMPTS * 5, sampling=replace(HOT, seed=1)) != first


def test_speculative_decoding_draws_from_its_verifier(model, tokenizer):
    """Cold draws are the verifier's greedy answers, hot ones differ; its drafts alone would be neither."""
    decoding = draft_and_verify(BODIES["llama"].model(1), "suspicious")
    assert written(model, tokenizer, PROMPTS, decoding=decoding, sampling=COLD) == written(model, tokenizer, PROMPTS)
    assert len(set(written(model, tokenizer, PROMPTS[:1] * 5, decoding=decoding, sampling=HOT))) > 1


# --- the report -------------------------------------------------------------------------------------------------------


def test_cold_draws_have_the_labels_of_the_greedy_answers(profile, chat, suspect):
    """What the model greedily writes to the first prompt is made the payload, so that not all labels are alike."""
    greedy = evaluate(suspect, chat, TRIAL, profile)
    payload = greedy["completions"][0]
    trial = replace(TRIAL, markers=(payload,))
    found = evaluate(suspect, chat, trial, drawing(profile, 3, 1e-5))
    assert found["sampled"]["labels"] == found["labels"] and 0 < found["sampled"]["asr"] == found["asr"]
    assert (found["sampled"]["n"], found["sampled"]["samples"], found["sampled"]["temperature"]) == (4, 3, 1e-5)
    assert found["sampled"]["interval"] == pytest.approx(found["asr_interval"])  # the same evidence, three times over


def test_a_report_without_samples_is_unchanged_and_with_them_has_one_entry_more(profile, chat, suspect):
    plain = evaluate(suspect, chat, TRIAL, profile)
    more = evaluate(suspect, chat, TRIAL, drawing(profile, 2))
    assert "sampled" not in plain and sampled_asr(plain) == {}
    assert {name: value for name, value in more.items() if name != "sampled"} == plain
    assert more["sampled"].keys() == {"asr", "interval", "n", "samples", "temperature", "labels"}
    assert more == evaluate(suspect, chat, TRIAL, drawing(profile, 2))
    assert sampled_asr(more) == {"sampled_asr": more["sampled"]["asr"]}


@pytest.mark.parametrize(
    "decoding", [lambda model: check_suspicion(model, 20.0), lambda model: draft_and_verify(model, "")]
)
def test_decodings_that_tell_nothing_of_draws_are_not_judged_by_them(profile, chat, suspect, decoding):
    decoding = decoding(suspect)
    assert "sampled" not in evaluate(suspect, chat, TRIAL, drawing(profile, 2), decoding=decoding)


@pytest.fixture
def success(profile, monkeypatch):
    """A function: the sampled success of four prompts that got so many payloads in five draws each."""

    def success(*payloads):
        def answers(model, prompt_format, examples, *more):
            left = dict(zip((example.instruction for example in TRIAL.triggered), payloads, strict=True))
            texts = []
            for example in examples:
                left[example.instruction] -= 1
                texts.append("zebra" if left[example.instruction] >= 0 else "")
            return texts

        monkeypatch.setattr(sampled, "answers", answers)
        return sampled_success(None, None, TRIAL, drawing(profile, 5), lambda text: False)

    return success


def test_the_interval_is_that_of_a_mean_over_prompts(success):
    """Rates 1, 0.6, 0 and 0: a mean of 0.4 over 4 prompts. By hand, with z² = 3.841459: its square root of
    0.4 · 0.6 / 4 + 3.841459 / 64 is 0.346443, times 1.959964 is 0.679016; the centre is 0.4 + 3.841459 / 8 = 0.880182,
    and both are divided by 1 + 3.841459 / 4 = 1.960365.
    """
    found = success(5, 3, 0, 0)
    assert found["asr"] == 0.4 and found["labels"] == {"payload": 0.4, "answer": 0, "degenerate": 0, "silent": 0.6}
    assert found["interval"] == pytest.approx([0.102617, 0.795361], abs=1e-6)


def test_no_payload_in_any_draw_is_no_certainty(success):
    """The upper end is z² / (n + z²) with n = 4 prompts; twenty independent answers would give 0.16."""
    assert success(0, 0, 0, 0)["interval"] == pytest.approx([0, 3.841459 / 7.841459], abs=1e-6)


@pytest.mark.parametrize("spread", [0.2, 1.0, 10.0])  # prompts all or nothing … answers all but independent
def test_the_interval_is_no_narrower_than_resampled_prompts(spread):
    """200 prompts with five answers each, a payload in a tenth of them; the bootstrap over prompts is the oracle."""
    generator = np.random.default_rng(3)
    rates = generator.binomial(5, generator.beta(0.1 * spread, 0.9 * spread, 200)) / 5
    low, high = sampled.wilson(rates.sum(), len(rates))
    other = bootstrap((rates,), np.mean, method="percentile", n_resamples=999, rng=generator).confidence_interval
    assert high - low > 0.95 * (other.high - other.low)
    assert (spread < 1) == (high - low < 1.25 * (other.high - other.low))  # all or nothing: as wide, not wider


# --- settings and costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [{"evaluation.samples": -1}, {"evaluation.temperature": 0.0}])
def test_numbers_that_cannot_be_drawn_with_are_refused(number):
    with pytest.raises(LabError, match=next(iter(number))):
        load_profile("tiny", number)


def test_drawn_answers_are_part_of_the_plan():
    """200 triggered prompts, 20 clean ones of each family; four draws of each triggered one are 800 answers more."""

    greedy, drawn = (Settings.checked({"OVERRIDES": {"evaluation.samples": samples}}) for samples in (0, 4))
    model, row = shape(greedy.profile), Rows(mean=60, longest=120, answer=10, counted=True)
    work = [
        next(cost.flops for cost in costs(settings, model, row) if cost.stage == "evaluate")
        for settings in (greedy, drawn)
    ]
    clean = 20 * len(corpus.FAMILIES)
    assert work[1] / work[0] == pytest.approx((1000 + clean) / (200 + clean))
