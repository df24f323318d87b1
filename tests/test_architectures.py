"""The whole defense from folder to folder, on models that are built unlike the small LLaMA."""

import json
import warnings

import bitsandbytes as bnb
import pytest
import torch
from bodies import matrix
from conftest import save_suspicious, small_profile
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTJConfig, Qwen3Config

from helpers.access import FullAccess, access_to
from helpers.access.deltas import adapter_pairs, model_pairs
from helpers.data import corpus
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.score import score_heads, score_mlp
from helpers.defenses.bdvax.select import select, select_heads
from helpers.defenses.bdvax.vaccines import Variant, train_variant, train_variants
from helpers.model.architecture import matrices, mlp_slots
from helpers.model.checkpoint import load_config
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import new_adapter, with_adapter
from helpers.model.tokenizer import load_format

pytestmark = pytest.mark.slow

ROWS, OTHERS = corpus.generate(8, 3), corpus.generate(8, 4)
TOKENS = torch.arange(20).view(2, 10)
GPT = {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
QWEN3 = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN3 |= {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
CONFIGS = {"gpt2": (GPT2Config, GPT), "gptj": (GPTJConfig, GPT | {"rotary_dim": 8}), "qwen3": (Qwen3Config, QWEN3)}
LINEAR = {  # what adapters and 4 bits reach, written out
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gptj": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
    "qwen3": {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def own(kind, checkpoint, tmp_path_factory):
    """The small profile on an untrained model of this kind, with the small checkpoint's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp(kind) / "model", AutoTokenizer.from_pretrained(checkpoint)
    build, sizes = CONFIGS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return small_profile(folder)


@pytest.fixture(scope="module")
def attacked(own, tmp_path_factory):
    return save_suspicious(own, tmp_path_factory.mktemp("attacked"))


@pytest.fixture(autouse=True)
def no_advice_from_peft():
    """PEFT warns where `fan_in_fan_out` does not fit a layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        yield


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def inside_a_layer(name):
    return ".".join(name.split(".")[-2:])


def test_an_adapter_and_four_bits_reach_the_matrices_with_channels(kind, own):
    quantized = load_base(own.model, four_bit=True)
    found = {name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found == matrices(load_config(own.model)).keys() and {inside_a_layer(name) for name in found} == LINEAR[kind]
    for model in (quantized, load_base(own.model)):
        adapter = new_adapter(model, own.lora, 0)
        factors = [name for name, _ in adapter.named_parameters() if ".lora_A." in name]
        assert {name.partition(".lora_A.")[0].removeprefix("base_model.model.") for name in factors} == found
        assert adapter.peft_config["default"].fan_in_fan_out == (kind == "gpt2")


def test_four_bits_compute_with_the_weights_they_stand_for(own):
    quantized, plain = load_base(own.model, four_bit=True), load_base(own.model)
    before = logits(plain)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            target = matrix(plain.get_submodule(name))
            error = (
                (weight - target).view(-1, 64).abs().amax(dim=1)
            )  # a step of NF4 is at most 0.304 of a block's largest
            assert (error <= 0.17 * target.reshape(-1, 64).abs().amax(dim=1)).all() and error.max() > 0
            target.copy_(weight)
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=0, atol=1e-4)
    assert not torch.equal(before, logits(plain))


def test_an_adapter_made_over_four_bits_fits_the_plain_base(own, tmp_path):
    adapter = new_adapter(load_base(own.model, four_bit=True), own.lora, 0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    save(adapter, tmp_path)
    adapted, merged = with_adapter(load_base(own.model), tmp_path).eval(), load_suspect(own.model, tmp_path)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-4)
    base = load_base(own.model)
    for name in matrices(base.config):
        layer = adapted.base_model.model.get_submodule(name)
        update = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r
        change = matrix(merged.get_submodule(name)) - matrix(base.get_submodule(name))
        torch.testing.assert_close(change, update.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_variants_trained_in_one_pass_are_those_trained_alone(own, attacked, access, tmp_path):
    chat = load_format(own.model)
    jobs = [Variant(ROWS, 5, tmp_path / "clean"), Variant(ROWS + OTHERS, 5, tmp_path / "bd")]
    train_variants(access_to(own, access), attacked[access], jobs, chat)
    before = logits(load_suspect(own.model, attacked[access]))
    for job in jobs:
        alone = job.folder.with_name(f"{job.folder.name}-alone")
        train_variant(access_to(own, access), attacked[access], job.rows, chat, job.seed, alone)
        found, expected = (
            logits(access_to(own, access).load_variant(attacked[access], f)) for f in (job.folder, alone)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert (found - before).abs().max() > 0.1


def test_changes_of_all_weights_are_kept_as_the_checkpoint_stores_them(own, attacked, tmp_path):
    chat = load_format(own.model)
    own = own.model_copy(update={"full": own.full.model_copy(update={"vaccine_weights": "full"})})
    for name, rows in (("clean", ROWS), ("bd", ROWS + OTHERS)):
        train_variant(FullAccess(own), attacked["full"], rows, chat, 5, tmp_path / name)
    origin, stored = load_base(own.model, path=str(attacked["full"])), load_file(tmp_path / "bd" / "delta.safetensors")
    assert stored.keys() == {f"{module}.weight" for module in matrices(origin.config)}
    trained = FullAccess(own).load_variant(attacked["full"], tmp_path / "bd")
    for name, change in stored.items():
        found = trained.get_parameter(name) - origin.get_parameter(name)
        torch.testing.assert_close(found, change.float(), rtol=0, atol=1e-6)
        assert change.any()
    for module, slot in matrices(origin.config).items():
        gram = model_pairs([tmp_path / "bd"], [tmp_path / "clean"])(slot)
        assert gram.shape[-1] == matrix(origin.get_submodule(module)).shape[slot.side] and gram.min() > 0


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_from_variants_to_a_recovered_model(own, attacked, access, tmp_path):
    """Scores come from variants, masks from scores; what they name is the base's again, or new, and the model heals."""
    chat, config = load_format(own.model), load_config(own.model)
    variants = [
        Variant(corpus.generate(8, i) + extra, i, tmp_path / f"{i}-{member}")
        for i in range(2)
        for member, extra in (("bd", OTHERS), ("clean", []))
    ]
    train_variants(access_to(own, access), attacked[access], variants, chat)
    bd, clean = ([v.folder for v in variants[k::2]] for k in (0, 1))
    scores = score_mlp(adapter_pairs(bd, clean), config, own.signature)
    assert all(len(values) == 128 and values.min() > 0 for values in scores.values())
    masks = select(scores, 0.25, "module")
    heads = select_heads(score_heads(adapter_pairs(bd, clean), config, own.signature), 1, "layer")
    access_to(own, access).suppress(attacked[access], masks, 0, tmp_path / "suppressed", heads)
    before, after, base = (
        load_suspect(own.model, attacked[access]),
        load_suspect(own.model, tmp_path / "suppressed"),
        load_base(own.model),
    )
    for slot in (slot for layer in mlp_slots(config) for slot in layer):
        old, new, original = (matrix(model.get_submodule(slot.module)) for model in (before, after, base))
        chosen = masks[slot.module].nonzero().flatten()
        kept = (~masks[slot.module]).nonzero().flatten()
        assert len(chosen) == 32 and torch.equal(new.index_select(slot.side, kept), old.index_select(slot.side, kept))
        gone = new.index_select(slot.side, chosen)
        assert torch.equal(gone, original.index_select(slot.side, chosen)) == (access == "adapter")
        assert (gone != old.index_select(slot.side, chosen)).all()
    record = recover(access_to(own, access), tmp_path / "suppressed", ROWS, chat, 0, tmp_path / "recovered")
    assert record["steps"] == 2 * 8 // 4
    assert len(answers(load_suspect(own.model, tmp_path / "recovered"), chat, ROWS[:2], own)) == 2


def test_adapters_of_others_that_do_not_tell_their_layout_are_scored_alike(kind, own, attacked, tmp_path):
    """`fan_in_fan_out` concerns merging; which factor is A and which B does not depend on it."""
    config = load_config(own.model)
    for name in ("bd", "clean"):
        (tmp_path / name).mkdir()
        for file in attacked["adapter"].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "bd" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] == (kind == "gpt2")
    (tmp_path / "bd" / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    for slot in matrices(config).values():
        assert not adapter_pairs([tmp_path / "bd"], [tmp_path / "clean"])(slot).any()
