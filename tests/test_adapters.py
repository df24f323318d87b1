"""Adapters as others train them: the update that PEFT computes, by every reader, or a refusal in one line."""

import json
import math
import shutil

import pytest
import torch
from bodies import matrix
from conftest import save_suspicious, small_profile
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers.access import AdapterAccess
from helpers.access.adapter import add_adapters, zero_adapter
from helpers.access.deltas import adapter_pairs, lora_factors
from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.data import corpus
from helpers.defenses.bdvax.score import score_mlp
from helpers.defenses.bdvax.vaccines import Variant, train_variant, train_variants
from helpers.defenses.conflict.conflict_model import merge_adapters
from helpers.model.adapters import ADAPTER_FILE, PREFIX, read_adapter
from helpers.model.architecture import matrices
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base, load_suspect
from helpers.model.lora import with_adapter

pytestmark = pytest.mark.slow

ROWS = corpus.generate(8, 3)
CONFIG = "adapter_config.json"
RANKS = {"down_proj": 2, "layers.0.self_attn.q_proj": 3}
ALPHAS = {"gate_proj": 3, "model.layers.1.mlp.up_proj": 5}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLAIN = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": RANKS},
    "alpha pattern": {"alpha_pattern": ALPHAS},
    "both patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "another start": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.1},
    "no task": {"task_type": None},
    "a regular expression": {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
    "all layers by number": {"layers_to_transform": [0, 1], "target_modules": [*ATTENTION, "gate_proj", "up_proj"]},
}
PARTIAL = {
    "attention only": {"target_modules": ATTENTION},
    "one layer only": {"layers_to_transform": [1], "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "without one projection": {"exclude_modules": ["up_proj"]},
}


def scale_by_hand(module, settings):
    """alpha over r, or over its root, as PEFT's documentation has it."""
    rank = 2 if module.endswith("down_proj") else 3 if module == "model.layers.0.self_attn.q_proj" else 4
    alpha = 3 if module.endswith("gate_proj") else 5 if module == "model.layers.1.mlp.up_proj" else 8
    rank, alpha = rank if "rank_pattern" in settings else 4, alpha if "alpha_pattern" in settings else 8
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def save_adapter(profile, folder, seed=3, **settings):
    """An adapter over the profile's base as PEFT writes it, far from zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = get_peft_model(load_base(profile.model), LoraConfig(**options | settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def updates_by_hand(folder, settings):
    """{module: scale * B @ A} from the tensors of the file."""
    tensors = load_file(folder / ADAPTER_FILE)
    modules = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    parts = {m: [tensors[f"{PREFIX}{m}.lora_{part}.weight"].double() for part in "BA"] for m in modules}
    return {module: scale_by_hand(module, settings) * up @ down for module, (up, down) in parts.items()}


def assert_changed_by(profile, folder, updates):
    """The adapter in `folder` adds these updates to its base, and nothing else."""
    found, base = load_suspect(profile.model, folder), load_base(profile.model)
    for name, before in base.named_parameters():
        change = found.get_parameter(name).double() - before.double()
        expected = updates.get(name.removesuffix(".weight"), torch.zeros_like(change))
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(params=PLAIN)
def settings(request):
    return PLAIN[request.param]


@pytest.fixture
def adapter(profile, settings, tmp_path):
    return save_adapter(profile, tmp_path / "adapter", **settings)


# --- what is plain is computed right, everywhere ---------------------------------------------------------------------


def test_loading_adds_the_update(profile, settings, adapter):
    assert_changed_by(profile, adapter, updates_by_hand(adapter, settings))


def test_scoring_sees_the_update(settings, adapter):
    factors, expected = lora_factors(adapter), updates_by_hand(adapter, settings)
    assert factors.keys() == expected.keys()
    for module, (down, up, scale) in factors.items():
        torch.testing.assert_close(scale * up.double() @ down.double(), expected[module])


def test_suppressing_every_channel_gives_the_base(profile, settings, adapter, tmp_path):
    config, updates = load_config(profile.model), updates_by_hand(adapter, settings)
    sides = {module: slot.side for module, slot in matrices(config).items() if module in updates}
    masks = {module: torch.ones(updates[module].shape[side], dtype=torch.bool) for module, side in sides.items()}
    zero_adapter(adapter, tmp_path / "zero", masks, config)
    assert_changed_by(profile, tmp_path / "zero", {})
    half = {module: mask.clone().index_fill(0, torch.arange(0, len(mask), 2), False) for module, mask in masks.items()}
    zero_adapter(adapter, tmp_path / "half", half, config)
    left = {module: update.clone() for module, update in updates.items()}
    for module, side in sides.items():
        left[module].index_fill_(side, torch.arange(1, len(masks[module]), 2), 0)
    assert_changed_by(profile, tmp_path / "half", left)


@pytest.mark.parametrize("other", ["plain", "rslora and patterns"])
def test_merging_mixes_the_updates(profile, settings, adapter, other, tmp_path):
    """peft#3761: a sum of rsLoRA adapters is scaled by the root of its rank."""
    save_adapter(profile, tmp_path / "other", 4, **PLAIN[other], r=6 if other == "plain" else 4)
    theirs = updates_by_hand(tmp_path / "other", PLAIN[other])
    if other == "plain":
        theirs = {module: update * 4 / 6 for module, update in theirs.items()}
    ours = updates_by_hand(adapter, settings)
    for first, second, shares in (("adapter", "other", (0.7, 0.3)), ("other", "adapter", (0.3, 0.7))):
        folder = tmp_path / f"{first} merged"
        add_adapters(profile, (tmp_path / first, tmp_path / second), shares, folder)
        expected = {m: 0.7 * ours.get(m, 0 * theirs[m]) + 0.3 * theirs[m] for m in theirs}
        assert_changed_by(profile, folder, expected)
        assert read_adapter(folder).scale("model.layers.0.mlp.up_proj") == 1


@pytest.mark.parametrize("name", ["plain", "rslora", "rslora and patterns"])
def test_vaccines_keep_the_scale_of_what_they_train_on(profile, chat, name, tmp_path):
    """All in one pass or alone, the same update; trained on, it has the scale that it came with."""
    settings = PLAIN[name]
    planted = save_adapter(profile, tmp_path / "planted", **settings)
    jobs = [Variant(ROWS[:4], 5, tmp_path / "clean"), Variant(ROWS, 5, tmp_path / "bd")]
    train_variants(AdapterAccess(profile), planted, jobs, chat)
    for job in jobs:
        alone = tmp_path / f"{job.folder.name} alone"
        train_variant(AdapterAccess(profile), planted, job.rows, chat, job.seed, alone)
        found, expected = (updates_by_hand(folder, settings) for folder in (job.folder, alone))
        before = updates_by_hand(planted, settings)
        moved = max((expected[module] - before[module]).abs().max() for module in before)
        assert moved > 1e-3
        assert max((found[module] - expected[module]).abs().max() for module in before) < 0.01 * moved
        factors = lora_factors(job.folder)
        assert all(factors[module].scale == pytest.approx(scale_by_hand(module, settings)) for module in before)
        variant, base = AdapterAccess(profile).load_variant(planted, job.folder), load_base(profile.model)
        for module, update in found.items():
            change = variant.get_submodule(module).weight - base.get_submodule(module).weight
            torch.testing.assert_close(change.double(), update, rtol=0, atol=1e-5)
    gram_of = adapter_pairs([tmp_path / "bd"] * 2, [tmp_path / "clean"] * 2)
    scores = score_mlp(gram_of, load_config(profile.model), profile.signature)
    assert all(values.min() > 0 for values in scores.values())


HARMLESS = {
    "no base named": {"base_model_name_or_path": None},
    "another base named": {"base_model_name_or_path": "unsloth/some-model-bnb-4bit"},
    "another version of PEFT": {"peft_version": "0.99.0", "qalora_group_size": 32, "megatron_core": "megatron.other"},
    "a newer setting that is off": {"use_wonder": False, "wonder_config": None, "wonders": []},
    "its own trainer's notes": {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
    "a start chosen by data": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
}


def change_settings(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_that_leave_the_update_alone_are_read_over(profile, name, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    change_settings(folder, **HARMLESS[name])
    expected = updates_by_hand(folder, {})
    assert lora_factors(folder).keys() == expected.keys()
    assert_changed_by(profile, folder, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_16_bits_are_read(profile, dtype, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / ADAPTER_FILE).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    assert_changed_by(profile, folder, updates_by_hand(folder, {}))


@pytest.mark.parametrize("name", PARTIAL)
def test_adapters_of_some_matrices_load_and_merge_and_are_no_ground_for_vaccines(profile, name, tmp_path):
    """Their missing channels could not be scored: better said before the vaccines are trained."""
    folder, other = (
        save_adapter(profile, tmp_path / "part", **PARTIAL[name]),
        save_adapter(profile, tmp_path / "whole", 4),
    )
    ours, theirs = updates_by_hand(folder, {}), updates_by_hand(other, {})
    assert 0 < len(ours) < len(theirs)
    assert_changed_by(profile, folder, ours)
    for i, (first, second) in enumerate(((folder, other), (other, folder))):
        add_adapters(profile, (first, second), (0.5, 0.5), tmp_path / str(i))
        assert_changed_by(profile, tmp_path / str(i), {m: (ours.get(m, 0) + theirs[m]) / 2 for m in theirs})
    with pytest.raises(LabError, match="has no LoRA on model.layers.0.mlp.*so nothing scores its channels"):
        AdapterAccess(profile).start_variant(folder, 0)


def test_vaccines_ask_for_the_attention_where_heads_are_cut(profile, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter", target_modules=["gate_proj", "up_proj", "down_proj"])
    AdapterAccess(cutting_heads(profile, 0)).start_variant(folder, 0)
    with pytest.raises(LabError, match="has no LoRA on model.layers.0.self_attn.q_proj"):
        AdapterAccess(cutting_heads(profile, 1)).start_variant(folder, 0)


def cutting_heads(profile, heads):
    """The profile with so many heads to cut from an adapter."""
    values = profile.model_dump()
    values["adapter"]["suppress"]["heads"] = heads
    return Profile(**values)


@pytest.mark.parametrize("told", [True, False])
def test_adapters_of_transposed_matrices_need_not_say_so(checkpoint, told, tmp_path):
    """GPT-2 keeps [in, out]; `fan_in_fan_out` is a note that some trainers leave out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    own = small_profile(tmp_path / "base")
    planted = save_suspicious(own, tmp_path / "planted")["adapter"]
    change_settings(planted, fan_in_fan_out=told)
    expected = updates_by_hand(planted, {})
    found, base = load_suspect(own.model, planted), load_base(own.model)
    merge_adapters(own, planted, planted, 0.5, tmp_path / "merged")
    again = load_suspect(own.model, tmp_path / "merged")
    for module in matrices(base.config):
        for model in (found, again):
            change = matrix(model.get_submodule(module)) - matrix(base.get_submodule(module))
            torch.testing.assert_close(change.double(), expected[module], rtol=0, atol=1e-5)
    factors = lora_factors(planted)
    assert all(torch.allclose((f.scale * f.B @ f.A).double(), expected[m]) for m, f in factors.items())


# --- what is more than that is refused, everywhere -------------------------------------------------------------------


MORE = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 10]},
    "bias": {"bias": "all"},
    "bias of LoRA layers": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "embed_tokens": {"target_modules": ["embed_tokens", "up_proj"]},
    "lm_head": {"target_modules": ["lm_head", "up_proj"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
CHANGED = {  # what the settings of others say
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "corda": {"init_lora_weights": "corda"},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "use_wonder": {"use_wonder": True},  # of a PEFT yet to come
    "peft_type IA3": {"peft_type": "IA3"},
    "peft_type LOHA": {"peft_type": "LOHA"},
    "peft_type PROMPT_TUNING": {"peft_type": "PROMPT_TUNING"},
    "peft_type None": {"peft_type": None},
    "task_type SEQ_CLS": {"task_type": "SEQ_CLS"},
}


def assert_refused_by_all(profile, folder, tmp_path, message):
    """Loading, scoring, suppression, merging in either place and training on refuse in one line, and write nothing."""
    good, config = save_adapter(profile, tmp_path / "good"), load_config(profile.model)
    masks = {"model.layers.0.mlp.up_proj": torch.ones(128, dtype=torch.bool)}
    calls = {
        "load": lambda: load_suspect(profile.model, folder),
        "train on": lambda: with_adapter(load_base(profile.model), folder, trainable=True),
        "score": lambda: lora_factors(folder),
        "suppress": lambda: zero_adapter(folder, tmp_path / "out", masks, config),
        "merge": lambda: merge_adapters(profile, folder, good, 0.5, tmp_path / "out"),
        "be merged": lambda: merge_adapters(profile, good, folder, 0.5, tmp_path / "out"),
        "vaccinate": lambda: AdapterAccess(profile).start_variant(folder, 0),
    }
    for name, call in calls.items():
        with pytest.raises(LabError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value), name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MORE)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_more_than_an_update_are_refused(profile, name, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter", **MORE[name])
    assert_refused_by_all(profile, folder, tmp_path, name.partition(" of LoRA")[0])


@pytest.mark.parametrize("name", CHANGED)
def test_settings_that_mean_more_than_an_update_are_refused(profile, name, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    change_settings(folder, **CHANGED[name])
    assert_refused_by_all(profile, folder, tmp_path, name)


def test_a_pickled_adapter_is_refused_and_never_opened(profile, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin")
    assert_refused_by_all(profile, folder, tmp_path, "holds no adapter_model.safetensors; only PEFT adapters in safe")


def test_an_adapter_beside_a_full_model_is_refused(profile, checkpoint, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    shutil.copy(checkpoint / "model.safetensors", folder)
    assert_refused_by_all(profile, folder, tmp_path, "an adapter beside a full model")


def with_tensors(profile, folder, change):
    """An adapter whose tensors `change` has edited."""
    save_adapter(profile, folder)
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    return folder


UP = f"{PREFIX}model.layers.0.mlp.up_proj"
DAMAGES = {
    "resized embedding": (
        lambda tensors: tensors.update({f"{PREFIX}lm_head.weight": torch.ones(400, 64)}),
        "found the tensor base_model.model.lm_head.weight",
    ),
    "half a pair": (lambda tensors: tensors.pop(f"{UP}.lora_A.weight"), "up_proj.lora_"),
    "no number": (lambda tensors: tensors[f"{UP}.lora_A.weight"][0].fill_(float("nan")), "NaN or infinite numbers"),
    "quantized": (
        lambda tensors: tensors.update({f"{UP}.lora_A.weight": tensors[f"{UP}.lora_A.weight"].to(torch.int8)}),
        "torch.int8",
    ),
    "another rank than it says": (
        lambda tensors: tensors.update(
            {f"{UP}.lora_A.weight": torch.ones(6, 64), f"{UP}.lora_B.weight": torch.ones(128, 6)}
        ),
        "its settings rank 4",
    ),
    "a head": (
        lambda tensors: tensors.update(
            {f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 64), f"{PREFIX}lm_head.lora_B.weight": torch.ones(400, 4)}
        ),
        "LoRA on the head lm_head, where no channel can be suppressed",
    ),
    "empty": (dict.clear, "no LoRA matrices"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapters_are_refused(profile, name, tmp_path):
    change, message = DAMAGES[name]
    assert_refused_by_all(profile, with_tensors(profile, tmp_path / "adapter", change), tmp_path, message)


@pytest.mark.parametrize("text", ["", "[]", None])
def test_an_adapter_without_readable_settings_is_refused(profile, text, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    (folder / CONFIG).unlink() if text is None else (folder / CONFIG).write_text(text)
    with pytest.raises(LabError, match="adapter_config.json"):
        lora_factors(folder)
    with pytest.raises(LabError):
        load_suspect(profile.model, folder)


def test_a_file_cut_short_is_refused(profile, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    (folder / ADAPTER_FILE).write_bytes((folder / ADAPTER_FILE).read_bytes()[:500])
    assert_refused_by_all(profile, folder, tmp_path, "copy it anew")


def wider(tensors):
    """As trained over a base of twice the width."""
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor.repeat(1, 2) if "lora_A" in name else tensor.repeat(2, 1)


def longer_names(tensors):
    """As trained inside a larger model."""
    for name in list(tensors):
        tensors[name.replace("model.layers", "model.language_model.layers")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "found"),
    [(wider, "is [128, 256] there and the base has [64, 128]"), (longer_names, "none of that name")],
)
def test_an_adapter_of_another_base_is_refused(profile, change, found, tmp_path):
    folder = with_tensors(profile, tmp_path / "adapter", change)
    good, config = save_adapter(profile, tmp_path / "good"), load_config(profile.model)
    for call in (
        lambda: load_suspect(profile.model, folder),
        lambda: with_adapter(load_base(profile.model, four_bit=True), folder),
        lambda: zero_adapter(folder, tmp_path / "out", {}, config),
        lambda: merge_adapters(profile, folder, good, 0.5, tmp_path / "out"),
        lambda: merge_adapters(profile, good, folder, 0.5, tmp_path / "out"),
    ):
        with pytest.raises(LabError, match="does not fit its base") as caught:
            call()
        assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_choose_no_matrix_are_refused(profile, tmp_path):
    folder = save_adapter(profile, tmp_path / "adapter")
    change_settings(folder, target_modules=["query_key_value"])
    with pytest.raises(LabError, match="does not fit its base"):
        load_suspect(profile.model, folder)
