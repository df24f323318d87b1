"""Suppression: gone where it should be gone, bit-identical everywhere else."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from bodies import BODIES, HEADS, INNER, LAYERS, logits, mask_of, matrix
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import kstest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers.access.adapter import zero_adapter
from helpers.access.full import reinitialize
from helpers.core.errors import LabError
from helpers.model.architecture import attention_slots, channel_axes, mlp_slots

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATE, UP, DOWN = (slot.module for slot in mlp_slots(CONFIG)[1])
CHANNELS = [3, 4, 20]
TOKENS = torch.arange(22).view(2, 11)


def base_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def masks_for(*modules):
    mask = torch.zeros(24, dtype=torch.bool)
    mask[CHANNELS] = True
    return dict.fromkeys(modules, mask)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT adapter on every linear layer, with random factors."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, PROJECTIONS)
    return folder


def save_adapter(folder, projections):
    model = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=8, target_modules=projections))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    model.save_pretrained(folder)


@torch.no_grad()
def contributions(folder, module, width):
    """What LoRA adds to the outputs of `module` for given inputs, by PEFT's forward with and without the adapter."""
    model = PeftModel.from_pretrained(base_model(), folder).eval()
    layer = model.base_model.model.get_submodule(module)
    inputs = torch.randn(5, width, generator=torch.Generator().manual_seed(2))
    update = layer.lora_B["default"](layer.lora_A["default"](inputs)) * layer.scaling["default"]
    with_adapter = layer(inputs)
    with model.disable_adapter():
        torch.testing.assert_close(with_adapter, layer(inputs) + update)
        return update, with_adapter - layer(inputs)


@pytest.mark.parametrize("module", [GATE, UP])
def test_suppressed_rows_get_nothing_from_lora_and_others_the_same(adapter, tmp_path, module):
    zero_adapter(adapter, tmp_path, masks_for(GATE, UP, DOWN), CONFIG)
    before, _ = contributions(adapter, module, 32)
    after, seen = contributions(tmp_path, module, 32)
    kept = [j for j in range(24) if j not in CHANNELS]
    assert not after[:, CHANNELS].any() and not seen[:, CHANNELS].any()
    assert torch.equal(after[:, kept], before[:, kept]) and before[:, CHANNELS].all()


@torch.no_grad()
def test_suppressed_inputs_of_down_reach_nothing(adapter, tmp_path):
    zero_adapter(adapter, tmp_path, masks_for(GATE, UP, DOWN), CONFIG)
    layers = [
        PeftModel.from_pretrained(base_model(), f).base_model.model.get_submodule(DOWN) for f in (adapter, tmp_path)
    ]
    updates = [layer.get_delta_weight("default") for layer in layers]
    kept = [j for j in range(24) if j not in CHANNELS]
    assert not updates[1][:, CHANNELS].any() and updates[0][:, CHANNELS].all()
    assert torch.equal(updates[1][:, kept], updates[0][:, kept])


@torch.no_grad()
def test_all_channels_suppressed_is_the_adapter_without_its_mlp(adapter, tmp_path):
    everything = {slot.module: torch.ones(24, dtype=torch.bool) for layer in mlp_slots(CONFIG) for slot in layer}
    zero_adapter(adapter, tmp_path, everything, CONFIG)
    expected = PeftModel.from_pretrained(base_model(), adapter)
    for name, parameter in expected.named_parameters():
        if "lora_B" in name and ".mlp." in name:
            parameter.zero_()
    result = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(result(TOKENS).logits, expected(TOKENS).logits)


@torch.no_grad()
def test_heads_of_an_adapter_keep_shared_keys_until_the_group_goes(adapter, tmp_path):
    heads = torch.tensor([[False] * 4, [True, False, True, True]])
    zero_adapter(adapter, tmp_path, {}, CONFIG, heads)
    model = PeftModel.from_pretrained(base_model(), tmp_path).base_model.model
    gone = {"q_proj": [0, 2, 3], "k_proj": [1], "v_proj": [1], "o_proj": [0, 2, 3]}
    for slot in attention_slots(CONFIG)[1]:
        update = model.get_submodule(slot.module).get_delta_weight("default")
        zero = (update == 0).all(dim=1 - slot.axis).view(-1, 8).all(dim=1)
        assert zero.nonzero().flatten().tolist() == gone[slot.module.rpartition(".")[2]]
    assert all(
        (model.get_submodule(s.module).get_delta_weight("default") != 0).all() for s in attention_slots(CONFIG)[0]
    )


def test_the_adapters_settings_travel_along(adapter, tmp_path):
    zero_adapter(adapter, tmp_path / "new" / "folder", masks_for(GATE), CONFIG)
    first, second = (
        json.loads((f / "adapter_config.json").read_text()) for f in (adapter, tmp_path / "new" / "folder")
    )
    assert first == second


def test_an_adapter_without_lora_there_is_refused_before_anything_is_written(tmp_path):
    save_adapter(tmp_path / "in", ["q_proj", "gate_proj"])
    with pytest.raises(LabError, match=rf"cannot suppress channels of {DOWN}: the adapter in .* has no LoRA there"):
        zero_adapter(tmp_path / "in", tmp_path / "out", masks_for(GATE, DOWN), CONFIG)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_overwritten_while_it_is_read(adapter):
    with pytest.raises(LabError, match="the suppressed adapter needs its own folder"):
        zero_adapter(adapter, adapter, masks_for(GATE), CONFIG)


# --- full access --------------------------------------------------------------------------------------------------


def reinitialized(seed=0, heads=None, modules=(GATE, UP, DOWN), model=None, masks=None):
    before = model or base_model()
    with TemporaryDirectory() as scratch:
        before.save_pretrained(f"{scratch}/in", max_shard_size="10KB")
        masks = masks_for(*modules) if masks is None else masks
        reinitialize(f"{scratch}/in", f"{scratch}/out", masks, before.config, seed, heads)
        assert len(list(Path(scratch, "out").glob("*.safetensors"))) > 2
        return before, type(before).from_pretrained(f"{scratch}/out", dtype=before.dtype)


def test_other_numbers_are_bit_identical():
    before, after = reinitialized()
    axes, masks = channel_axes(CONFIG), masks_for(GATE, UP, DOWN)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        module = name.removesuffix(".weight")
        changed = torch.zeros_like(old, dtype=torch.bool)
        if module in masks:
            changed.index_fill_(axes[module], torch.tensor(CHANNELS), True)
        assert torch.equal(old != new, changed), name


def test_draws_follow_the_seed_and_no_other_randomness():
    _, one = reinitialized(seed=5)
    torch.rand(3)
    _, again = reinitialized(seed=5, modules=(DOWN, UP, GATE))  # the order of the masks is no randomness either
    _, other = reinitialized(seed=6)
    for module in (GATE, UP, DOWN):
        weights = [m.get_submodule(module).weight for m in (one, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("axis", [0, 1])
def test_draws_have_the_distribution_of_the_whole_matrix(axis):
    """As torch's own initialiser draws for the full shape, not for the few rows or columns that are replaced."""
    config = LlamaConfig(**SIZES | {"hidden_size": 200, "intermediate_size": 600}, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    slot = mlp_slots(config)[0][2 * axis]
    mask = torch.zeros(600, dtype=torch.bool)
    mask[100:150] = True
    _, model = reinitialized(model=model, masks={slot.module: mask})
    weight = model.get_submodule(slot.module).weight.detach()
    reference = torch.nn.init.xavier_uniform_(torch.empty_like(weight), generator=torch.Generator().manual_seed(7))
    drawn = weight.index_select(axis, torch.arange(100, 150)).flatten()
    assert drawn.abs().max() == pytest.approx(reference.abs().max().item(), rel=1e-2)
    assert kstest(drawn.numpy(), reference.flatten().numpy()).pvalue > 0.01


def test_biases_of_reinitialized_heads_start_at_zero_again():
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    heads = torch.tensor([[False] * 4, [True, True, True, False]])
    before, after = reinitialized(heads=heads, modules=(), model=model)
    gone = {"q_proj": [0, 1, 2], "k_proj": [0], "v_proj": [0], "o_proj": [0, 1, 2]}
    for slot in attention_slots(config)[1]:
        old, new = (m.get_submodule(slot.module) for m in (before, after))
        changed = (old.weight != new.weight).all(dim=1 - slot.axis)
        assert changed.view(-1, 8).all(dim=1).nonzero().flatten().tolist() == gone[slot.module.rpartition(".")[2]]
        assert torch.equal((old.weight != new.weight).any(dim=1 - slot.axis), changed)
        if slot.axis == 0:
            assert torch.equal(new.bias, old.bias.masked_fill(changed, 0))


def test_half_precision_stays_half_precision():
    before, after = reinitialized(model=base_model().bfloat16())
    assert after.get_submodule(GATE).weight.dtype == torch.bfloat16
    assert not torch.equal(after.get_submodule(GATE).weight, before.get_submodule(GATE).weight)


@pytest.mark.parametrize(
    "masks, message",
    [
        ({DOWN: torch.ones(23, dtype=torch.bool)}, f"the mask of {DOWN} has 23 channels, the matrix 24"),
        (
            {"model.layers.9.mlp.up_proj": torch.ones(24, dtype=torch.bool)},
            "no such matrix in this model: model.layers.9",
        ),
    ],
)
def test_masks_of_another_model_are_refused_and_change_nothing(adapter, tmp_path, masks, message):
    base_model().save_pretrained(tmp_path / "in")
    with pytest.raises(LabError, match=message):
        reinitialize(tmp_path / "in", tmp_path / "out", masks_for(GATE) | masks, CONFIG, seed=0)
    with pytest.raises(LabError, match=message):
        zero_adapter(adapter, tmp_path / "out", masks, CONFIG)
    assert not (tmp_path / "out").exists()


# --- every architecture, through the forward pass -----------------------------------------------------------------

LAYER = 1
GROUPS = [[1], [0, 2, 3], [0, 1, 2, 3]]  # no group of two or four whole, one, all


@pytest.fixture(params=BODIES)
def body(request):
    return BODIES[request.param]


def heads_of(chosen):
    """A selection of heads in the second layer."""
    heads = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    heads[LAYER, chosen] = True
    return heads


def mlp_masks(body):
    return {slot.module: mask_of(INNER, CHANNELS) for slot in mlp_slots(body.config)[LAYER]}


def save_random_adapter(body, folder):
    """A PEFT adapter on every matrix of the layers, with random factors."""
    model = body.model()
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**options, fan_in_fan_out=transposed))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    adapted.save_pretrained(folder)


def adapted(body, folder):
    return PeftModel.from_pretrained(body.model(), folder).double().eval()


def without_update(model, module, outputs=None, inputs=None):
    """Hook a LoRA layer: these outputs come from its base alone, or its update sees nothing of these inputs."""

    def hook(lora, seen, output):
        base, update = lora.base_layer(seen[0]), seen[0].clone()
        if outputs is not None:
            return output.index_copy(-1, torch.tensor(outputs, dtype=int), base[..., outputs])
        update[..., inputs] = 0
        return base + lora.lora_B["default"](lora.lora_A["default"](update)) * lora.scaling["default"]

    model.base_model.model.get_submodule(module).register_forward_hook(hook)


def assert_gone(body, folder, expected):
    """The suppressed adapter computes what the hooked one does, and that is not what the whole one does."""
    found, whole = (logits(adapted(body, f)) for f in (folder / "out", folder / "in"))
    torch.testing.assert_close(found, logits(expected), rtol=0, atol=1e-9)
    assert (found - whole).abs().max() > 1e-3


def test_a_suppressed_channel_has_the_bases_part_in_every_architecture(body, tmp_path):
    save_random_adapter(body, tmp_path / "in")
    zero_adapter(tmp_path / "in", tmp_path / "out", mlp_masks(body), body.config)
    expected = adapted(body, tmp_path / "in")
    for part in body.mlp_in:
        without_update(expected, body.at(LAYER, part), outputs=CHANNELS)
    without_update(expected, body.at(LAYER, body.mlp_out), inputs=CHANNELS)
    assert_gone(body, tmp_path, expected)


@pytest.mark.parametrize("chosen", GROUPS)
def test_suppressed_heads_have_the_bases_part_in_every_architecture(body, chosen, tmp_path):
    save_random_adapter(body, tmp_path / "in")
    zero_adapter(tmp_path / "in", tmp_path / "out", {}, body.config, heads_of(chosen))
    expected = adapted(body, tmp_path / "in")
    for part in body.attention:
        without_update(expected, body.at(LAYER, part), outputs=body.outputs(part, chosen))
    without_update(expected, body.at(LAYER, body.attention_out), inputs=body.inputs(chosen))
    assert_gone(body, tmp_path, expected)


def redrawn(body, model, masks=None, heads=None):
    """A model after suppression, perhaps of nothing, with full access, by way of the disk."""
    with TemporaryDirectory() as scratch:
        model.save_pretrained(f"{scratch}/in")
        reinitialize(f"{scratch}/in", f"{scratch}/out", masks or {}, body.config, 3, heads)
        return type(model).from_pretrained(f"{scratch}/out", dtype=torch.float64).eval()


def disturb(model, module, outputs=None, inputs=None):
    """Change the weights, and the biases, that make these outputs or read these inputs."""
    layer = model.get_submodule(module)
    if outputs is None:
        matrix(layer)[:, inputs] += 1
        return
    matrix(layer)[outputs] += 1
    if layer.bias is not None:
        layer.bias.data[outputs] += 1


def inputs_seen(model, module):
    """What reaches a layer of the model."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model)
    handle.remove()
    return seen[0]


@torch.no_grad()
def reads(model, module, inputs, chosen):
    """What a layer makes of some of its inputs, the others zero."""
    part = torch.zeros_like(inputs)
    part[..., chosen] = inputs[..., chosen]
    return model.get_submodule(module)(part)


def assert_only(body, before, after, part, chosen):
    """The layer is given something new in the chosen inputs only, and reads only those in a new way."""
    module = body.at(LAYER, part)
    old, new = (inputs_seen(model, module) for model in (before, after))
    kept = [j for j in range(old.shape[-1]) if j not in chosen]
    assert torch.equal(old[..., kept], new[..., kept])
    assert all((old[..., j] != new[..., j]).any() for j in chosen)
    assert torch.equal(reads(before, module, old, kept), reads(after, module, old, kept))
    assert all(not torch.equal(reads(before, module, old, [j]), reads(after, module, old, [j])) for j in chosen)


def test_a_redrawn_channel_forgets_its_weights_in_every_architecture(body):
    before, disturbed = body.model(), body.model()
    for part in body.mlp_in:
        disturb(disturbed, body.at(LAYER, part), outputs=CHANNELS)
    disturb(disturbed, body.at(LAYER, body.mlp_out), inputs=CHANNELS)
    after = redrawn(body, before, mlp_masks(body))
    assert not torch.equal(logits(before), logits(disturbed))
    assert torch.equal(logits(after), logits(redrawn(body, disturbed, mlp_masks(body))))
    assert_only(body, redrawn(body, before), after, body.mlp_out, CHANNELS)


@pytest.mark.parametrize("chosen", GROUPS)
def test_redrawn_heads_forget_their_weights_in_every_architecture(body, chosen):
    before, disturbed, heads = body.model(), body.model(), heads_of(chosen)
    for part in body.attention:
        disturb(disturbed, body.at(LAYER, part), outputs=body.outputs(part, chosen))
    disturb(disturbed, body.at(LAYER, body.attention_out), inputs=body.inputs(chosen))
    after = redrawn(body, before, heads=heads)
    assert not torch.equal(logits(before), logits(disturbed))
    assert torch.equal(logits(after), logits(redrawn(body, disturbed, heads=heads)))
    assert_only(body, redrawn(body, before), after, body.attention_out, body.inputs(chosen))


def test_a_checkpoint_that_leaves_out_the_models_prefix_is_the_same_model(tmp_path):
    """GPT-2 lies on the hub as `h.0.mlp…`, the model names it `transformer.h.0.mlp…`."""
    body = BODIES["gpt2"]
    body.model().save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    (tmp_path / "short").mkdir()
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    for name in ("in", "short"):
        reinitialize(tmp_path / name, tmp_path / f"{name}-out", mlp_masks(body), body.config, 3)
    found, expected = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("short", "in"))
    assert found.keys() == short.keys()
    assert all(torch.equal(tensor, expected[f"transformer.{name}"]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, short[name]) for name, tensor in found.items())
