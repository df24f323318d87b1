"""Loading and saving: safetensors of any shape load and talk, pickles never run, 4 bits are 4 bits."""

import copy
import json
import os
import pickle
import shutil

import bitsandbytes as bnb
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from helpers.core.errors import LabError
from helpers.data.example import Example
from helpers.defenses.conflict.evidence import elicit
from helpers.measure.formats import measure_formats
from helpers.measure.report import checked_format
from helpers.model import checkpoint as checkpoints
from helpers.model import lora
from helpers.model.architecture import skeleton
from helpers.model.checkpoint import load_config, local_folder
from helpers.model.four_bit import kept_whole
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import new_adapter, with_adapter
from helpers.model.prompt import AlpacaFormat
from helpers.model.tokenizer import load_format, load_tokenizer, record_format, recorded_format, trained_format

QUESTIONS = [Example("Name three animals.", "cat, dog, cow"), Example("What is it?", "red", input="A tomato.")]
TOKENS = torch.arange(20).view(2, 10)
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def at(profile, folder, **changes):
    """The same settings for a model in another folder."""
    return profile.model.model_copy(update={"path": str(folder), **changes})


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def assert_talks(profile, spec):
    """The model loads and completes; the texts it writes come back."""
    texts = answers(load_base(spec), load_format(spec), QUESTIONS, profile)
    assert len(texts) == 2 and all(texts)
    return texts


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_the_same_model(profile, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load_base(at(profile, tmp_path))), logits(model.eval()))
    assert assert_talks(profile, at(profile, tmp_path)) == assert_talks(profile, profile.model)


def test_untied_embeddings_stay_two_matrices(profile, checkpoint, tmp_path):
    config = load_config(profile.model)
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    loaded = load_base(at(profile, tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert_talks(profile, at(profile, tmp_path))
    tied = load_base(profile.model)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_without_a_chat_template_auto_means_alpaca(profile, checkpoint, tmp_path):
    save(load_base(profile.model), tmp_path)
    tokenizer = load_tokenizer(profile.model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    auto = at(profile, tmp_path, prompt_format="auto")
    assert load_format(auto).name == "alpaca"
    assert load_format(at(profile, checkpoint, prompt_format="auto")).name == "chat"
    assert_talks(profile, auto)
    with pytest.raises(LabError, match="needs a tokenizer with a chat template"):
        load_format(at(profile, tmp_path, prompt_format="chat"))


def test_a_model_without_a_tokenizer_is_refused_in_one_line(profile, checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    shutil.copy(checkpoint / "model.safetensors", tmp_path)
    with pytest.raises(LabError, match="holds no tokenizer: copy the files that came with the model, such as token"):
        load_tokenizer(at(profile, tmp_path))


def test_a_tokenizer_without_padding_pads_with_its_end(profile, checkpoint, tmp_path):
    save(load_base(profile.model), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(at(profile, tmp_path)).pad_token == "<|end|>"
    assert load_tokenizer(profile.model).pad_token == "<|pad|>"


def test_the_settings_dtype_is_loaded_and_another_folder_may_hold_the_weights(profile, suspicious):
    half = load_base(profile.model.model_copy(update={"dtype": "bfloat16"}))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training
    other = load_base(profile.model, path=str(suspicious["full"]))
    assert not torch.equal(logits(other), logits(load_base(profile.model)))
    assert torch.equal(logits(other), logits(LlamaForCausalLM.from_pretrained(suspicious["full"]).eval()))


def test_the_folder_of_a_model_is_where_its_files_lie(profile, checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoints, "ROOT", checkpoint.parent)
    assert local_folder(profile.model) == local_folder(at(profile, checkpoint.name)) == str(checkpoint)


def bare_copy(checkpoint, folder, **changes):
    """The checkpoint with its tokenizer's bare file, and changes to the model's config."""
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(checkpoint / name, folder)
    settings = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_a_bare_tokenizer_takes_its_special_tokens_from_the_models_config(profile, checkpoint, several, tmp_path):
    whole = load_tokenizer(profile.model)
    end = [whole.eos_token_id, whole.pad_token_id] if several else whole.eos_token_id
    folder = bare_copy(checkpoint, tmp_path / "model", eos_token_id=end, bos_token_id=whole.bos_token_id)
    bare = load_tokenizer(at(profile, folder))
    assert (bare.eos_token, bare.bos_token) == (whole.eos_token, whole.bos_token)
    assert bare.get_vocab() == whole.get_vocab()
    alpaca = [load_format(at(profile, where, prompt_format="alpaca")) for where in (folder, checkpoint)]
    assert alpaca[0].encode(QUESTIONS[0], 96) == alpaca[1].encode(QUESTIONS[0], 96)
    assert_talks(profile, at(profile, folder, prompt_format="auto"))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma"])
def test_a_bare_tokenizer_gets_no_special_tokens_of_its_architecture(profile, checkpoint, kind, tmp_path):
    """transformers would add `<|endoftext|>`, for which the embedding has no row, or refuse for want of `<unk>`."""
    whole = load_tokenizer(profile.model)
    ends = {"eos_token_id": whole.eos_token_id, "bos_token_id": None, "model_type": kind}
    bare = load_tokenizer(at(profile, bare_copy(checkpoint, tmp_path / "model", **ends)))
    assert bare.eos_token == whole.eos_token and bare.bos_token is None and bare.get_vocab() == whole.get_vocab()


@pytest.mark.parametrize("end", [None, 100_000, []])
def test_a_tokenizer_whose_end_nobody_names_is_refused(profile, checkpoint, end, tmp_path):
    folder = bare_copy(checkpoint, tmp_path / "model", eos_token_id=end)
    with pytest.raises(LabError, match="no end-of-sequence token"):
        load_format(at(profile, folder, prompt_format="alpaca"))


def test_a_beginning_that_a_tokenizer_does_not_want_is_not_forced_on_it(profile, checkpoint, tmp_path):
    """Qwen's config names a beginning, its tokenizer none: no prompt begins with one."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    assert load_config(at(profile, folder)).bos_token_id is not None
    assert load_tokenizer(at(profile, folder)).bos_token is None


def test_a_tokenizer_larger_than_the_embedding_is_refused(profile, checkpoint, tmp_path):
    """transformers#12763: tokens were added and the embedding was not resized."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    tokenizer.save_pretrained(folder)
    message = rf"has ids up to {rows} \('<\|more\|>'\) and the model's embedding {rows} rows: resize it"
    for load in (load_tokenizer, load_format):
        with pytest.raises(LabError, match=message):
            load(at(profile, folder))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(rows + 8)  # as many pad it to a multiple
    model.save_pretrained(folder)
    assert len(load_tokenizer(at(profile, folder))) == rows + 1


# --- refusals -------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_checkpoint_is_refused_and_never_opened(profile, checkpoint, tmp_path):
    folder, crater = tmp_path / "model", tmp_path / "crater"
    load_config(profile.model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(crater)}))
    message = "only the pickle pytorch_model.bin, which can run code when loaded; .* with save_pretrained first"
    for load in (load_base, load_tokenizer, load_config):
        with pytest.raises(LabError, match=message):
            load(at(profile, folder))
    (folder / "other.safetensors").write_bytes(b"")  # no weights of this model: the pickle is no way out
    with pytest.raises(LabError, match="cannot load .*safetensors"):
        load_base(at(profile, folder))
    assert not crater.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert crater.exists()  # it would have gone off


def test_a_folder_without_weights_is_refused(profile, tmp_path):
    with pytest.raises(LabError, match="holds no weights; the lab reads safetensors"):
        load_base(at(profile, tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no-such/model", "cannot load 'no-such/model': .*give a folder with safetensors, or a hub id you can reach"),
        ("data/models/nothing-here", "model folder 'data/models/nothing-here' does not exist; `make base` makes"),
        ("/nothing/here", "model folder '/nothing/here' does not exist"),
    ],
)
def test_an_unknown_model_is_named(profile, monkeypatch, path, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (load_base, load_tokenizer, load_config):
        with pytest.raises(LabError, match=message) as told:
            load(at(profile, path))
        assert "\n" not in str(told.value)


def test_a_checkpoint_that_lacks_tensors_is_refused(profile, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.down_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LabError, match=f"lacks 1 of the model's tensors, such as {lost}"):
        load_base(at(profile, folder))


def test_an_adapter_that_does_not_fit_is_refused(profile, suspicious, tmp_path):
    folder = shutil.copytree(suspicious["adapter"], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(LabError, match=f"does not fit its base: 1 tensors differ, such as {lost}"):
        with_adapter(load_base(profile.model), folder)


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_new_adapter_covers_all_linear_layers_but_the_head_and_changes_nothing_yet(profile):
    model = new_adapter(load_base(profile.model), profile.lora, 0)
    adapted = [name.partition(".lora_A.")[0].split(".")[-1] for name, _ in model.named_modules() if ".lora_A." in name]
    assert set(adapted) == PROJECTIONS and len(adapted) == 2 * len(PROJECTIONS)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert torch.equal(logits(model.eval()), logits(load_base(profile.model)))


def test_the_same_adapter_is_the_same_file_in_every_process(profile, tmp_path):
    """PEFT keeps the names of the layers as a set, whose order is another one in each process."""
    model = new_adapter(load_base(profile.model), profile.lora, 3)
    save(model, tmp_path / "model")
    lora.save_adapter(model.peft_config["default"], lora.adapter_tensors(model), tmp_path / "tensors")
    for folder in ("model", "tensors"):
        layers = json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"]
        assert (
            layers == sorted(layers)
            and len(layers) == 14
            and set(layers) == model.peft_config["default"].target_modules
        )


def test_a_new_adapter_follows_its_seed(profile):
    def start(seed):
        model = new_adapter(load_base(profile.model), profile.lora, seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(start(4), start(4)) and not torch.equal(start(4), start(5))


def test_a_suspicious_adapter_is_merged_into_its_base(profile, suspicious):
    adapted = with_adapter(load_base(profile.model), suspicious["adapter"]).eval()
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    update = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r
    merged = load_suspect(profile.model, suspicious["adapter"])
    assert type(merged) is LlamaForCausalLM
    weight = load_base(profile.model).model.layers[1].mlp.up_proj.weight + update
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert update.abs().max() > 0.05


def test_only_safetensors_are_written_and_they_hold_every_bit(profile, tmp_path):
    written = {"full": load_base(profile.model), "adapter": new_adapter(load_base(profile.model), profile.lora, 2)}
    for name, model in written.items():
        save(model, tmp_path / name)
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".safetensors", ".json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = {
        "full": load_suspect(profile.model, tmp_path / "full"),
        "adapter": with_adapter(load_base(profile.model), tmp_path / "adapter"),
    }
    for name, model in written.items():
        weights = dict(loaded[name].named_parameters())
        assert all(torch.equal(before, weights[weight]) for weight, before in model.named_parameters())


# --- the prompt format beside a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_a_model_remembers_the_format_recorded_beside_it(profile, chat, suspicious, tmp_path, access):
    folder = shutil.copytree(suspicious[access], tmp_path / "model")
    assert recorded_format(folder) is None and trained_format(load_suspect(profile.model, folder)) is None
    record_format(folder, chat)
    assert json.loads((folder / "prompt_format.json").read_text()) == {"name": "chat", "template": chat.template}
    model = load_suspect(profile.model, folder)
    assert recorded_format(folder) == trained_format(model) == trained_format(copy.deepcopy(model)) == chat.record


def test_a_base_remembers_its_format_and_is_not_measured_in_another(profile, chat, checkpoint, tmp_path):
    assert trained_format(load_base(profile.model)) is None
    record_format(shutil.copytree(checkpoint, tmp_path / "base"), chat)
    base = load_base(profile.model.model_copy(update={"path": str(tmp_path / "base")}))
    assert trained_format(base) == chat.record and not checked_format(base, chat)
    alpaca = AlpacaFormat(chat.tokenizer)
    for measure in (
        checked_format,
        lambda *asked: measure_formats(*asked, None, None),
        lambda *a: elicit(*a, [], None),
    ):
        with pytest.raises(LabError, match="was trained with the prompt format 'chat' and would be measured with"):
            measure(base, alpaca)
    assert checked_format(base, alpaca, allow_mismatch=True)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"name": "chat"}'])
def test_a_damaged_record_of_the_format_is_told(tmp_path, text):
    (tmp_path / "prompt_format.json").write_text(text)
    with pytest.raises(LabError, match="should hold name and template of a prompt format: copy it anew, or remove it"):
        recorded_format(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_suspect_stored_in_32_bits_is_read_so(profile, suspicious, tmp_path, key):
    """`torch_dtype` is what older versions of transformers write."""
    folder = shutil.copytree(suspicious["full"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (folder / "config.json").write_text(json.dumps(config | {key: "float32"}))
    spec = profile.model.model_copy(update={"dtype": "bfloat16"})
    assert load_suspect(spec, folder).dtype == torch.float32


# --- four bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_nf4_with_double_quantization(profile, dtype):
    spec = profile.model.model_copy(update={"dtype": dtype})
    quantized, plain = load_base(spec, four_bit=True), load_base(profile.model)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    found = {name: module for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found.keys() == linear and len(linear) == 2 * len(PROJECTIONS)
    for name, module in found.items():
        state, weight = module.weight.quant_state, plain.get_submodule(name).weight
        assert state.quant_type == "nf4" and state.nested and state.absmax.dtype == torch.uint8 and state.state2
        assert module.weight.dtype == torch.uint8 and module.weight.numel() == weight.numel() / 2
        assert module.compute_dtype == getattr(torch, dtype) and not module.weight.requires_grad
        assert_within_a_quantization_step(bnb.functional.dequantize_4bit(module.weight.data, state), weight)


@torch.no_grad()
def assert_within_a_quantization_step(found, weight):
    """NF4's values lie at most 0.304 of a block's largest weight apart; half of that, and some for double rounding."""
    error = (found.float() - weight).view(-1, 64).abs().amax(dim=1)
    assert (error <= 0.17 * weight.view(-1, 64).abs().amax(dim=1)).all() and error.max() > 0


def test_four_bits_talk_like_the_weights_they_stand_for(profile, chat):
    quantized, plain = load_base(profile.model, four_bit=True), load_base(profile.model)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=0, atol=1e-4)
    assert answers(quantized, chat, QUESTIONS, profile) == answers(plain, chat, QUESTIONS, profile)


def test_widths_that_4_bits_get_wrong_on_a_cpu_stay_whole_and_the_rest_is_packed(odd, chat):
    quantized, plain = load_base(odd.model, four_bit=True), load_base(odd.model)
    packed = {name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert {name.rpartition(".")[2] for name in packed} == PROJECTIONS - {"down_proj"}
    for name, module in plain.named_modules():
        if name in packed:
            weight = quantized.get_submodule(name).weight
            module.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, torch.nn.Linear):
            assert torch.equal(quantized.get_submodule(name).weight, module.weight), name
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=0, atol=1e-4)
    assert answers(quantized, chat, QUESTIONS, odd) == answers(plain, chat, QUESTIONS, odd)


def test_a_gpu_packs_every_width(odd):
    bare = skeleton(load_config(odd.model))
    assert kept_whole(bare, "cuda") == []
    assert kept_whole(bare, "cpu") == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
