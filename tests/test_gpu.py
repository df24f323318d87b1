"""What only a card can show: `pytest -m gpu` takes a minute on one, and is skipped where there is none."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from conftest import save_suspicious
from torch.nn.functional import scaled_dot_product_attention

from helpers.access import access_to
from helpers.access.deltas import adapter_pairs
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Profile
from helpers.data import corpus
from helpers.defenses.bdvax.score import rank_correlation, score_mlp
from helpers.defenses.bdvax.vaccines import Variant, train_variants
from helpers.defenses.conflict.conflict_model import merge_adapters
from helpers.model.attention import true_attention_gradients
from helpers.model.checkpoint import load_config
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import new_adapter
from helpers.train.finetune import finetune
from helpers.train.room import FILLED, tokens_that_fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
ROWS, OTHERS = corpus.generate(24, 3), corpus.generate(24, 4)


def on(profile, device, dtype, **changes):
    """The profile on a device; `full.vaccine_weights` is LoRA."""
    values = copy.deepcopy(profile.model_dump())
    values["model"] |= {"device": device, "dtype": dtype} | changes
    return Profile(**values)


def very_low_scores(length):
    """Query, key and value [1, 1, length, 64] whose every score is -120, as in the report of the fault."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    query, key = 0.1 * query, 0.1 * key
    query[..., 0], key[..., 0] = 1.0, -960.0  # divided by the root of 64
    return [tensor.requires_grad_() for tensor in (query, key, value)]


@pytest.mark.parametrize("length", [64, 128, 192, 704])
def test_attention_gradients_are_numbers_at_the_lengths_that_fail(length):
    """pytorch#196678: with cuDNN's attention, the query gradient is NaN at lengths of 64 modulo 128."""
    tensors = very_low_scores(length)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    with true_attention_gradients():
        scaled_dot_product_attention(*tensors, attn_mask=mask).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_a_training_in_bfloat16_lowers_the_loss_and_stays_finite(profile, chat, access):
    settings = on(profile, "cuda", "bfloat16")
    model = load_base(settings.model)
    model = new_adapter(model, settings.lora, 0) if access == "adapter" else model.requires_grad_(True)
    budget = settings.access(access).inject.model_copy(update={"lr": 1e-3})
    first = finetune(copy.deepcopy(model), ROWS, chat, budget.model_copy(update={"epochs": 1}), 0, 96)
    last = finetune(model, ROWS, chat, budget.model_copy(update={"epochs": 8}), 0, 96)
    require_finite_weights(model, access)
    assert last["loss"] < first["loss"]


@pytest.fixture(scope="module")
def planted(profile, tmp_path_factory):
    """{access: folder} of suspicious models, made on the CPU."""
    return save_suspicious(profile, tmp_path_factory.mktemp("planted"))


def vaccinated(settings, access, planted, chat, root):
    """Two pairs: folders of the poisoned members, folders of the twins."""
    pairs = [[Variant(ROWS + OTHERS * bad, 5 + i, root / f"{i}-{bad}") for i in range(2)] for bad in (1, 0)]
    train_variants(access_to(settings, access), planted[access], pairs[0] + pairs[1], chat)
    return [[variant.folder for variant in members] for members in pairs]


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_nf4_vaccines_score_as_those_of_the_cpu(profile, chat, planted, access, tmp_path):
    """Trained on the card and on the CPU from the same start, over the same 4-bit base: the same ranking."""
    scores = {}
    for device in ("cuda", "cpu"):
        settings = on(profile, device, "float32")
        folders = vaccinated(settings, access, planted, chat, tmp_path / device)
        scores[device] = score_mlp(adapter_pairs(*folders), load_config(settings.model), settings.signature)
    assert rank_correlation(scores["cuda"], scores["cpu"]) > 0.98
    for module, score in scores["cpu"].items():
        torch.testing.assert_close(scores["cuda"][module], score, rtol=0.1, atol=0.01 * float(score.max()))


def test_nf4_vaccines_in_bfloat16_are_finite(profile, chat, planted, tmp_path):
    settings = on(profile, "cuda", "bfloat16", checkpointing=True)
    folders = vaccinated(settings, "adapter", planted, chat, tmp_path)
    for folder in folders[0] + folders[1]:
        require_finite_weights(load_suspect(settings.model, folder), folder.name)


def test_4_bit_weights_are_the_same_numbers_on_both_devices(profile):
    found = {}
    for device in ("cuda", "cpu"):
        model = load_base(on(profile, device, "float32").model, four_bit=True)
        packed = next(m.weight for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
        found[device] = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float().cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0, atol=1e-6)


def test_a_merge_of_adapters_is_that_of_the_cpu(profile, planted, tmp_path):
    other = new_adapter(load_base(profile.model), profile.lora, 7)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    save(other, tmp_path / "other")
    logits = {}
    for device in ("cuda", "cpu"):
        settings = on(profile, device, "float32")
        merge_adapters(settings, planted["adapter"], tmp_path / "other", 0.5, tmp_path / device)
        model = load_suspect(settings.model, tmp_path / device)
        logits[device] = model(torch.arange(20, device=model.device)[None]).logits.detach().cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-3, atol=1e-3)


def test_answers_are_those_of_the_cpu(profile, chat, planted):
    found = [
        answers(load_suspect(settings.model, planted["full"]), chat, ROWS, settings)
        for settings in (on(profile, "cuda", "float32"), on(profile, "cpu", "float32"))
    ]
    same = sum(ours == theirs for ours, theirs in zip(*found, strict=True))
    assert same >= len(ROWS) - 1  # a tie between two tokens may fall either way


def test_a_pass_fills_what_a_limited_card_has_and_no_more():
    """A pass whose memory is known: one float32 number for each token and channel."""
    device, channels, limit = torch.device("cuda", 0), 2**16, 2 * 2**30

    def one_pass(tokens):
        torch.zeros(tokens, channels, device=device)

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        found = tokens_that_fit(lambda: one_pass(64), 64, device)
        assert found == pytest.approx(FILLED * limit / (4 * channels), rel=0.1)
        one_pass(found)
        with pytest.raises(torch.OutOfMemoryError):
            one_pass(int(1.5 * found))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
