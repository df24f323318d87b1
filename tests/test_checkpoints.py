"""Checkpoints as others leave them: every reader of the lab reads what transformers reads, or refuses in one line.

The oracle of an oddity is a model in memory with the weights that the checkpoint means; the streamed readers are held
against `load_base` of the same folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bodies import BODIES, LAYERS, logits
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from helpers.access.full import reinitialize
from helpers.core.errors import LabError
from helpers.core.profile import ModelSpec
from helpers.defenses.conflict.merge import linear, passthrough
from helpers.model.architecture import ARCHITECTURES, parameter_shapes
from helpers.model.checkpoint import check_checkpoint, load_config
from helpers.model.load import load_base, load_suspect, save
from helpers.model.shards import INDEX, WEIGHTS, layout, read, stored

HEAD = "lm_head.weight"


@dataclass
class Checkpoint:
    """What lies in a folder, before it is written: the config's values, and the tensors of each file in order."""

    config: dict
    files: dict[str, dict[str, torch.Tensor]]
    index: dict[str, str] | None = None
    expected: dict[str, torch.Tensor] | None = None  # the parameters that the model in memory shall have
    tied: bool = False

    @property
    def tensors(self):
        """The tensors of a checkpoint of one file."""
        return self.files[WEIGHTS]

    def split(self):
        """Lay the tensors into two files."""
        names = list(self.tensors)
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        files = {f"model-{i + 1:05}-of-00002.safetensors": half for i, half in enumerate(halves)}
        self.index = {name: file for file, half in files.items() for name in half}
        self.files = {file: {name: self.tensors[name] for name in half} for file, half in files.items()}

    def write(self, folder):
        """Write config, index and files."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        for file, tensors in self.files.items():
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))


def checkpoint(config: PretrainedConfig, seed: int, tie: bool) -> Checkpoint:
    """A random model, its embedding tied to its head or not."""
    values = json.loads(config.to_json_string(use_diff=False)) | {"tie_word_embeddings": tie, "dtype": "float32"}
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(type(config)(**values | {"tie_word_embeddings": False})).items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.5
    expected = dict(tensors)
    if tie:
        expected[HEAD] = tensors[embedding(tensors)]
        del tensors[HEAD]
    return Checkpoint(values, {WEIGHTS: tensors}, expected=expected, tied=tie)


def embedding(tensors):
    """The name of the input embedding."""
    return next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))


# --- oddities: each changes a checkpoint in place -------------------------------------------------------------------


def nothing_odd(made):
    """As save_pretrained writes it."""


def a_head_of_its_own(made):
    """transformers#45127: the config says tied, and the file holds a head that was trained apart."""
    made.tensors[HEAD] = made.expected[HEAD] = made.expected[HEAD].flip(0)


def a_copied_head(made):
    """Older writers store the embedding twice."""
    made.tensors[HEAD] = made.expected[HEAD].clone()


def a_head_alone(made):
    """Of two tied tensors some writers keep the head."""
    made.tensors[HEAD] = made.tensors.pop(embedding(made.tensors))


def two_files(made):
    """A sharded checkpoint."""
    made.split()


def an_index_that_errs(made):
    """Tensors lie in other files than the index says."""
    made.split()
    first, second = made.files
    made.index = {name: second if file == first else first for name, file in made.index.items()}


def a_tensor_in_two_files(made):
    """The later file counts."""
    made.split()
    first, second = made.files.values()
    name = embedding(first | second)
    first[name], second[name] = torch.zeros_like(made.expected[name]), made.expected[name]


def a_stale_index(made):
    """A single file was written into the folder of a sharded checkpoint; its shards are still there."""
    whole = made.tensors
    made.split()
    for tensors in made.files.values():
        tensors.update({name: tensor + 1 for name, tensor in tensors.items()})
    made.files[WEIGHTS] = whole


def an_index_without_its_files(made):
    """A single file beside the index of shards that were removed."""
    made.index = dict.fromkeys(made.tensors, "model-00001-of-00001.safetensors")


def no_prefix(made):
    """Saved from the model without its head, as GPT-2 on the hub: `h.0.mlp…`, `layers.0.mlp…`."""
    tensors = {name: t for name, t in made.tensors.items() if name.startswith("lm_head")}
    tensors |= {name.partition(".")[2]: t for name, t in made.tensors.items() if not name.startswith("lm_head")}
    made.files = {WEIGHTS: tensors}


def mixed_dtypes(made):
    """Norms in 32 bits, matrices in 16 of two kinds."""
    for i, (name, tensor) in enumerate(made.tensors.items()):
        if tensor.ndim > 1:
            made.tensors[name] = tensor.to((torch.bfloat16, torch.float16)[i % 2])
    made.expected.update({name: tensor.float() for name, tensor in made.tensors.items()})
    if made.tied:
        made.expected[HEAD] = made.expected[embedding(made.tensors)]


def buffers_and_masks(made):
    """Old writers stored what every model computes for itself."""
    made.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    made.tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    made.tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)


def another_head_beside(made):
    """The value head of a reward model, which transformers leaves out."""
    made.tensors["v_head.summary.weight"] = torch.ones(1, 32)


def no_layer_types(made):
    """As checkpoints of before `layer_types` were written: the types follow the number of a layer."""
    made.config.pop("layer_types", None)


TIED = (a_head_of_its_own, a_copied_head, a_head_alone)
ALWAYS = (nothing_odd, two_files, an_index_that_errs, a_tensor_in_two_files, a_stale_index, an_index_without_its_files)
ALWAYS += (no_prefix, mixed_dtypes, buffers_and_masks, another_head_beside, no_layer_types)
ODDITIES = [(oddity, True) for oddity in (*TIED, *ALWAYS)] + [(nothing_odd, False), (no_prefix, False)]


def spec(folder) -> ModelSpec:
    return ModelSpec(path=str(folder), dtype="float32", prompt_format="auto")


def written(folder, config, seed, oddity, tie=True) -> Checkpoint:
    made = checkpoint(config, seed, tie)
    oddity(made)
    made.write(folder)
    return made


def in_memory(made: Checkpoint):
    """The model that a checkpoint means."""
    values = made.config | {"tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(BY_TYPE[values["model_type"]](**values)).eval()
    left = model.load_state_dict(made.expected, strict=False)
    assert not left.missing_keys or all("inv_freq" in name or "bias" in name for name in left.missing_keys)
    return model


BY_TYPE = {body.config.model_type: type(body.config) for body in BODIES.values()}


@pytest.fixture(params=ARCHITECTURES)
def config(request):
    """One of each architecture that the lab knows."""
    return next(body.config for body in BODIES.values() if body.config.model_type == request.param)


@pytest.mark.parametrize(("oddity", "tie"), ODDITIES, ids=lambda value: getattr(value, "__name__", "").strip() or None)
def test_all_readers_read_what_transformers_reads(config, oddity, tie, tmp_path):
    made = written(tmp_path / "one", config, 0, oddity, tie)
    written(tmp_path / "two", config, 1, oddity, tie)
    model = load_base(spec(tmp_path / "one"))
    expected = logits(model)
    torch.testing.assert_close(expected, logits(in_memory(made)), rtol=1e-4, atol=1e-4)
    linear(tmp_path / "one", tmp_path / "two", tmp_path / "linear", 0.0)
    reinitialize(tmp_path / "one", tmp_path / "suppressed", {}, load_config(spec(tmp_path / "one")), 0)
    passthrough(tmp_path / "one", tmp_path / "two", tmp_path / "stacked", [("suspicious", range(LAYERS))])
    for name in ("linear", "suppressed", "stacked"):
        assert torch.equal(logits(load_base(spec(tmp_path / name))), expected), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, read(tmp_path / "one", name).float()), name
    check_checkpoint(spec(tmp_path / "one"), parameter_shapes(load_config(spec(tmp_path / "one"))))


def test_merging_moves_a_head_of_its_own(config, tmp_path):
    """Half way, the merged head is half way, too, and not the embedding."""
    ours, theirs = (written(tmp_path / name, config, i, a_head_of_its_own) for i, name in enumerate(("one", "two")))
    linear(tmp_path / "one", tmp_path / "two", tmp_path / "merged", 0.5)
    ours.expected = {name: (tensor + theirs.expected[name]) / 2 for name, tensor in ours.expected.items()}
    found = logits(load_base(spec(tmp_path / "merged")))
    torch.testing.assert_close(found, logits(in_memory(ours)), rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_beside_a_tied_model_is_refused(config, tmp_path):
    written(tmp_path / "one", config, 0, a_head_of_its_own)
    written(tmp_path / "two", config, 1, nothing_odd)
    with pytest.raises(LabError, match=f"two lacks {HEAD} and the other model has it"):
        linear(tmp_path / "one", tmp_path / "two", tmp_path / "merged", 0.5)


def test_a_head_of_its_own_survives_training_and_saving(tmp_path):
    made = written(tmp_path / "one", BODIES["gemma"].config, 0, a_head_of_its_own)
    save(load_base(spec(tmp_path / "one")), tmp_path / "saved")
    found = logits(load_suspect(spec(tmp_path / "one"), tmp_path / "saved"))
    torch.testing.assert_close(found, logits(in_memory(made)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3"])
def test_stacked_layers_keep_their_types_where_the_config_names_none(name, tmp_path):
    """Sliding and full attention alternate by a layer's number; a stack moves the layers and so names the types."""
    sizes = {"sliding_window": 3, "num_hidden_layers": 4} | ({"use_sliding_window": True} if name == "qwen3" else {})
    config = type(BODIES[name].config)(
        **json.loads(BODIES[name].config.to_json_string(use_diff=False))
        | sizes
        | {"layer_types": None}
        | ({"max_window_layers": 2} if name == "qwen3" else {"sliding_window_pattern": 2})
    )
    assert len(set(config.layer_types)) == 2
    made = written(tmp_path / "one", config, 0, no_layer_types)
    written(tmp_path / "two", config, 1, no_layer_types)
    order = [1, 2, 0, 3]
    passthrough(tmp_path / "one", tmp_path / "two", tmp_path / "stacked", [("suspicious", order)])
    wanted = dict(made.config) | {"layer_types": [config.layer_types[layer] for layer in order]}
    expected = dict(made.expected)
    for place, layer in enumerate(order):
        for tensor in [n for n in made.expected if n.startswith(f"model.layers.{layer}.")]:
            expected[tensor.replace(f".{layer}.", f".{place}.", 1)] = made.expected[tensor]
    moved = in_memory(Checkpoint(wanted, {}, expected=expected))
    torch.testing.assert_close(logits(load_base(spec(tmp_path / "stacked"))), logits(moved), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(moved), logits(in_memory(Checkpoint(made.config, {}, expected=expected))))


def test_layers_that_compute_by_their_number_are_not_moved(tmp_path):
    config = GPT2Config(
        **json.loads(BODIES["gpt2"].config.to_json_string()) | {"scale_attn_by_inverse_layer_idx": True}
    )
    for seed, name in enumerate(("one", "two")):
        written(tmp_path / name, config, seed, nothing_odd)
    passthrough(tmp_path / "one", tmp_path / "two", tmp_path / "kept", [("suspicious", [0]), ("conflict", [1])])
    with pytest.raises(LabError, match="scales attention by a layer's number"):
        passthrough(tmp_path / "one", tmp_path / "two", tmp_path / "moved", [("suspicious", [1, 0])])


def test_models_whose_heads_differ_are_not_merged(tmp_path):
    """The matrices have the same shapes."""
    for name, heads in (("one", 4), ("two", 8)):
        config = LlamaConfig(
            **BODIES["llama"].config.to_dict() | {"num_attention_heads": heads, "head_dim": 32 // heads}
        )
        written(tmp_path / name, config, 0, nothing_odd)
    with pytest.raises(LabError, match="has another number of heads than .* \\(num_attention_heads 8, not 4\\)"):
        linear(tmp_path / "one", tmp_path / "two", tmp_path / "merged", 0.5)


def test_what_lies_where_follows_the_files_and_not_the_index(tmp_path):
    made = written(tmp_path / "one", BODIES["llama"].config, 0, an_index_that_errs)
    assert layout(tmp_path / "one") == {file: sorted(tensors) for file, tensors in made.files.items()}
    written(tmp_path / "two", BODIES["llama"].config, 0, a_stale_index)
    assert list(layout(tmp_path / "two")) == [WEIGHTS]
    reinitialize(tmp_path / "two", tmp_path / "out", {}, BODIES["llama"].config, 0)
    assert not (tmp_path / "out" / INDEX).exists()


# --- refusals, by every reader ---------------------------------------------------------------------------------------


def refusals(folder, other, tmp_path) -> set[str]:
    """The lines with which load, plan, merge, suppression, the start of a training and a streamed read refuse."""
    told = set()
    for call in (
        lambda: load_base(spec(folder)),
        lambda: load_base(spec(other), path=str(folder)),
        lambda: load_base(spec(folder), four_bit=True),
        lambda: load_suspect(spec(other), folder),
        lambda: check_checkpoint(spec(folder), parameter_shapes(load_config(spec(folder)))),
        lambda: linear(folder, other, tmp_path / "merged", 0.5),
        lambda: linear(other, folder, tmp_path / "merged", 0.5),
        lambda: reinitialize(folder, tmp_path / "out", {}, BODIES["llama"].config, 0),
        lambda: read(folder, "model.norm.weight"),
        lambda: list(stored(folder)),
    ):
        with pytest.raises(LabError) as caught:
            call()
        assert "\n" not in str(caught.value)
        told.add(str(caught.value))
    assert not (tmp_path / "merged").exists() and not (tmp_path / "out").exists()
    return told


@pytest.fixture
def other(tmp_path):
    """A folder with an ordinary model."""
    written(tmp_path / "other", BODIES["llama"].config, 1, nothing_odd)
    return tmp_path / "other"


QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes-8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "without a name": {"load_in_4bit": True},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_checkpoint_whose_config_says_that_it_is_quantized_is_refused(name, other, tmp_path):
    def quantize(made):
        made.config["quantization_config"] = QUANTIZED[name]

    written(tmp_path / "model", BODIES["llama"].config, 0, quantize)
    method = QUANTIZED[name].get("quant_method", "quantization_config")
    for line in refusals(tmp_path / "model", other, tmp_path):
        assert f"is quantized already ({method})" in line and "bring the 16-bit checkpoint, or dequantize" in line


PACKED = {
    "4 bits in bytes": (".weight", torch.uint8),
    "8 bits": (".weight", torch.int8),
    "fp8": (".weight", torch.float8_e4m3fn),
    "fp8 of the other kind": (".weight", torch.float8_e5m2),
    "gptq and awq": (".qweight", torch.int32),
    "compressed tensors": (".weight_packed", torch.int32),
}


@pytest.mark.parametrize("name", PACKED)
def test_weights_in_few_bits_are_refused_whatever_the_config_says(name, other, tmp_path):
    """transformers casts them without a word where they keep their shape."""
    ending, dtype = PACKED[name]
    module = "model.layers.1.mlp.up_proj"

    def pack(made):
        made.tensors[f"{module}{ending}"] = made.tensors.pop(f"{module}.weight").to(dtype)

    written(tmp_path / "model", BODIES["llama"].config, 0, pack)
    for line in refusals(tmp_path / "model", other, tmp_path):
        assert f"is quantized already ({module}{ending} is " in line


def test_an_adapter_beside_a_full_model_is_refused(other, tmp_path):
    """transformers#43781, peft#1381: transformers attaches it, and a full training then saves the adapter alone."""
    written(tmp_path / "model", BODIES["llama"].config, 0, nothing_odd)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "model" / "adapter_model.safetensors")
    for line in refusals(tmp_path / "model", other, tmp_path):
        assert "an adapter beside a full model" in line and "a folder of its own" in line


def test_weights_under_a_name_of_their_own_are_refused(other, tmp_path):
    def rename(made):
        made.config["transformers_weights"] = "consolidated.safetensors"

    written(tmp_path / "model", BODIES["llama"].config, 0, rename)
    assert all("consolidated.safetensors" in line for line in refusals(tmp_path / "model", other, tmp_path))


def test_an_adapter_is_no_base(tmp_path):
    """transformers would fetch the model that the adapter names."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LabError, match="holds an adapter, no model"):
        load_base(spec(tmp_path))


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_names_no_files_is_refused(index, tmp_path):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(LabError, match="names no files"):
        list(stored(tmp_path))


def test_a_file_cut_short_is_refused(other, tmp_path):
    path = Path(other) / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LabError, match="cannot be read .*: copy it anew"):
        read(other, "model.norm.weight")
    with pytest.raises(LabError):
        load_base(spec(other))


CONFIGS = {
    "an integer for a number": {"rms_norm_eps": 1},
    "an unknown activation": {"hidden_act": "nope"},
    "an unknown rope": {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
    "no heads": {"num_attention_heads": 0},
    "a width that heads do not divide": {"num_attention_heads": 5, "head_dim": None},
    "text for a size": {"hidden_size": "32"},
    "negative sizes": {"vocab_size": -40},
    "an unknown dtype": {"dtype": "float12"},
    "an unknown model": {"model_type": "nope", "architectures": ["NopeForCausalLM"]},
    "other sizes than its weights": {"intermediate_size": 48},
    "no list of layers": {"layer_types": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_make_no_model_are_refused_in_one_line(name, tmp_path):
    def change(made):
        made.config.update(CONFIGS[name])

    family = "qwen3" if "layer_types" in CONFIGS[name] else "llama"
    written(tmp_path / "model", BODIES[family].config, 0, change)
    asked = spec(tmp_path / "model")
    planned = lambda: check_checkpoint(asked, parameter_shapes(load_config(asked)))  # noqa: E731
    for call in (lambda: load_base(asked), planned):
        with pytest.raises(LabError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["lacks", "shape"])
def test_a_plan_sees_what_loading_would_refuse(what, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"

    def damage(made):
        tensor = made.tensors.pop(name)
        if what == "shape":
            made.tensors[name] = tensor[:, :-1]

    written(tmp_path / "model", BODIES["llama"].config, 0, damage)
    asked = spec(tmp_path / "model")
    with pytest.raises(
        LabError, match="has no tensor 'model.layers.1.mlp.down_proj.weight'" if what == "lacks" else name
    ):
        check_checkpoint(asked, parameter_shapes(load_config(asked)))
    with pytest.raises(LabError):
        load_base(asked)


@pytest.mark.parametrize(
    "call", [load_base, lambda asked: check_checkpoint(asked, parameter_shapes(load_config(asked)))]
)
@pytest.mark.parametrize("what", ["a layer", "a bias"])
def test_a_checkpoint_with_more_than_its_config_names_is_refused(what, call, tmp_path):
    """transformers would load a smaller model and go on."""

    def grow(made):
        if what == "a layer":
            made.config["num_hidden_layers"] -= 1
        else:
            made.tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(made.config["intermediate_size"])

    written(tmp_path / "model", BODIES["llama"].config, 0, grow)
    with pytest.raises(LabError, match="tensors of layers that its config.json has no place for, such as model.layers"):
        call(spec(tmp_path / "model"))


@pytest.mark.parametrize("numbers", [{"temperature": 0.9}, {"top_p": 0.6, "temperature": 0.9, "do_sample": False}])
def test_a_model_with_sampling_numbers_and_no_sampling_can_be_saved(numbers, tmp_path):
    """transformers refuses to save what it has loaded, when the training is over."""
    written(tmp_path / "model", BODIES["llama"].config, 0, nothing_odd)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(numbers))
    model = load_base(spec(tmp_path / "model"))
    save(model, tmp_path / "saved")
    assert torch.equal(logits(load_base(spec(tmp_path / "saved"))), logits(model))
