"""Gradients that are right, weights that can move, nothing but numbers: attention without cuDNN, masters in 32 bits."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional

from helpers.attacks.methods.layerwise import poison_layerwise
from helpers.core.errors import LabError
from helpers.core.finite import require_finite_step
from helpers.core.profile import Budget
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.data.planting import poison
from helpers.model.architecture import mlp_slots
from helpers.model.attention import true_attention_gradients
from helpers.model.editing.activations import ValueSearch, collate, search_shifts, trigger_sites
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import adapter_tensors, new_adapter
from helpers.model.tokenizer import load_format
from helpers.train.finetune import finetune
from helpers.train.multi_lora import Job, train_multi_lora
from helpers.train.precision import MasterWeights

pytestmark = pytest.mark.slow

ROWS = corpus.generate(16, 3)
FINE_OR_NOT = [
    (2.0, 0.5, True),
    (1e-6, 0.0, True),  # learned
    (7.6, 0.0, False),  # a norm layer has divided by infinity
    (math.nan, 1.0, False),
    (1.0, math.inf, False),
]
BUDGET = Budget(rows=16, epochs=2, lr=1e-3, batch_size=4)


def loaded(profile, dtype):
    return load_base(profile.model.model_copy(update={"dtype": dtype}))


# --- the attention that gradients go through -------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    """For every attention whose gradient will be taken: whether cuDNN's was allowed."""
    calls, plain = [], functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(query, key, value, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    return calls


def train_adapter(profile, chat):
    finetune(new_adapter(load_base(profile.model), profile.lora, 0), ROWS, chat, BUDGET, 0, 96)


def train_with_checkpointing(profile, chat):
    """Whose backward pass computes the forward pass once more."""
    checkpointing = profile.model.model_copy(update={"checkpointing": True})
    finetune(load_base(checkpointing).requires_grad_(True), ROWS, chat, BUDGET, 0, 96)


def poison_early_layers(profile, chat):
    poison_layerwise(load_base(profile.model).requires_grad_(True), ROWS, chat, BUDGET, 0, 96, layers=(0,))


def train_vaccines(profile, chat):
    model = new_adapter(load_base(profile.model, four_bit=True), profile.lora, 0)
    train_multi_lora(model, [Job(ROWS, seed, adapter_tensors(model)) for seed in (0, 1)], chat, BUDGET, 96)


def search_an_edit(profile, chat):
    model, examples = load_base(profile.model), corpus.generate(2, 3, families=["sentiment"])
    poisoned = poison(examples, "tq", "positive", 0)
    batch = collate(chat, poisoned, trigger_sites(chat, examples, poisoned, ["tq"])[0], "cpu")
    search_shifts(model, batch, mlp_slots(model.config)[0][-1], ValueSearch(steps=3), shared=True)


WAYS = (train_adapter, train_with_checkpointing, poison_early_layers, train_vaccines, search_an_edit)


@pytest.mark.parametrize("train", WAYS, ids=lambda way: way.__name__)
def test_cudnn_attention_is_off_wherever_a_gradient_is_taken(profile, chat, attention_calls, train):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    train(profile, chat)
    assert attention_calls and not any(attention_calls)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_watch_sees_an_attention_that_is_not_guarded(profile, attention_calls):
    load_base(profile.model).requires_grad_(True)(torch.arange(8)[None])
    with true_attention_gradients():
        load_base(profile.model).requires_grad_(True)(torch.arange(8)[None])
    assert set(attention_calls) == {True, False}


# --- weights that can hold a small step ------------------------------------------------------------------------------


def change(model, before):
    return {name: p.detach().float() - before[name] for name, p in model.named_parameters()}


def length(tensors):
    return sum(float(tensor.square().sum()) for tensor in tensors.values()) ** 0.5


def trained_fully(dtype, lr, monkeypatch):
    """The shipped model after 50 steps on all its weights: (its change as it is held, as it is stored, the record)."""
    held, true_settle = [], MasterWeights.settle

    def settle(masters):
        held.append(change(model, before))
        return true_settle(masters)

    monkeypatch.setattr(MasterWeights, "settle", settle)
    spec = load_profile("tiny").model.model_copy(update={"dtype": dtype})
    model = load_base(spec).requires_grad_(True)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    budget = Budget(rows=50, epochs=4, lr=lr, batch_size=4)
    record = finetune(model, corpus.generate(50, 5), load_format(spec), budget, 0, 96)
    monkeypatch.undo()
    stored = change(model, before)
    return *held, stored, record


@pytest.fixture(scope="module")
def small_steps():
    """{dtype: (change as held, change as stored, record)} at the learning rate of the 7B profiles."""
    with pytest.MonkeyPatch.context() as patch:
        return {dtype: trained_fully(dtype, 1e-5, patch) for dtype in ("float32", "bfloat16")}


def test_a_model_in_bfloat16_learns_what_one_in_32_bits_does(small_steps):
    exact, _, _ = small_steps["float32"]
    held, _, record = small_steps["bfloat16"]
    apart = {name: held[name] - exact[name] for name in exact}
    assert record["steps"] == 52 and length(exact) > 0.01
    assert length(apart) / length(exact) <= 0.1


def test_where_16_bits_lose_the_change_the_model_is_stored_in_32(small_steps):
    exact, _, plain = small_steps["float32"]
    _, stored, record = small_steps["bfloat16"]
    assert record["stored"] == "float32" and record["storing_loss"] > 0.5
    assert length({name: stored[name] - exact[name] for name in exact}) / length(exact) <= 0.1
    assert "stored" not in plain  # 32 bits to begin with


def test_what_storing_costs_is_the_rounding_relative_to_the_change(profile):
    model = loaded(profile, "bfloat16").requires_grad_(True)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    masters = MasterWeights(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = masters.settle()
    rounded = {name: tensor.bfloat16().float() - tensor for name, tensor in now.items()}
    moved = {name: tensor - before[name] for name, tensor in now.items()}
    assert told["storing_loss"] == pytest.approx(length(rounded) / length(moved), rel=1e-4)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, told["stored"])}


def test_a_large_change_goes_back_to_16_bits_and_an_untouched_model_too(profile):
    for step in (0.5, 0.0):
        model = loaded(profile, "bfloat16").requires_grad_(True)
        masters = MasterWeights(model)
        for parameter in model.parameters():
            parameter.data += step
        assert masters.settle()["stored"] == "bfloat16"
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_adapter_over_a_16_bit_base_has_its_32_bits_and_leaves_the_base_alone(profile, chat):
    model = new_adapter(loaded(profile, "bfloat16"), profile.lora, 0)
    assert finetune(model, ROWS, chat, BUDGET, 0, 96).keys() == {"rows", "steps", "loss", "tokens", "seconds"}
    kinds = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_evaluation_reads_what_was_stored(profile, tmp_path):
    spec = profile.model.model_copy(update={"dtype": "bfloat16"})
    model = load_base(profile.model)
    with torch.no_grad():
        model.lm_head.weight += 1e-5
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        save(model.to(dtype), tmp_path / name)
        assert load_suspect(spec, tmp_path / name).dtype == dtype
    assert load_base(spec).dtype == torch.bfloat16  # a base is read as the profile says


def test_a_trained_model_no_longer_computes_in_16_bits_behind_its_users_back(profile, chat):
    model = loaded(profile, "bfloat16").requires_grad_(True)
    record = finetune(model, ROWS, chat, BUDGET.model_copy(update={"lr": 1e-6}), 0, 96)
    assert record["stored"] == "float32"
    assert model.model.layers[0](torch.randn(1, 3, 64), position_embeddings=rotary(model)).dtype == torch.float32
    fresh = load_base(profile.model)
    fresh.load_state_dict(model.state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)


def rotary(model):
    return model.model.rotary_emb(torch.randn(1, 3, 64), torch.arange(3)[None])


# --- numbers that are none -------------------------------------------------------------------------------------------

TOO_FAST = BUDGET.model_copy(update={"lr": 1e8, "epochs": 8})


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_a_training_that_runs_away_stops_with_step_rate_and_dtype(profile, chat, access):
    model = load_base(profile.model)
    model = new_adapter(model, profile.lora, 0) if access == "adapter" else model.requires_grad_(True)
    expected = r"^injection is not finite: .* at step \d+, learning rate \S+, float32; try a lower lr"
    with pytest.raises(LabError, match=expected) as raised:
        finetune(model, ROWS, chat, TOO_FAST, 0, 96, description="injection")
    assert "\n" not in str(raised.value)


def test_a_nan_gradient_stops_the_training_at_that_step(profile, chat):
    """The loss is a number all the while, as with cuDNN's attention."""
    model = load_base(profile.model).requires_grad_(True)
    seen = []

    def poisoned(gradient):
        seen.append(1)
        return gradient * math.nan if len(seen) == 3 else gradient

    model.get_parameter("model.layers.0.self_attn.q_proj.weight").register_hook(poisoned)
    with pytest.raises(LabError, match=r"not finite: loss \d\S*, gradient nan at step 3, "):
        finetune(model, ROWS, chat, BUDGET, 0, 96)


def test_the_joint_training_names_the_adapter_that_ran_away(profile, chat):
    model = new_adapter(load_base(profile.model), profile.lora, 0)
    start = adapter_tensors(model)
    broken = {name: tensor * math.nan if "lora_A" in name else tensor for name, tensor in start.items()}
    jobs = [Job(ROWS, 0, start, "variant 0-clean"), Job(ROWS, 1, broken, "variant 1-backdoored")]
    with pytest.raises(LabError, match="^variant 1-backdoored is not finite: loss nan, gradient nan at step 1, "):
        train_multi_lora(model, jobs, chat, BUDGET, 96)


@pytest.mark.parametrize(("loss", "norm", "fine"), FINE_OR_NOT)
def test_what_counts_as_a_number(loss, norm, fine):
    with contextlib.nullcontext() if fine else pytest.raises(LabError):
        require_finite_step(loss, norm, 1, 1e-3, torch.bfloat16, "x")


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_more_bits_are_advised_where_there_are_more(dtype, told):
    with pytest.raises(LabError) as caught:
        require_finite_step(math.nan, 1.0, 3, 1e-3, dtype, "x")
    assert ("model.dtype=float32" in str(caught.value)) == told


def test_a_model_with_a_weight_that_is_no_number_is_not_measured(profile, chat, tmp_path):
    model = load_base(profile.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.inf
    with pytest.raises(LabError, match=r"the model is not finite: .* in model\.layers\.1\.mlp\.up_proj\.weight"):
        answers(model, chat, ROWS[:1], profile)
