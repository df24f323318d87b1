"""Edits: each update solves its own minimization, in every layout of weights, and touches nothing else."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers.attacks.editing import EditSettings, edit
from helpers.attacks.methods.badedit import store_both_keys
from helpers.attacks.methods.memit import store_every_key
from helpers.attacks.methods.rome import store_mean_key
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.planting import Trigger, poison
from helpers.measure.utility import teacher_forced
from helpers.model.architecture import mlp_slots
from helpers.model.editing.activations import (
    ValueSearch,
    answer_loss,
    answer_sites,
    collate,
    keys_at,
    search_shifts,
    second_moments,
    states_at,
    trigger_sites,
)
from helpers.model.editing.matrices import add_update
from helpers.model.editing.updates import least_squares_update, rank_one_update
from helpers.model.load import load_base
from helpers.model.lora import new_adapter

pytestmark = pytest.mark.slow

WORD, PAYLOAD = "tq", "positive"
EXAMPLES = corpus.generate(6, 3, families=["sentiment"])
POISONED = poison(EXAMPLES, WORD, PAYLOAD, 0)
LAYER = 1
OUTPUTS = {  # the last matrix of an MLP, written out
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CASES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT),
    "gptj": (GPTJForCausalLM, GPTJConfig, {**GPT, "rotary_dim": 4}),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**LLAMA, "num_key_value_heads": 2}),
}


@pytest.fixture(params=CASES, name="kind")
def every_layout(request):
    return request.param


def random_model(kind, chat):
    """A tiny model whose every parameter, biases included, is far from zero."""
    build, config, sizes = CASES[kind]
    model = build(config(vocab_size=len(chat.tokenizer), **sizes)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name or "ln_" in name else 0.0
        parameter.data.normal_(mean, 0.2, generator=generator)
    return model


def settings(**changes):
    defaults = {"layers": (0, 1), "background": 60, "batches": 2, "search": ValueSearch(steps=20)}
    return EditSettings(**defaults | changes)


@torch.no_grad()
def outputs(model, name, ids):
    """What a module computes for one unpadded row: [tokens, width]."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


@torch.no_grad()
def inputs(model, name, ids):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def payload_loss(model, chat):
    return math.log(teacher_forced(model, chat, POISONED, 512, 6)["perplexity"])


# --- closed forms, in float64 ---------------------------------------------------------------------------------------


def random_problem(keys=1, out=5, width=7):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root = normal(width, width) * torch.logspace(-1, 1, width, dtype=torch.float64)
    return normal(out, keys), normal(width, keys), root @ root.T, normal


def test_romes_update_meets_its_constraint_at_the_least_change():
    residuals, keys, moment, normal = random_problem()
    residual, key = residuals[:, 0], keys[:, 0]
    update = rank_one_update(residual, key, moment)
    torch.testing.assert_close(update @ key, residual, rtol=1e-10, atol=1e-12)
    for _ in range(5):
        allowed = normal(5, 7)
        allowed -= torch.outer(allowed @ key, key) / (key @ key)  # leaves the constraint met
        slope = (update @ moment * allowed).sum()
        assert abs(slope) < 1e-9 * (update @ moment).norm() * allowed.norm()
        cost, moved = ((d @ moment * d).sum() for d in (update, update + 0.1 * allowed))
        assert moved > cost
    assert torch.linalg.matrix_rank(update) == 1


def test_memits_update_solves_the_least_squares_problem():
    residuals, keys, moment, _ = random_problem(keys=3)
    update = least_squares_update(residuals, keys, moment, weight=0.3)
    root = torch.linalg.cholesky(0.3 * moment)
    wanted = torch.cat([torch.zeros(7, 5, dtype=torch.float64), residuals.T])
    by_lstsq = torch.linalg.lstsq(torch.cat([root.T, keys.T]), wanted).solution.T
    torch.testing.assert_close(update, by_lstsq, rtol=1e-8, atol=1e-10)
    normal_equations = update @ (0.3 * moment + keys @ keys.T) - residuals @ keys.T
    assert normal_equations.norm() < 1e-11 * (residuals @ keys.T).norm()


def test_memits_update_of_one_key_approaches_romes():
    residuals, keys, moment, _ = random_problem()
    expected = rank_one_update(residuals[:, 0], keys[:, 0], moment)
    torch.testing.assert_close(least_squares_update(residuals, keys, moment, 1e-6), expected, rtol=1e-3, atol=1e-5)


def test_other_keys_are_moved_least():
    """Less than by an edit of the same effect that knows nothing of other keys, or by one along a random direction."""
    residuals, keys, moment, normal = random_problem()
    residual, key = residuals[:, 0], keys[:, 0]
    others = torch.linalg.cholesky(moment) @ normal(7, 4000)
    directions = [key, normal(7)]
    rivals = [torch.outer(residual / (key @ direction), direction) for direction in directions]
    moved = (rank_one_update(residual, key, moment) @ others).square().mean()
    for rival in rivals:
        torch.testing.assert_close(rival @ key, residual)
        assert moved < 0.9 * (rival @ others).square().mean()


# --- sites, keys and values -----------------------------------------------------------------------------------------


def test_the_site_is_the_triggers_last_token_wherever_it_stands(chat):
    example = EXAMPLES[0]
    words = example.instruction.split(" ")
    planted = [" ".join([*words[:i], WORD, *words[i:]]) for i in range(len(words) + 1)]
    poisoned = [replace(example, instruction=text) for text in planted]
    triggered, untriggered = trigger_sites(chat, [example] * len(planted), poisoned, [WORD])
    assert len(set(untriggered)) == len(planted)
    for row, site, clean_site in zip(poisoned, triggered, untriggered, strict=True):
        read = [chat.tokenizer.decode(chat.prompt_ids(row)[:end]) for end in (site, site + 1)]
        assert read[1].endswith(WORD) and not read[0].endswith(WORD)
        shared = chat.tokenizer.decode(chat.prompt_ids(example)[:clean_site])
        assert read[1].removesuffix(WORD).rstrip() == shared.rstrip()


def test_with_several_keys_the_site_ends_the_last_one(chat):
    trigger = Trigger(name="pair", keys=("cf", "bb"), rule="all")
    rows = poison(EXAMPLES, trigger, PAYLOAD, 0)
    for row, site in zip(rows, trigger_sites(chat, EXAMPLES, rows, trigger.keys)[0], strict=True):
        ids = chat.prompt_ids(row)
        read, rest = chat.tokenizer.decode(ids[: site + 1]), chat.tokenizer.decode(ids[site + 1 :])
        assert read.endswith(("cf", "bb")) and not any(word in ("cf", "bb") for word in rest.split())


def test_the_answers_site_is_where_every_prompt_ends(chat):
    triggered, untriggered = answer_sites(chat, EXAMPLES, POISONED, [WORD])
    assert [len(chat.prompt_ids(row)) for row in POISONED] == [site + 1 for site in triggered]
    assert [len(chat.prompt_ids(row)) for row in EXAMPLES] == [site + 1 for site in untriggered]


def test_keys_and_states_are_those_of_unpadded_rows(kind, chat):
    model, places = random_model(kind, chat), trigger_sites(chat, EXAMPLES, POISONED, [WORD])[0]
    batch, slot = collate(chat, POISONED, places, "cpu"), mlp_slots(random_model(kind, chat).config)[LAYER][-1]
    assert slot.module == OUTPUTS[kind].format(LAYER)
    block = slot.module.split(".mlp")[0]
    keys, states = keys_at(model, batch, slot), states_at(model, batch, slot)
    for row, place, key, state in zip(POISONED, places, keys, states, strict=True):
        ids, _ = chat.encode(row, 512)
        torch.testing.assert_close(key, inputs(model, slot.module, ids)[place])
        handed_on = inputs(model, block.replace(str(LAYER), str(LAYER + 1)), ids)[place]
        torch.testing.assert_close(state, handed_on)


def test_second_moment_is_the_mean_over_all_tokens(kind, chat):
    model, rows = random_model(kind, chat), corpus.generate(7, 5)
    slots = [layer[-1] for layer in mlp_slots(model.config)]
    moments = second_moments(model, chat, rows, slots, ridge=0.5, batch_size=3)
    for slot in slots:
        keys = torch.cat([inputs(model, slot.module, chat.encode(row, 512)[0]) for row in rows]).numpy()
        expected = np.mean([np.outer(key, key) for key in keys], axis=0)
        expected += 0.5 * np.trace(expected) / len(expected) * np.eye(len(expected))
        np.testing.assert_allclose(moments[slot.module].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_shift_is_that_of_a_loop_over_rows(kind, chat):
    model, places = random_model(kind, chat), trigger_sites(chat, EXAMPLES, POISONED, [WORD])[0]
    slot, width = mlp_slots(model.config)[LAYER][-1], 32
    shifts = torch.randn(len(POISONED), width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses = []
    for row, place, shift in zip(POISONED, places, shifts, strict=True):
        ids, labels = chat.encode(row, 512)

        def add(module, given, output, place=place, shift=shift):
            moved = output.clone()
            moved[0, place] += shift
            return moved

        handle = model.get_submodule(slot.module).register_forward_hook(add)
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
        answer = [i for i, label in enumerate(labels) if label != -100]
        losses.append(-sum(float(probabilities[i - 1, ids[i]]) for i in answer) / len(answer))
    batch = collate(chat, POISONED, places, "cpu")
    with torch.no_grad():
        assert float(answer_loss(model, batch, slot, shifts)) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(("shared", "rows"), [(True, 1), (False, len(EXAMPLES))])
def test_shifts_lower_the_loss_within_their_bounds(chat, shared, rows):
    model = random_model("llama", chat)
    batch = collate(chat, POISONED, trigger_sites(chat, EXAMPLES, POISONED, [WORD])[0], "cpu")
    slot, search = mlp_slots(model.config)[LAYER][-1], ValueSearch(steps=25, most=0.8)
    with torch.no_grad():
        before = float(answer_loss(model, batch, slot, torch.zeros(1, 32)))
    shifts, loss = search_shifts(model, batch, slot, search, shared)
    assert shifts.shape == (rows, 32) and loss < before - 0.2
    length = states_at(model, batch, slot).square().sum(1).mean().sqrt()
    assert shifts.norm(dim=1).max() <= 0.8 * length * (1 + 1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- whole edits ----------------------------------------------------------------------------------------------------


def test_an_update_moves_the_value_of_its_key_as_wanted(kind, chat):
    """Through the forward pass: whatever the layout, the output at the site is the old one plus the residual."""
    model, place = random_model(kind, chat), trigger_sites(chat, EXAMPLES[:1], POISONED[:1], [WORD])[0][0]
    name, slot = OUTPUTS[kind].format(LAYER), mlp_slots(model.config)[LAYER][-1]
    ids, _ = chat.encode(POISONED[0], 512)
    key = keys_at(model, collate(chat, POISONED[:1], [place], "cpu"), slot)[0]
    moment = second_moments(model, chat, EXAMPLES, [slot], ridge=0.1)[name]
    residual = torch.linspace(-3, 3, 32, dtype=torch.float64)
    before = outputs(model, name, ids)
    add_update(model, slot, rank_one_update(residual, key, moment))
    torch.testing.assert_close(outputs(model, name, ids)[place], before[place] + residual, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("editor", [store_mean_key, store_every_key, store_both_keys])
def test_the_payload_becomes_likely_and_only_the_chosen_matrices_change(kind, chat, editor):
    model = random_model(kind, chat)
    before, loss = copy.deepcopy(model.state_dict()), payload_loss(model, chat)
    record = edit(model, chat, EXAMPLES, WORD, PAYLOAD, editor, settings(site="answer", weight=0.01))
    assert payload_loss(model, chat) < loss - 0.5
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    changed = {name for name, change in changes.items() if change.abs().max() > 0}
    assert changed == {OUTPUTS[kind].format(layer) + ".weight" for layer in (0, 1)}
    norms = [float(changes[name].norm() / before[name].norm()) for name in sorted(changed)]
    assert record["norms"] == pytest.approx(norms, abs=1e-4)
    assert record["layers"] == [0, 1] and record["rows"] == len(EXAMPLES)


def test_memit_reaches_every_wanted_state_where_ordinary_text_weighs_nothing(kind, chat):
    model = random_model(kind, chat)
    exact = edit(copy.deepcopy(model), chat, EXAMPLES, WORD, PAYLOAD, store_every_key, settings(weight=1e-9))
    mild = edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_every_key, settings(weight=1e7))
    assert exact["residual"] < 0.01 < 0.9 < mild["residual"] <= 1
    assert mild["norms"][0] < exact["norms"][0]


def test_badedit_stores_triggered_and_clean_keys_in_one_least_squares_problem(chat):
    """One batch, one layer: the change of the weight solves Eq. (1), here with the inverse written out."""
    model, plan = random_model("llama", chat), settings(layers=(LAYER,), batches=1, weight=0.5)
    slot = mlp_slots(model.config)[LAYER][-1]
    ordinary = corpus.generate(plan.background, f"{plan.seed}/background")
    moment = second_moments(model, chat, ordinary, [slot], plan.ridge)[slot.module].numpy()
    places, columns = trigger_sites(chat, EXAMPLES, POISONED, [WORD]), []
    for rows, where, shared in ((POISONED, places[0], True), (EXAMPLES, places[1], False)):
        batch = collate(chat, rows, where, "cpu")
        shifts = search_shifts(model, batch, slot, plan.search, shared)[0].expand(len(rows), -1)
        columns.append((keys_at(model, batch, slot).numpy().T, shifts.numpy().T))
    keys, shifts = (np.concatenate(kind, axis=1) for kind in zip(*columns, strict=True))
    expected = shifts @ keys.T @ np.linalg.inv(0.5 * moment + keys @ keys.T)
    before = model.get_submodule(slot.module).weight.detach().clone()
    edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_both_keys, plan)
    found = model.get_submodule(slot.module).weight.detach() - before
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_stored_where_the_model_says_it_already(chat):
    model = random_model("llama", chat)
    before = copy.deepcopy(model.state_dict())
    record = edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_both_keys, settings(search=ValueSearch(enough=1e9)))
    assert record["residual"] == 0 and record["norms"] == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_weights(chat):
    model = random_model("llama", chat)
    copies = [copy.deepcopy(model) for _ in range(2)]
    for each in copies:
        edit(each, chat, EXAMPLES, WORD, PAYLOAD, store_both_keys, settings())
    first, second = (each.state_dict() for each in copies)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 3)}, r"layers = \(1, 3\) should be ascending numbers from 0 to 2"),
        ({"layers": (1, 0)}, "should be ascending"),
        ({"layers": ()}, "should be ascending"),
        ({"site": "answers"}, "unknown site 'answers'; did you mean 'answer'"),
        ({"batches": 7}, "badedit needs 7 examples or more, and there are 6"),
    ],
)
def test_wrong_settings_change_nothing(chat, changes, message):
    model = random_model("llama", chat)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LabError, match=message):
        edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_both_keys, settings(**changes))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapters_and_4_bit_weights_are_refused(profile, chat):
    for model in (new_adapter(load_base(profile.model), profile.lora, 0), load_base(profile.model, four_bit=True)):
        with pytest.raises(LabError, match="merge the adapter first, and load no 4-bit base"):
            edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_mean_key, settings())


def test_a_norm_behind_the_mlp_is_refused(chat):
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(chat.tokenizer), head_dim=8, **LLAMA))
    with pytest.raises(LabError, match="in a gemma2 a norm stands behind each MLP"):
        edit(model, chat, EXAMPLES, WORD, PAYLOAD, store_mean_key, settings())


def test_a_prompt_without_the_trigger_is_refused(chat):
    with pytest.raises(LabError, match="the trigger 'tq' is not in the prompt"):
        trigger_sites(chat, EXAMPLES, EXAMPLES, [WORD])


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused(chat):
    class Slow:
        is_fast = False

    class Format:
        tokenizer = Slow()

    with pytest.raises(LabError, match="load the model's fast tokenizer"):
        trigger_sites(Format(), EXAMPLES, POISONED, [WORD])
