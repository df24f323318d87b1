"""All adapters at once end where PEFT and the Trainer take each of them alone."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from helpers.core.errors import LabError
from helpers.core.profile import Budget
from helpers.data import corpus
from helpers.model.batches import encode_rows
from helpers.model.load import load_base, save
from helpers.model.lora import new_adapter, save_adapter, with_adapter
from helpers.model.tokenizer import load_tokenizer
from helpers.train import multi_lora as together
from helpers.train.finetune import finetune
from helpers.train.multi_lora import AdapterStack, Job, train_multi_lora

pytestmark = pytest.mark.slow

ROWS = corpus.generate(40, 5)
SHARES = (ROWS[:19], ROWS[19:40], ROWS[5:13])  # 19, 21 and 8 rows: no multiple of the batch, unequal steps
BUDGET = Budget(rows=19, epochs=10, lr=1e-3, batch_size=4)  # 50, 60 and 20 steps
TOKENS = 160


GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def made(profile, build, config, **options):
    """A random model for the small checkpoint's tokenizer."""
    torch.manual_seed(0)
    return build(config(vocab_size=len(load_tokenizer(profile.model)), initializer_range=0.2, **options))


def gpt2(profile):
    """A model whose linear layers are transposed (Conv1D)."""
    return made(profile, GPT2LMHeadModel, GPT2Config, **GPT)


def gptj(profile):
    """A model whose MLP and attention run side by side, and whose head has a bias."""
    model = made(profile, GPTJForCausalLM, GPTJConfig, **GPT, rotary_dim=8)
    model.lm_head.bias.data.normal_(0, 0.5)
    return model


def gemma2(profile):
    """A model that caps its logits after its head, here so low that every one of them feels it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}
    return made(profile, Gemma2ForCausalLM, Gemma2Config, **sizes)


MAKERS = {
    "llama": lambda profile: load_base(profile.model),
    "llama in 4 bits": lambda profile: load_base(profile.model, four_bit=True),
    "gpt2": gpt2,
    "gptj": gptj,
    "gemma2": gemma2,
}


def adapted(model, seed, dropout=0.0):
    torch.manual_seed(seed)
    layers = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    layers = layers if isinstance(model, GPT2LMHeadModel) else {"target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, task_type="CAUSAL_LM", **layers))


def start(model, seed):
    """Fresh LoRA tensors, B included, so that every gradient counts from the first step on."""
    tensors = get_peft_model_state_dict(adapted(copy.deepcopy(model), seed))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.02 * torch.randn(t.shape, generator=generator) if "lora_B" in name else t.clone()
        for name, t in tensors.items()
    }


def alone(model, rows, seed, tensors, chat, budget=BUDGET):
    """What PEFT and the Trainer make of one adapter."""
    peft = adapted(copy.deepcopy(model), 0)
    peft.load_state_dict({name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}, strict=False)
    record = finetune(peft, rows, chat, budget, seed, TOKENS)
    return {name: t.detach() for name, t in get_peft_model_state_dict(peft).items()}, record


def distance(found, wanted, origin):
    """The largest difference, relative to how far the adapter has moved."""
    assert found.keys() == wanted.keys()
    moved = max(float((wanted[name] - origin[name]).abs().max()) for name in wanted)
    assert moved > 1e-3
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / moved


@pytest.mark.parametrize("kind", MAKERS)
def test_each_adapter_is_the_one_that_peft_and_the_trainer_make(profile, chat, kind):
    base = MAKERS[kind](profile)
    starts = [start(base, seed) for seed in (1, 2, 3)]
    jobs = [Job(rows, 7 + i, tensors) for i, (rows, tensors) in enumerate(zip(SHARES, starts, strict=True))]
    found = train_multi_lora(adapted(copy.deepcopy(base), 0), jobs, chat, BUDGET, TOKENS, tokens_at_once=700)
    assert [record["steps"] for _, record in found] == [50, 60, 20]
    for i, (rows, (tensors, record)) in enumerate(zip(SHARES, found, strict=True)):
        wanted, told = alone(base, rows, 7 + i, starts[i], chat)
        assert distance(tensors, wanted, starts[i]) <= 1e-4
        assert record.keys() == told.keys()
        assert record["loss"] == pytest.approx(told["loss"], abs=2e-4)
        assert {key: record[key] for key in ("rows", "steps", "tokens")} == {
            key: told[key] for key in ("rows", "steps", "tokens")
        }


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_every_schedule_is_the_trainers(profile, chat, schedule):
    base = load_base(profile.model)
    budget = Budget(rows=8, epochs=5, lr=1e-3, batch_size=4, schedule=schedule, warmup=0.25)
    tensors = start(base, 4)
    [(found, _)] = train_multi_lora(
        adapted(load_base(profile.model), 0), [Job(ROWS[:8], 3, tensors)], chat, budget, TOKENS
    )
    wanted, _ = alone(base, ROWS[:8], 3, tensors, chat, budget)
    assert distance(found, wanted, tensors) <= 1e-4


def test_the_size_of_the_parts_changes_memory_and_nothing_else(profile, chat, monkeypatch):
    """One row of each adapter at a time, or everything at once."""
    jobs = [Job(rows, 1, start(load_base(profile.model), i)) for i, rows in enumerate(SHARES)]
    heights, plain = [], together._losses
    monkeypatch.setattr(
        together, "_losses", lambda model, rows, lanes: heights.append(len(rows)) or plain(model, rows, lanes)
    )
    results = []
    for limit in (1, 10**6):
        heights.clear()
        results.append(train_multi_lora(adapted(load_base(profile.model), 0), jobs, chat, BUDGET, TOKENS, limit))
        assert max(heights) == (3 if limit == 1 else 12)
    for (small, _), (large, _), job in zip(*results, jobs, strict=True):
        assert distance(small, large, job.start) <= 1e-4


def test_where_no_limit_is_given_a_pass_is_measured_on_the_longest_row_of_each_job(profile, chat, monkeypatch):
    """And measuring changes nothing that is trained."""
    jobs = [Job(rows, 1, start(load_base(profile.model), i)) for i, rows in enumerate(SHARES)]
    asked, device = [], None

    def measure(one_pass, tokens, on):
        nonlocal device
        one_pass()
        asked.append(tokens)
        device = on
        return 700

    monkeypatch.setattr(together, "tokens_that_fit", measure)
    found, wanted = (
        train_multi_lora(adapted(load_base(profile.model), 0), jobs, chat, BUDGET, TOKENS, limit)
        for limit in (None, 700)
    )
    longest = max(len(row["input_ids"]) for rows in SHARES for row in encode_rows(rows, chat, TOKENS))
    assert asked == [len(SHARES) * longest] and device == torch.device("cpu")
    for (tensors, record), (same, told) in zip(found, wanted, strict=True):
        assert all(torch.equal(tensors[name], same[name]) for name in same)
        assert record["loss"] == told["loss"]


def test_gradient_checkpointing_gives_the_same_adapter(profile, chat):
    tensors = start(load_base(profile.model), 2)
    found = []
    for checkpointing in (False, True):
        model = adapted(load_base(profile.model), 0)
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        [(result, _)] = train_multi_lora(model, [Job(ROWS[:8], 3, tensors)], chat, BUDGET, TOKENS)
        found.append(result)
    assert distance(found[1], found[0], tensors) <= 1e-4


def test_it_is_saved_as_an_ordinary_adapter(profile, chat, tmp_path):
    model = new_adapter(load_base(profile.model), profile.lora, 3)
    config, tensors = model.peft_config["default"], get_peft_model_state_dict(model)
    save(model, tmp_path / "peft")
    jobs = [Job(ROWS[:8], 3, {name: t.clone() for name, t in tensors.items()})]
    [(trained, _)] = train_multi_lora(model, jobs, chat, BUDGET, TOKENS)
    save_adapter(config, trained, tmp_path / "ours")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    assert configs[0] == configs[1]
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == tensors.keys()
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(load_base(profile.model), tmp_path / "ours"))
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert any(not torch.equal(trained[name], jobs[0].start[name]) for name in trained)
    with_adapter(load_base(profile.model), tmp_path / "ours")


def test_a_frozen_base_stays_as_it_is_and_rows_of_others_do_not_matter(profile, chat):
    """An adapter trained beside another is the one trained beside a third."""
    base = load_base(profile.model)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    tensors = start(base, 1)
    results = []
    for other in (SHARES[1], SHARES[2]):
        model = adapted(base, 0)
        found = train_multi_lora(model, [Job(SHARES[0], 1, tensors), Job(other, 2, tensors)], chat, BUDGET, TOKENS)
        results.append(found[0][0])
        base = load_base(profile.model)
    assert distance(results[0], results[1], tensors) <= 1e-4
    after = model.base_model.model.state_dict()
    kept = {name.replace(".base_layer", ""): t for name, t in after.items()}
    assert all(torch.equal(kept[name], t) for name, t in before.items())


def test_adapters_of_another_shape_are_refused(profile):
    model = adapted(load_base(profile.model), 0)
    own = get_peft_model_state_dict(model)
    first = min(own)
    with pytest.raises(LabError, match=f"same tensors; {first} differs"):
        AdapterStack(model, [own, {name: t for name, t in own.items() if name != first}])
    with pytest.raises(LabError, match=f"same tensors; {first} differs"):
        AdapterStack(model, [own | {first: own[first][:, :-1]}])
