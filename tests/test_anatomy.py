"""Anatomy, checked through the forward pass: weights without a channel compute what a hook without it computes."""

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers.anatomy import HeadSlot, Slot, attention_slots, channel_axes, head_masks, head_slots, mlp_slots
from helpers.profiles import LabError

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12)),
    "mistral-grouped": (MistralForCausalLM, MistralConfig(**SIZES, num_key_value_heads=2)),
    "mistral-one-kv": (MistralForCausalLM, MistralConfig(**SIZES, num_key_value_heads=1)),
    "qwen2-biases": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2)),
}
LAYER = 1
TOKENS = torch.arange(22).view(2, 11)


@pytest.fixture(params=CASES, name="model")
def random_model(request):
    """A tiny model whose every parameter, biases included, is far from zero."""
    build, config = CASES[request.param]
    model = build(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return model


def zero(model, masks):
    axes = channel_axes(model.config)
    for module, mask in masks.items():
        model.get_submodule(module).weight.data.index_fill_(axes[module], mask.nonzero().flatten(), 0)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def logits_with_inputs_zeroed(model, module, channels):
    """What the model computes when these inputs of `module` are zero: the oracle, which sees no weights."""

    def hook(_, inputs):
        clipped = inputs[0].clone()
        clipped[..., channels] = 0
        return (clipped,)

    handle = model.get_submodule(module).register_forward_pre_hook(hook)
    try:
        return logits(model)
    finally:
        handle.remove()


def one_hot(size, *chosen):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask


def test_a_channel_is_its_three_slices(model):
    before = logits(model)
    expected = logits_with_inputs_zeroed(model, f"model.layers.{LAYER}.mlp.down_proj", [5, 17])
    zero(model, {slot.module: one_hot(24, 5, 17) for slot in mlp_slots(model.config)[LAYER]})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", [0, 1, 2], ids=["gate", "up", "down"])
def test_each_slice_alone_silences_its_channel(part):
    """No slice is another channel's: without biases any of the three cuts exactly channel 5."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    slot = mlp_slots(model.config)[LAYER][part]
    expected = logits_with_inputs_zeroed(model, f"model.layers.{LAYER}.mlp.down_proj", [5])
    zero(model, {slot.module: one_hot(24, 5)})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chosen", [(1,), (2, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_heads_vanish_and_take_no_other_head_with_them(model, chosen):
    size = model.get_submodule(f"model.layers.{LAYER}.self_attn").head_dim
    channels = [head * size + offset for head in chosen for offset in range(size)]
    expected = logits_with_inputs_zeroed(model, f"model.layers.{LAYER}.self_attn.o_proj", channels)
    heads = torch.zeros(2, 4, dtype=torch.bool)
    heads[LAYER, list(chosen)] = True
    zero(model, head_masks(model.config, heads))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_shared_keys_and_values_go_only_with_the_whole_group():
    config = CASES["mistral-grouped"][1]
    heads = torch.tensor([[True, False, True, True], [False] * 4])
    masks = head_masks(config, heads)
    for name in ("k_proj", "v_proj"):
        assert masks[f"model.layers.0.self_attn.{name}"].tolist() == [False] * 8 + [True] * 8
        assert not masks[f"model.layers.1.self_attn.{name}"].any()
    for name in ("q_proj", "o_proj"):
        assert masks[f"model.layers.0.self_attn.{name}"].view(4, 8).all(dim=1).tolist() == heads[0].tolist()


def test_head_slots_name_the_value_rows_each_head_reads(model):
    """Disturb one key/value head's rows of v_proj: exactly the heads listed with those rows must see it."""
    seen = []
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model)
    q, k, v, o = attention_slots(model.config)[0]
    start, stop = next((s.start, s.stop) for s in head_slots(model.config)[0][-1] if s.module == v.module)
    model.get_submodule(v.module).weight.data[start:stop] += 1
    logits(model)
    for head in head_slots(model.config)[0]:
        ranges = {slot.module: (slot.start, slot.stop) for slot in head}
        moved = not torch.equal(*[x[..., slice(*ranges[o.module])] for x in seen])
        assert moved == (ranges[v.module] == (start, stop))
        assert ranges[k.module] == ranges[v.module] and ranges[q.module] == ranges[o.module]


def test_slots_have_the_sizes_of_the_model(model):
    for layer, heads in zip(attention_slots(model.config), head_slots(model.config), strict=True):
        for slot in layer:
            covered = {
                i for head in heads for part in head if part.module == slot.module for i in range(part.start, part.stop)
            }
            assert covered == set(range(model.get_submodule(slot.module).weight.shape[slot.axis]))
    assert {model.get_submodule(s.module).weight.shape[s.axis] for layer in mlp_slots(model.config) for s in layer} == {
        24
    }


def test_slots_by_hand():
    config = CASES["mistral-grouped"][1]
    assert mlp_slots(config)[1][2] == Slot("model.layers.1.mlp.down_proj", 1)
    assert head_slots(config)[0][3] == [
        HeadSlot("model.layers.0.self_attn.q_proj", 0, 24, 32),
        HeadSlot("model.layers.0.self_attn.k_proj", 0, 8, 16),
        HeadSlot("model.layers.0.self_attn.v_proj", 0, 8, 16),
        HeadSlot("model.layers.0.self_attn.o_proj", 1, 24, 32),
    ]


@pytest.mark.parametrize("find", [mlp_slots, attention_slots, head_slots, channel_axes])
def test_another_architecture_is_refused_with_what_it_has(find):
    with pytest.raises(
        LabError, match=r"'gpt2' is not supported \(supported: llama, mistral, qwen2\).*found c_attn, c_fc"
    ):
        find(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))


def test_head_mask_of_another_shape_is_refused():
    with pytest.raises(LabError, match=r"head mask has shape \[2, 3\], the model \[layers, heads\] = \[2, 4\]"):
        head_masks(CASES["llama"][1], torch.zeros(2, 3, dtype=torch.bool))
