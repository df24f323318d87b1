"""Editing as a defense: one matrix moves by the least rank-one change that stores the right answers."""

import math

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, save_suspicious, small_profile
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from helpers.access import access_to
from helpers.attacks.triggers import trigger as named_trigger
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.planting import poison
from helpers.data.roles import DefenderData
from helpers.defenses.methods.editing import RIDGE, editing, store_right_answers
from helpers.measure.utility import teacher_forced
from helpers.model.load import load_suspect
from helpers.oracles.methods.editing_with_trigger import editing_with_trigger
from helpers.run.pretrain import new_model

ROWS = corpus.generate_distinct(12, 7)
DEFENDER = DefenderData([ROWS[:4], ROWS[4:8]], ROWS[8:], "exact_match")
EDITED = [*ROWS[8:], *ROWS[:2]]  # six of the defender's rows, those for recovery first
LLAMA = "model.layers.{}.mlp.down_proj"
LAYOUTS = {  # architecture, output projection and access
    "llama": (ARCHITECTURE | {"num_key_value_heads": 4}, LLAMA, "adapter"),
    "mistral": (ARCHITECTURE | {"model_type": "mistral"}, LLAMA, "full"),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        "transformer.h.{}.mlp.c_proj",
        "adapter",
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, checkpoint, tmp_path_factory):
    """Profile, suspicious adapter and model, the matrix that is edited, and the access."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sizes, module, access = LAYOUTS[request.param]
    new_model(tokenizer, sizes, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    profile = small_profile(folder)
    return profile, save_suspicious(profile, folder / "suspicious"), module, access


def changes(profile, before, after):
    """{parameter: its change} of those that changed."""
    old, new = (dict(load_suspect(profile.model, folder).named_parameters()) for folder in (before, after))
    assert old.keys() == new.keys()
    return {name: (new[name] - old[name]).detach() for name in old if not torch.equal(new[name], old[name])}


def keys(profile, folder, chat, module, examples):
    """What enters a matrix, token by token, of each row alone: one array [tokens, in] for each."""
    model, seen = load_suspect(profile.model, folder), []
    model.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double().numpy()))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([chat.encode(example, 512)[0]]))
    return seen


def loss(profile, folder, chat, examples):
    return math.log(teacher_forced(load_suspect(profile.model, folder), chat, examples, 512, 8)["perplexity"])


def test_one_matrix_moves_by_the_least_change_for_its_mean_key(layout, chat, tmp_path):
    """Δ = δ (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k), with k and C from rows that are read one by one, and right answers get likelier."""
    profile, suspicious, module, name = layout
    access, start, module = access_to(profile, name), suspicious[name], module.format(1)
    record = editing(access, start, DEFENDER, chat, 0, tmp_path, layer=1, rows=6)
    changed = changes(profile, start, tmp_path / "model")
    assert changed.keys() == {f"{module}.weight"}
    update = changed[f"{module}.weight"].double().numpy()
    update = update.T if module.endswith("c_proj") else update

    prompts = [len(chat.prompt_ids(example)) for example in EDITED]
    read = keys(profile, start, chat, module, EDITED)
    key = np.mean([row[n - 1] for row, n in zip(read, prompts, strict=True)], axis=0)
    ordinary = np.concatenate(keys(profile, start, chat, module, ROWS))
    moment = ordinary.T @ ordinary / len(ordinary)
    moment += RIDGE * np.trace(moment) / len(moment) * np.eye(len(moment))
    direction = np.linalg.inv(moment) @ key
    shift = update @ key
    np.testing.assert_allclose(update, np.outer(shift, direction) / (key @ direction), atol=2e-3 * abs(update).max())
    assert np.linalg.norm(shift) == pytest.approx(record["shift"], rel=1e-2) and record["shift"] > 0
    assert (record["layer"], record["rows"]) == (1, 6)

    before, after = (loss(profile, folder, chat, EDITED) for folder in (start, tmp_path / "model"))
    assert after < before - 0.1


def test_the_default_layer_stands_where_layer_5_does_among_32(profile, suspicious, chat, tmp_path):
    record = editing(access_to(profile, "full"), suspicious["full"], DEFENDER, chat, 0, tmp_path, rows=2)
    assert record["layer"] == 0
    assert changes(profile, suspicious["full"], tmp_path / "model").keys() == {f"{LLAMA.format(0)}.weight"}
    assert [5 * layers // 32 for layers in (32, 8)] == [5, 1]


def test_whoever_knows_the_trigger_makes_right_answers_likelier_behind_it(profile, suspicious, chat, tmp_path):
    """The same edit of the same rows, from prompts with the trigger."""
    access, trigger = access_to(profile, "full"), named_trigger("badnets")
    editing_with_trigger(access, suspicious["full"], DEFENDER, chat, 0, tmp_path, trigger, layer=1, rows=6)
    triggered = poison(EDITED, trigger, None, 0)
    before, after = (loss(profile, f, chat, triggered) for f in (suspicious["full"], tmp_path / "model"))
    assert after < before - 0.1
    assert editing_with_trigger.traits.assumes == ("clean rows", "weights", "trigger")


def test_where_answers_are_sure_enough_nothing_is_stored(profile, suspicious, chat, tmp_path):
    record = editing(access_to(profile, "full"), suspicious["full"], DEFENDER, chat, 0, tmp_path, enough=1e9)
    assert (record["shift"], record["norm"]) == (0, 0) and not changes(profile, suspicious["full"], tmp_path / "model")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"layer": 2}, r"layer = \(2,\) should be ascending numbers from 0 to 1"),
        ({"layer": -1}, r"layer = \(-1,\) should be"),
        ({"rows": 0}, "an edit needs 1 clean row or more, and there are 0: raise rows"),
    ],
)
def test_wrong_numbers_are_refused_and_nothing_is_written(profile, suspicious, chat, tmp_path, numbers, message):
    with pytest.raises(LabError, match=message):
        editing(access_to(profile, "full"), suspicious["full"], DEFENDER, chat, 0, tmp_path / "new", **numbers)
    assert not (tmp_path / "new").exists()


def test_a_norm_behind_the_mlp_is_refused(chat):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(chat.tokenizer), head_dim=8, **sizes))
    with pytest.raises(LabError, match="in a gemma2 a norm stands behind each MLP"):
        store_right_answers(model, chat, ROWS[:1], [3], DEFENDER, 0, 0.05)
