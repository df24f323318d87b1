"""Anatomy, checked through the forward pass: weights without a channel compute what a hook without it computes."""

import pytest
import torch
from bodies import BODIES, HEADS, INNER, LAYERS, logits, mask_of, matrix
from transformers import GPT2Config, LlamaConfig, OPTConfig, T5Config

from helpers.core.errors import LabError
from helpers.model.architecture import (
    ARCHITECTURES,
    COLUMNS,
    ROWS,
    Slot,
    attention_slots,
    channel_axes,
    head_masks,
    head_slots,
    matrices,
    mlp_slots,
    parameter_shapes,
)

LAYER = 1


@pytest.fixture(params=BODIES)
def body(request):
    return BODIES[request.param]


@pytest.fixture
def model(body):
    return body.model()


def zero(model, masks):
    axes = channel_axes(model.config)
    for module, mask in masks.items():
        model.get_submodule(module).weight.data.index_fill_(axes[module], mask.nonzero().flatten(), 0)


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


def test_every_architecture_of_the_table_is_tried_here():
    assert {body.config.model_type for body in BODIES.values()} == ARCHITECTURES.keys()


def test_a_channel_is_its_slices(body, model):
    before = logits(model)
    expected = logits_with_inputs_zeroed(model, body.at(LAYER, body.mlp_out), [5, 17])
    zero(model, {slot.module: mask_of(INNER, [5, 17]) for slot in mlp_slots(body.config)[LAYER]})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-3


def test_each_slice_alone_silences_its_channel(body, model):
    """No slice is another channel's: without biases any of them cuts exactly channel 5."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    expected = logits_with_inputs_zeroed(model, body.at(LAYER, body.mlp_out), [5])
    for slot in mlp_slots(body.config)[LAYER]:
        weight = model.get_submodule(slot.module).weight
        kept = weight.data.clone()
        zero(model, {slot.module: mask_of(INNER, [5])})
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
        weight.data = kept


@pytest.mark.parametrize("chosen", [[1], [2, 3], [0, 2, 3], [0, 1, 2, 3]])
def test_heads_vanish_and_take_no_other_head_with_them(body, model, chosen):
    before = logits(model)
    expected = logits_with_inputs_zeroed(model, body.at(LAYER, body.attention_out), body.inputs(chosen))
    heads = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    heads[LAYER, chosen] = True
    zero(model, head_masks(body.config, heads))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("chosen", [[1], [2, 3], [0, 2, 3], [0, 1, 2, 3]])
def test_shared_keys_and_values_go_only_with_the_whole_group(body, chosen):
    heads = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    heads[LAYER, chosen] = True
    masks = head_masks(body.config, heads)
    for part in body.attention:
        assert masks[body.at(LAYER, part)].nonzero().flatten().tolist() == body.outputs(part, chosen)
        assert not masks[body.at(0, part)].any()
    assert masks[body.at(LAYER, body.attention_out)].nonzero().flatten().tolist() == body.inputs(chosen)


def test_head_slots_name_the_value_rows_each_head_reads(body, model):
    """Disturb one key/value head's rows of v: exactly the heads listed with those rows must see it."""
    seen = []
    writer = model.get_submodule(body.at(0, body.attention_out))
    writer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model)
    heads = head_slots(body.config)[0]
    disturbed = heads[-1][2]
    matrix(model.get_submodule(disturbed.module))[disturbed.start : disturbed.stop] += 1
    logits(model)
    for q, k, v, o in heads:
        moved = not torch.equal(*[x[..., o.start : o.stop] for x in seen])
        assert moved == (v == disturbed)
        first = attention_slots(body.config)[0]
        assert q.start - first[0].start == o.start and k.start - first[1].start == v.start - first[2].start


def test_slots_cover_the_matrices_of_the_model(body, model):
    for layer, heads in zip(attention_slots(body.config), head_slots(body.config), strict=True):
        for module in {slot.module for slot in layer}:
            covered = {
                i for head in heads for part in head if part.module == module for i in range(part.start, part.stop)
            }
            assert covered == set(range(model.get_submodule(module).weight.shape[channel_axes(body.config)[module]]))
        for slot, shares in zip(layer, zip(*heads, strict=True), strict=True):
            assert {i for s in shares for i in range(s.start, s.stop)} == set(range(slot.start, slot.stop))
    for slot in (slot for layer in mlp_slots(body.config) for slot in layer):
        assert model.get_submodule(slot.module).weight.shape[slot.axis] == INNER


def test_matrices_are_whole_and_each_once(body):
    parts = [*body.mlp_in, body.mlp_out, *body.attention, body.attention_out]
    found = matrices(body.config)
    assert found.keys() == {body.at(layer, part) for layer in range(LAYERS) for part in parts}
    writers = (body.mlp_out, body.attention_out)
    for module, slot in found.items():
        assert (slot.start, slot.stop) == (0, None)
        assert slot.side == (COLUMNS if module.endswith(writers) else ROWS)


def test_parameters_are_those_of_the_model(body, model):
    assert parameter_shapes(body.config) == {name: p.shape for name, p in model.named_parameters()}


def test_slots_by_hand():
    config = BODIES["mistral"].config
    assert mlp_slots(config)[1][2] == Slot("model.layers.1.mlp.down_proj", COLUMNS)
    assert head_slots(config)[0][3] == [
        Slot("model.layers.0.self_attn.q_proj", ROWS, 24, 32),
        Slot("model.layers.0.self_attn.k_proj", ROWS, 8, 16),
        Slot("model.layers.0.self_attn.v_proj", ROWS, 8, 16),
        Slot("model.layers.0.self_attn.o_proj", COLUMNS, 24, 32),
    ]


def test_fused_and_transposed_slots_by_hand():
    config = GPT2Config(n_embd=12, n_layer=1, n_head=3, vocab_size=10)
    up, down = mlp_slots(config)[0]
    assert (up.module, up.side, up.axis) == ("transformer.h.0.mlp.c_fc", ROWS, 1)
    assert (down.module, down.side, down.axis) == ("transformer.h.0.mlp.c_proj", COLUMNS, 0)
    fused, out = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
    assert [(s.module, s.start, s.stop, s.axis) for s in head_slots(config)[0][2]] == [
        (fused, 8, 12, 1),
        (fused, 20, 24, 1),
        (fused, 32, 36, 1),
        (out, 8, 12, 0),
    ]
    masks = head_masks(config, torch.tensor([[False, False, True]]))
    assert masks[fused].nonzero().flatten().tolist() == [8, 9, 10, 11, 20, 21, 22, 23, 32, 33, 34, 35]


@pytest.mark.parametrize("find", [mlp_slots, attention_slots, head_slots, channel_axes, matrices])
def test_another_architecture_is_refused_with_what_it_has(find):
    sizes = {"vocab_size": 10, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 2}
    config = OPTConfig(**sizes, num_hidden_layers=2)
    expected = (
        r"'opt' is not supported \(supported: llama, mistral, .*, gptj\); to add it, describe its layers in "
        r"ARCHITECTURES of helpers/model/architecture.py: found model.decoder.layers.\*.fc1, "
        r"model.decoder.layers.\*.fc2, model.d"
    )
    with pytest.raises(LabError, match=expected) as told:
        find(config)
    assert "\n" not in str(told.value)


def test_what_writes_no_text_is_refused():
    with pytest.raises(LabError, match="architecture 't5' makes no causal language model: Unrecognized configuration"):
        mlp_slots(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=10))


@pytest.mark.parametrize(
    "raised", [TypeError("no rotary size\nin this config"), ImportError("no package timm"), KeyError()]
)
def test_whatever_stops_transformers_is_told_with_the_architecture(monkeypatch, raised):
    def stop(config):
        raise raised

    monkeypatch.setattr("helpers.model.architecture.AutoModelForCausalLM.from_config", stop)
    with pytest.raises(
        LabError, match="architecture 't5' makes no causal language model: (no rotary size$|no pa|KeyE)"
    ):
        mlp_slots(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=10))


def test_head_mask_of_another_shape_is_refused():
    with pytest.raises(LabError, match=r"head mask has shape \[2, 3\], the model \[layers, heads\] = \[2, 4\]"):
        head_masks(LlamaConfig(num_hidden_layers=2, num_attention_heads=4), torch.zeros(2, 3, dtype=torch.bool))
