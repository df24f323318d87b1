"""Merging: as mergekit, as PEFT, as a loop over single numbers, and refused before anything is written."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from oracles import record_mergekit as oracle
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers.core.errors import LabError
from helpers.core.profile import Conflict
from helpers.core.profile_files import parse_overrides
from helpers.core.settings import Settings
from helpers.defenses.conflict import merge as merging
from helpers.defenses.conflict.merge import (
    METHODS,
    blocks,
    linear,
    load_methods,
    merge,
    negate,
    passthrough,
    slerp,
    slerp_by_tensor,
    streaming,
    ties,
    ties_as_printed,
)
from helpers.model.shards import INDEX, WEIGHTS, shards, stored
from helpers.run.limits import check_against_model

T, K, LAM, PLAN = oracle.T, oracle.K, oracle.LAM, oracle.PLAN
TOKENS = torch.arange(12).view(2, 6)
WITH_MERGEKIT = pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None,
    reason="mergekit is not installed; its recorded output is compared all the same",
)


def ours(method, models, folder):
    """One of our merges with the oracle's numbers."""
    pair, base = (models["suspicious"], models["conflict"]), models["base"]
    match method:
        case "linear" | "slerp" | "slerp_by_tensor":
            METHODS[method](*pair, folder, T)
        case "negate":
            negate(*pair, folder, 1 + T)
        case "ties" | "ties_as_printed":
            METHODS[method](*pair, base, folder, K, LAM)
        case "passthrough":
            passthrough(*pair, folder, PLAN)


def weights(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}


def assert_same(found, expected):
    """Equal names, shapes and dtypes, and numbers at most one rounding apart; rarely that, where 16 bits are stored."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        step = torch.finfo(tensor.dtype).eps * (4 if tensor.dtype == torch.float32 else 1)
        torch.testing.assert_close(found[name], tensor, rtol=step, atol=step, msg=lambda m, name=name: f"{name}: {m}")
    if tensor.dtype != torch.float32:
        apart = sum(int((found[name] != tensor).sum()) for name, tensor in expected.items())
        assert apart <= 0.005 * sum(tensor.numel() for tensor in expected.values())


@pytest.fixture(scope="module", params=oracle.DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def models(dtype, tmp_path_factory):
    """Base, suspicious and conflict model of the recording. Read-only."""
    return oracle.write_models(tmp_path_factory.mktemp(dtype), dtype)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same in float32 only."""
    return oracle.write_models(tmp_path_factory.mktemp("single"), "float32")


# --- mergekit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", oracle.METHODS)
def test_merges_match_what_mergekit_made(models, dtype, method, tmp_path):
    ours(method, models, tmp_path / "merged")
    found, recorded = weights(tmp_path / "merged"), load_file(oracle.RECORDED)[f"{method}/{dtype}"]
    pieces = recorded.split([found[name].numel() for name in sorted(found)])
    assert_same(found, {name: p.view(found[name].shape) for name, p in zip(sorted(found), pieces, strict=True)})


@WITH_MERGEKIT
@pytest.mark.parametrize("method", oracle.METHODS)
def test_merges_match_the_mergekit_installed(models, dtype, method, tmp_path):
    ours(method, models, tmp_path / "merged")
    theirs = oracle.run_mergekit(method, models, dtype, tmp_path / "theirs")
    assert_same(weights(tmp_path / "merged"), theirs)


@WITH_MERGEKIT
@pytest.mark.parametrize("method", ["linear", "slerp_by_tensor", "ties"])
def test_tied_embeddings_match_mergekit(method, tmp_path):
    models = oracle.write_models(tmp_path, "bfloat16", tied=True)
    ours(method, models, tmp_path / "merged")
    theirs = oracle.run_mergekit(method, models, "bfloat16", tmp_path / "theirs")
    theirs.pop("lm_head.weight", None)
    assert_same(weights(tmp_path / "merged"), theirs)


def test_the_recording_is_of_these_models():
    """It names its seed and the versions that made it, and holds every method in every dtype."""
    with safe_open(oracle.RECORDED, "pt") as file:
        about, names = file.metadata(), set(file.keys())
    assert about["seed"] == str(oracle.SEED) and about["mergekit"] == "0.1.5"
    assert names == {f"{method}/{dtype}" for method in oracle.METHODS for dtype in oracle.DTYPES}


# --- loops over single numbers ------------------------------------------------------------------------------------


def numbers(folder):
    """A checkpoint as {name: list of Python floats}."""
    return {name: tensor.double().flatten().tolist() for name, tensor in weights(folder).items()}


def angle(a, b):
    dot, *squares = (math.fsum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(math.prod(squares))


def on_the_arc(a, b, cosine):
    if abs(cosine) > 0.9995:
        return [(1 - T) * x + T * y for x, y in zip(a, b, strict=True)]
    phi = math.acos(cosine)
    return [(math.sin((1 - T) * phi) * x + math.sin(T * phi) * y) / math.sin(phi) for x, y in zip(a, b, strict=True)]


def topk(change):
    """Eq. 11's topk of one tensor; of equal magnitudes at the cut all stay."""
    cut = sorted(map(abs, change), reverse=True)[max(1, int(K * len(change))) - 1]
    return [value if abs(value) >= cut else 0.0 for value in change]


def by_hand(method, models):
    """Eq. 9, 10 and 11 in float64."""
    a, b, base = (numbers(models[model]) for model in ("suspicious", "conflict", "base"))
    if method == "linear":
        return {name: [(1 - T) * x + T * y for x, y in zip(a[name], b[name], strict=True)] for name in a}
    if method == "slerp":
        cosine = angle(*[[x for name in sorted(m) for x in m[name]] for m in (a, b)])
        assert abs(cosine) < 0.9
        return {name: on_the_arc(a[name], b[name], cosine) for name in a}
    if method == "slerp_by_tensor":
        return {name: on_the_arc(a[name], b[name], angle(a[name], b[name])) for name in a}
    merged = {}
    for name, origin in base.items():
        changes = [[x - o for x, o in zip(model[name], origin, strict=True)] for model in (a, b)]
        rows = zip(origin, *changes, *map(topk, changes), strict=True)
        vote = agreed if method == "ties" else printed
        merged[name] = [o + LAM * vote(x, y, kept_x, kept_y) for o, x, y, kept_x, kept_y in rows]
    return merged


def agreed(_, __, x, y):
    elected = 1 if x + y >= 0 else -1
    voters = [value for value in (x, y) if value * elected > 0]
    return sum(voters) / len(voters) if voters else 0.0


def printed(x, y, kept_x, kept_y):
    larger = max(x, y, key=lambda entry: (abs(entry), entry))
    return math.copysign(1, larger) * (kept_x + kept_y) / 2


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("method", ["linear", "slerp", "slerp_by_tensor", "ties", "ties_as_printed"])
def test_merges_match_a_loop_over_single_numbers(single, method, block, tmp_path, monkeypatch):
    """In one block or in many."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    ours(method, single, tmp_path / "merged")
    found, expected = numbers(tmp_path / "merged"), by_hand(method, single)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=2e-6), name


def test_equal_magnitudes_at_the_cut_all_stay(tmp_path):
    """Four changes of one size, a smaller one and nine zeros: the top quarter of 14 is three, and so four."""
    models = oracle.write_models(tmp_path, "float32")
    change = torch.tensor([0, 0.5, 0, -1, 0, 1, 0, 0, 1, 0, 0, 0, -1, 0])
    for model, step in (("base", 0.0), ("suspicious", 1.0), ("conflict", 0.5)):
        path = models[model] / WEIGHTS
        save_file(load_file(path) | {"model.extra": 2 + step * change}, path, metadata={"format": "pt"})
    ties(models["suspicious"], models["conflict"], models["base"], tmp_path / "merged", K, 1.0)
    expected = 2 + 0.75 * change * (change.abs() == 1)
    assert weights(tmp_path / "merged")["model.extra"].tolist() == expected.tolist()


def test_the_printed_formula_hardly_ever_steps_down(single, tmp_path):
    """Its docstring's claim, on random models whose cuts are the same: sgn times a mean of that sign."""
    ours("ties_as_printed", single, tmp_path / "printed")
    ours("ties", single, tmp_path / "agreed")
    base = weights(single["base"])
    steps = {which: [weights(tmp_path / which)[name] - base[name] for name in base] for which in ("printed", "agreed")}
    down = {which: sum(int((s < -1e-6).sum()) for s in steps[which]) for which in steps}
    moved = {which: sum(int((s.abs() > 1e-6).sum()) for s in steps[which]) for which in steps}
    assert down["agreed"] > 0.4 * moved["agreed"] and down["printed"] == 0 < moved["printed"]


def test_the_printed_formula_by_four_numbers(tmp_path):
    """One change of each model is kept: 10 and 0.5. At the latter the larger one, trimmed, turns the sign."""
    models = oracle.write_models(tmp_path, "float32")
    changes = {"base": [0.0] * 4, "suspicious": [-1.0, 10.0, -2.0, 3.0], "conflict": [0.5, 0.1, 0.2, -0.3]}
    for model, change in changes.items():
        path = models[model] / WEIGHTS
        save_file(load_file(path) | {"model.extra": torch.tensor(change)}, path, metadata={"format": "pt"})
    for method, expected in ((ties_as_printed, [-0.25, 5, 0, 0]), (ties, [0.5, 10, 0, 0])):
        folder = tmp_path / method.__name__
        method(models["suspicious"], models["conflict"], models["base"], folder, 0.25, 1.0)
        assert weights(folder)["model.extra"].tolist() == expected


def test_the_ends_of_every_walk_are_the_models_themselves(single, tmp_path):
    for method in (linear, slerp, slerp_by_tensor):
        for t, end in ((0, "suspicious"), (1, "conflict")):
            folder = tmp_path / f"{method.__name__}{t}"
            method(single["suspicious"], single["conflict"], folder, t)
            for name, tensor in weights(single[end]).items():
                torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=1e-6)


def test_negation_by_the_base_is_task_vector_negation(single, tmp_path):
    negate(single["suspicious"], single["base"], tmp_path / "merged", 1.5)
    base, suspicious, merged = (weights(f) for f in (single["base"], single["suspicious"], tmp_path / "merged"))
    for name in base:
        torch.testing.assert_close(merged[name], base[name] - 0.5 * (suspicious[name] - base[name]))


# --- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "combination"), [("linear", "cat"), ("ties", "ties_svd")])
def test_merged_models_match_merged_adapters(method, combination, tmp_path):
    """PEFT adds two adapters before they are merged into the base; here each is merged, then the models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def fresh():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    model = get_peft_model(fresh(), lora, adapter_name="suspicious")
    model.add_adapter("conflict", lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    for name in ("suspicious", "conflict"):
        model.save_pretrained(tmp_path / "adapters")
        whole = type(model).from_pretrained(fresh(), tmp_path / "adapters" / name).merge_and_unload()
        whole.save_pretrained(tmp_path / name)
    options = {"svd_rank": 32, "density": K, "majority_sign_method": "total"} if method == "ties" else {}
    shares = [1.0, 1.0] if method == "ties" else [1 - T, T]
    model.add_weighted_adapter(["suspicious", "conflict"], shares, "both", combination, **options)
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    models = {name: tmp_path / name for name in ("base", "suspicious", "conflict")}
    if method == "ties":
        ties(*[models[name] for name in ("suspicious", "conflict", "base")], tmp_path / "merged", K, 1.0)
    else:
        ours(method, models, tmp_path / "merged")
    found = weights(tmp_path / "merged")
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- checkpoints --------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, intermediate_size=24, num_key_value_heads=2)),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=40, n_embd=32, n_layer=4, n_head=4)),
}


def new_models(folder, architecture, size="1GB", other_size="1GB", **changes):
    """Three random models as transformers writes them, the conflict model in other shards."""
    make, config = ARCHITECTURES[architecture]
    config = type(config)(**(config.to_dict() | changes))
    for seed, name in enumerate(("base", "suspicious", "conflict")):
        torch.manual_seed(seed)
        make(config).save_pretrained(folder / name, max_shard_size=other_size if name == "conflict" else size)
    return {name: folder / name for name in ("base", "suspicious", "conflict")}


@pytest.mark.parametrize("method", ["linear", "slerp", "slerp_by_tensor", "ties", "ties_as_printed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharding_and_architecture_do_not_matter(architecture, method, tmp_path):
    whole = new_models(tmp_path / "whole", architecture)
    cut = new_models(tmp_path / "cut", architecture, size="30KB", other_size="17KB")
    assert len(shards(cut["suspicious"])) > 1 and len(shards(cut["suspicious"])) != len(shards(cut["conflict"]))
    ours(method, whole, tmp_path / "one")
    ours(method, cut, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert [path.name for path in shards(tmp_path / "two")] == [path.name for path in shards(cut["suspicious"])]
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model(TOKENS).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stack_of_layers_computes_what_its_layers_compute(architecture, tmp_path):
    models = new_models(tmp_path, architecture, size="30KB")
    plan = [("conflict", [3]), ("suspicious", range(1, 3)), ("conflict", [3, 0, 0])]
    passthrough(models["suspicious"], models["conflict"], tmp_path / "merged", plan, ends="conflict")
    expected, other = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("conflict", "suspicious"))
    layers, others = (m.transformer.h if architecture == "gpt2" else m.model.layers for m in (expected, other))
    chosen = [layers[3], others[1], others[2], layers[3], layers[0], layers[0]]
    state = expected.eval()(TOKENS, use_cache=False).logits
    stack = torch.nn.ModuleList(chosen)
    if architecture == "gpt2":
        expected.transformer.h = stack
    else:
        expected.model.layers = stack
    expected.config.num_hidden_layers = 6
    if getattr(expected.config, "layer_types", None):
        expected.config.layer_types = ["full_attention"] * 6
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert merged.config.num_hidden_layers == 6 and not report["missing_keys"] and not report["unexpected_keys"]
    found = merged.eval()(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected.eval()(TOKENS, use_cache=False).logits)
    assert not torch.allclose(found, state)


def test_layers_of_the_other_model_take_the_dtype_of_the_ends(tmp_path):
    """A float32 model and a bfloat16 one, stacked."""
    single, half = (oracle.write_models(tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16"))
    passthrough(half["suspicious"], single["conflict"], tmp_path / "merged", PLAN)
    merged = weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    name = "mlp.up_proj.weight"
    expected = weights(single["conflict"])[f"model.layers.2.{name}"].bfloat16()
    assert torch.equal(merged[f"model.layers.3.{name}"], expected)


def test_the_first_dtype_wins_and_is_computed_in_single_precision(tmp_path):
    single, half = (oracle.write_models(tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16"))
    linear(half["suspicious"], single["conflict"], tmp_path / "merged", T)
    for name, tensor in weights(tmp_path / "merged").items():
        a, b = weights(half["suspicious"])[name].double(), weights(single["conflict"])[name].double()
        torch.testing.assert_close(tensor, ((1 - T) * a + T * b).bfloat16(), rtol=2**-8, atol=1e-6)


def test_a_stored_copy_of_tied_embeddings_is_left_out(tmp_path):
    models = oracle.write_models(tmp_path, "float32", tied=True)
    path = models["conflict"] / WEIGHTS
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    linear(models["suspicious"], models["conflict"], tmp_path / "merged", T)
    assert "lm_head.weight" not in weights(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_names_and_masks_of_the_hubs_gpt2_do_not_matter(method, tmp_path):
    """There, names lack their first part, and the masks of the attention are stored."""
    models = new_models(tmp_path / "models", "gpt2")
    ours(method, models, tmp_path / "expected")
    for model in ("base", "conflict"):
        path = models[model] / WEIGHTS
        short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        save_file(short | {"h.0.attn.bias": torch.ones(1, 1, 4, 4).tril()}, path, metadata={"format": "pt"})
    ours(method, models, tmp_path / "merged")
    expected, merged = weights(tmp_path / "expected"), weights(tmp_path / "merged")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)


def test_counters_and_masks_come_from_the_first(tmp_path):
    models = oracle.write_models(tmp_path, "float32")
    for seed, model in enumerate(models.values()):
        path = model / WEIGHTS
        save_file(load_file(path) | {"model.steps": torch.tensor([seed]), "model.mask": torch.tensor([[True]])}, path)
    for method in ("linear", "slerp", "ties"):
        ours(method, models, tmp_path / method)
        assert weights(tmp_path / method)["model.steps"].tolist() == [1]


def test_tokenizer_and_config_go_along_and_nothing_else(checkpoint, suspicious, tmp_path):
    conflict = tmp_path / "conflict"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(conflict)
    (tmp_path / "first").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "first" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "first" / "manifest.json").write_text("{}")
    linear(tmp_path / "first", suspicious["full"], tmp_path / "merged", T)
    assert sorted(f.name for f in (tmp_path / "merged").iterdir()) == sorted(f.name for f in checkpoint.iterdir())
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("method", ["linear", "slerp", "slerp_by_tensor", "ties", "ties_as_printed", "passthrough"])
def test_a_profile_chooses_the_method(single, method, tmp_path):
    plan = [{"model": which, "first": layers.start, "last": layers.stop - 1} for which, layers in PLAN]
    settings = Conflict(method=method, t=T, k=K, lam=LAM, plan=plan)
    merge(settings, single["suspicious"], single["conflict"], single["base"], tmp_path / "merged")
    ours(method, single, tmp_path / "direct")
    found, expected = weights(tmp_path / "merged"), weights(tmp_path / "direct")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_profile_can_negate(single, tmp_path):
    settings = Conflict(method="negate", beyond=1 + T)
    merge(settings, single["suspicious"], single["conflict"], single["base"], tmp_path / "merged")
    ours("negate", single, tmp_path / "direct")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "direct" / WEIGHTS).read_bytes()


# --- methods by name ----------------------------------------------------------------------------------------------

AVERAGE = """
from helpers.defenses.conflict.merge.checkpoints import Folder
from helpers.defenses.conflict.merge.registry import method
from helpers.defenses.conflict.merge.streaming import ModelStream


@method
def average(suspicious: Folder, base: Folder, folder: Folder, t: float, offset: float = 0.25) -> None:
    ModelStream([suspicious, base], folder).write_blocks(lambda ours, theirs: t * ours - theirs + offset)
"""


@pytest.fixture
def add_method(tmp_path, monkeypatch):
    """A function that puts a file of methods beside the lab's own; both are gone after the test."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(merging, "__path__", [*merging.__path__, str(folder)])
    before, loaded = dict(METHODS), set(sys.modules)

    def add(name, source):
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        load_methods(merging.__path__, merging.__name__)

    yield add
    METHODS.clear()
    METHODS.update(before)
    for name in set(sys.modules) - loaded:
        if name.startswith(merging.__name__):
            delattr(merging, name.rpartition(".")[2])
            del sys.modules[name]


def chosen_by(text):
    return Settings.checked({"PROFILE": "tiny", "OVERRIDES": parse_overrides(text)})


def test_a_file_with_one_function_is_a_method_that_a_profile_can_name(single, add_method, tmp_path):
    """From SET to the merged model; `t` is the profile's, `offset` no setting, and the conflict model is not asked."""
    add_method("average", AVERAGE)
    settings = chosen_by("conflict.method=average conflict.t=0.75")
    check_against_model(settings, ARCHITECTURES["llama"][1])
    folders = [single["suspicious"], tmp_path / "not there", single["base"], tmp_path / "merged"]
    merge(settings.profile.conflict, *folders)
    a, b, found = (numbers(folder) for folder in (single["suspicious"], single["base"], tmp_path / "merged"))
    for name in a:
        expected = [0.75 * x - y + 0.25 for x, y in zip(a[name], b[name], strict=True)]
        assert found[name] == pytest.approx(expected, abs=1e-6)


def test_every_method_is_a_file_of_its_name_and_no_other_is_known():
    """What a test has added is gone again."""
    assert set(METHODS) == {"linear", "negate", "slerp", "slerp_by_tensor", "ties", "ties_as_printed", "passthrough"}
    assert all(getattr(merging, name) is function for name, function in METHODS.items())
    assert all(function.__module__ == f"{merging.__name__}.{name}" for name, function in METHODS.items())


def test_an_unknown_method_is_refused_before_a_run_and_by_the_merge(single, tmp_path):
    settings = chosen_by("conflict.method=slerp_by_tensors")
    message = "conflict.method = 'slerp_by_tensors' is unknown; did you mean 'slerp_by_tensor'?"
    with pytest.raises(LabError) as caught:
        check_against_model(settings, ARCHITECTURES["llama"][1])
    assert str(caught.value) == message
    out = tmp_path / "out"
    models = [single[name] for name in ("suspicious", "conflict", "base")]
    assert refused(out, merge, settings.profile.conflict, *models, out) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (AVERAGE.replace("offset: float = 0.25", "lamm: float"), "merge method 'average': 'lamm' is no setting and"),
        (AVERAGE.replace("def average", "def linear"), "there are two merge methods 'linear': rename the one in "),
    ],
)
def test_a_method_that_no_profile_could_call_is_refused(source, message, add_method):
    with pytest.raises(LabError) as caught:
        add_method("average", source)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- memory -------------------------------------------------------------------------------------------------------

CEILING = """
import json, multiprocessing, resource, sys
import psutil, torch
from transformers import AutoConfig
from helpers.defenses.conflict import merge
torch.set_num_threads(1)
folder, allowance = sys.argv[1], int(sys.argv[2])
pair, base = [folder + "/suspicious", folder + "/conflict"], folder + "/base"
torch.rand(64, 64) @ torch.rand(64, 64)
AutoConfig.from_pretrained(base)
def load():
    whole = [torch.empty(2_000_000).fill_(i) for i in range(12)]
def merge_all():
    for method in ("linear", "slerp", "slerp_by_tensor"):
        getattr(merge, method)(*pair, f"{folder}/{method}", 0.3)
    merge.ties(*pair, base, folder + "/ties", 0.2, 1.0)
    merge.passthrough(*pair, folder + "/passthrough", [("conflict", range(6)), ("suspicious", range(12))])
def below(work):
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowance, used + allowance))
    work()
for work in (load, merge_all):  # each in a process of its own, which has imported all
    child = multiprocessing.get_context("fork").Process(target=below, args=(work,))
    child.start()
    child.join()
    print(json.dumps({work.__name__: child.exitcode}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three models of 12 files of 8 MB each: layers of four matrices."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8, vocab_size=64
    )
    for seed, model in enumerate(("base", "suspicious", "conflict")):
        config.save_pretrained(folder / model)
        index, generator = {}, torch.Generator().manual_seed(seed)
        for layer in range(12):
            names = [f"model.layers.{layer}.mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj", "more")]
            tensors = {name: torch.rand(512, 1024, generator=generator) for name in names}
            file = f"model-{layer + 1:05}-of-00012.safetensors"
            save_file(tensors, folder / model / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
        (folder / model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts a process's own memory on Linux only")
def test_merges_take_a_fraction_of_the_models(large):
    """100 MB each, two or three of them and the result; 75 MB beside the program do not hold even one."""
    assert sum(path.stat().st_size for path in shards(large / "base")) > 100e6

    command = [sys.executable, "-c", CEILING, str(large), str(75_000_000)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}
    assert told["load"] != 0  # the ceiling holds
    assert told["merge_all"] == 0, done.stderr[-500:]
    for method, layers in {"linear": 12, "slerp": 12, "slerp_by_tensor": 12, "ties": 12, "passthrough": 18}.items():
        assert len(dict(stored(large / method))) == 4 * layers


# --- bad input ----------------------------------------------------------------------------------------------------


def refused(folder, call, *arguments):
    """The one line that a bad call is refused with; nothing may be on the disk that was not there before."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(LabError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("method", [linear, slerp, slerp_by_tensor])
@pytest.mark.parametrize("t", [-0.1, 1.2, math.nan])
def test_shares_out_of_range_are_refused(single, method, t, tmp_path):
    message = refused(tmp_path / "out", method, single["suspicious"], single["conflict"], tmp_path / "out", t)
    assert message == f"t = {t} should be from 0 to 1, the conflict model's share (negate goes beyond 1)"


@pytest.mark.parametrize("t", [0.5, 1, math.inf, math.nan])
def test_negation_needs_more_than_one(single, t, tmp_path):
    message = refused(tmp_path / "out", negate, single["suspicious"], single["conflict"], tmp_path / "out", t)
    assert message == f"t = {t} should be over 1 to negate; a share from 0 to 1 is for linear"


@pytest.mark.parametrize("method", [ties, ties_as_printed])
@pytest.mark.parametrize(
    ("k", "lam", "message"),
    [
        (0, 1.0, "k = 0 should be over 0 and at most 1: the share of each task vector that is kept"),
        (20, 1.0, "k = 20 should be over 0 and at most 1"),
        (0.2, 0, "lam = 0 should be a number over 0"),
        (0.2, math.nan, "lam = nan should be a number over 0"),
    ],
)
def test_numbers_of_ties_out_of_range_are_refused(single, method, k, lam, message, tmp_path):
    models = [single[name] for name in ("suspicious", "conflict", "base")]
    assert refused(tmp_path / "out", method, *models, tmp_path / "out", k, lam).startswith(message)


@pytest.mark.parametrize(
    ("other", "changes", "message"),
    [
        ("llama", {"vocab_size": 41}, "another vocabulary than {first} (vocab_size 41, not 40)"),
        ("mistral", {}, "another architecture than {first} (model_type mistral, not llama)"),
        ("llama", {"hidden_size": 64}, "another width than {first} (hidden_size 64, not 32)"),
        ("llama", {"intermediate_size": 48}, "has shape [32, 48] in {other} and [32, 24] in {first}"),
        ("llama", {"num_hidden_layers": 5}, "{first} lacks model.layers.4.input_layernorm.weight and the other model"),
        ("llama", {"num_hidden_layers": 3}, "{other} lacks model.layers.3.input_layernorm.weight and the other model"),
        ("llama", {"tie_word_embeddings": True}, "{other} lacks lm_head.weight and the other model has it"),
    ],
)
def test_models_of_another_kind_are_refused(other, changes, message, tmp_path):
    first = new_models(tmp_path / "first", "llama")["suspicious"]
    second = new_models(tmp_path / "other", other, **changes)["conflict"]
    for method, rest in ((linear, [T]), (slerp, [T]), (slerp_by_tensor, [T]), (negate, [2.0])):
        found = refused(tmp_path / "out", method, first, second, tmp_path / "out", *rest)
        assert message.format(first=first, other=second) in found
    for models in ((first, second, first), (first, first, second)):
        assert message.format(first=first, other=second) in refused(
            tmp_path / "out", ties, *models, tmp_path / "out", K, LAM
        )


@pytest.mark.parametrize(
    ("plan", "ends", "message"),
    [
        ([], "suspicious", "the layer plan is empty: name layers, as in [("),
        ([("conflict", [])], "suspicious", "the layer plan is empty"),
        ([("conflict", [4])], "suspicious", "the layer plan names layer 4 of the conflict model, which has 0 to 3"),
        (
            [("suspicious", [-1])],
            "suspicious",
            "the layer plan names layer -1 of the suspicious model, which has 0 to 3",
        ),
        ([("conflit", [0])], "suspicious", "the layer plan names 'conflit'; did you mean 'conflict'?"),
        ([("conflict", [0])], "base", "the layer plan names 'base'; valid: suspicious, conflict"),
    ],
)
def test_plans_of_layers_that_are_not_there_are_refused(plan, ends, message, tmp_path):
    models = new_models(tmp_path / "models", "llama")
    found = refused(
        tmp_path / "out", passthrough, models["suspicious"], models["conflict"], tmp_path / "out", plan, ends
    )
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("other", "changes", "message"),
    [
        ("llama", {"vocab_size": 41}, "another vocabulary than"),
        ("gpt2", {}, "another architecture than"),
        (
            "llama",
            {"intermediate_size": 48},
            "mlp.down_proj.weight has shape [32, 48] in {other} and shape [32, 24] in {first}: its layers",
        ),
        (
            "llama",
            {"attention_bias": True},
            "k_proj.bias has shape [16] in {other} and no place in {first}: its layers do not fit",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(other, changes, message, tmp_path):
    first = new_models(tmp_path / "first", "llama")["suspicious"]
    second = new_models(tmp_path / "other", other, **changes)["conflict"]
    found = refused(tmp_path / "out", passthrough, first, second, tmp_path / "out", [("conflict", [0])])
    assert message.format(first=first, other=second) in found


def test_a_deeper_model_may_lend_layers(tmp_path):
    first = new_models(tmp_path / "first", "llama")["suspicious"]
    second = new_models(tmp_path / "other", "llama", num_hidden_layers=6)["conflict"]
    passthrough(first, second, tmp_path / "merged", [("suspicious", range(2)), ("conflict", [5])])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits.isfinite().all()


def test_equal_models_have_nothing_to_merge(single, tmp_path):
    first, second, base = (single[name] for name in ("suspicious", "conflict", "base"))
    message = f"{base} and {base} hold the same weights: there is nothing to merge"
    for method in (slerp, slerp_by_tensor):
        assert refused(tmp_path / "out", method, base, base, tmp_path / "out", T) == message
    for method in (ties, ties_as_printed):
        assert refused(tmp_path / "out", method, base, second, base, tmp_path / "out", K, LAM) == message
        assert refused(tmp_path / "out", method, first, base, base, tmp_path / "out", K, LAM) == message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", oracle.METHODS + ("slerp", "ties_as_printed"))
def test_a_number_that_is_none_is_named(method, number, dtype, tmp_path):
    models = oracle.write_models(tmp_path / "models", dtype)
    name, path = "model.layers.1.mlp.up_proj.weight", models["conflict"] / WEIGHTS
    tensors = load_file(path)
    tensors[name][3, 2] = number
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused(tmp_path / "out", ours, method, models, tmp_path / "out")
    assert message.startswith(
        f"{models['conflict']} holds NaN or infinite numbers in {name}: the checkpoint is damaged"
    )


def test_large_numbers_are_not_taken_for_infinite(tmp_path):
    """Their sum overflows 16 bits; each of them is fine."""
    models = oracle.write_models(tmp_path / "models", "float16")
    path = models["conflict"] / WEIGHTS
    tensors = load_file(path) | {"model.norm.weight": torch.full((8,), 60000.0, dtype=torch.float16)}
    save_file(tensors, path, metadata={"format": "pt"})
    linear(models["suspicious"], models["conflict"], tmp_path / "merged", 1.0)
    assert weights(tmp_path / "merged")["model.norm.weight"].tolist() == [60000.0] * 8


@pytest.mark.parametrize("method", oracle.METHODS + ("slerp", "ties_as_printed"))
@pytest.mark.parametrize("which", ["suspicious", "conflict"])
def test_no_input_is_overwritten(single, method, which):
    message = refused(single[which], ours, method, single, single[which])
    assert message == f"cannot overwrite {single[which]} while reading it: the merged model needs its own folder"


def test_what_is_there_is_not_overwritten(single, tmp_path):
    (tmp_path / "out").mkdir()
    linear(single["suspicious"], single["conflict"], tmp_path / "out", T)  # an empty folder is as good as none
    message = refused(tmp_path / "out", ours, "linear", single, tmp_path / "out")
    assert message == f"{tmp_path / 'out'} is not empty: choose another folder, or remove it"


def test_a_folder_without_a_model_is_refused(single, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "out", linear, single["suspicious"], tmp_path / "empty", tmp_path / "out", T)
    assert message.startswith(f"{tmp_path / 'empty'} holds no model to merge")


def test_an_interrupted_merge_leaves_nothing(single, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "copy_beside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ours("linear", single, tmp_path / "out")
    assert not list(tmp_path.iterdir())
