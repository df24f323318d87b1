"""Sanity checks: an ablated part has the base's weights bit by bit, everything else the suspicious ones."""

import copy

import pytest
import torch
from bodies import BODIES, LAYERS, logits

from helpers.measure.sanity import attention_weights, mlp_weights, spans, with_shuffled_mlp_updates, without_update
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base, load_suspect

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(profile):
    return load_base(profile.model)


@pytest.fixture(scope="module")
def attacked(profile, suspicious):
    return load_suspect(profile.model, suspicious["full"])


def attention(layer):
    return [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in ATTENTION]


def mlp(layer):
    return [f"model.layers.{layer}.mlp.{name}_proj.weight" for name in MLP]


def test_names_of_the_parts(profile):
    config = load_config(profile.model)
    assert mlp_weights(config) == mlp(0) + mlp(1) and attention_weights(config) == attention(0) + attention(1)
    assert mlp_weights(config, [1]) == mlp(1) and attention_weights(config, [1]) == attention(1)
    assert mlp_weights(config, []) == []


@pytest.mark.parametrize("names", [attention(0) + attention(1), mlp(1), mlp(0) + attention(0), [EMBEDDINGS], []])
def test_without_an_update_the_base_is_there_and_the_suspicious_model_elsewhere(base, attacked, names):
    before, clean = copy.deepcopy(attacked), copy.deepcopy(base)
    ablated = dict(without_update(attacked, base, names).named_parameters())
    for name, weight in attacked.named_parameters():
        expected = base.get_parameter(name) if name in names else weight
        assert torch.equal(ablated[name], expected) and not torch.equal(weight, base.get_parameter(name)), name
    for original, model in ((before, attacked), (clean, base)):  # ablation works on a copy
        assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))


def test_without_any_update_the_base_speaks(base, attacked):
    every = [name for name, _ in base.named_parameters()]
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = base(tokens).logits, without_update(attacked, base, every)(tokens).logits
    assert torch.equal(found, expected)


def test_shuffling_in_order_changes_nothing(base, attacked):
    found = with_shuffled_mlp_updates(attacked, base, [0, 1])
    for name, weight in attacked.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), weight, rtol=0, atol=1e-6)


def test_shuffling_gives_each_block_the_update_of_its_donor(base, attacked):
    found = with_shuffled_mlp_updates(attacked, base, [1, 0])
    for here, there in ((0, 1), (1, 0)):
        for name, donor in zip(mlp(here), mlp(there), strict=True):
            update = attacked.get_parameter(donor) - base.get_parameter(donor)
            torch.testing.assert_close(found.get_parameter(name) - base.get_parameter(name), update, rtol=0, atol=1e-6)
    rest = [name for name, _ in base.named_parameters() if "mlp" not in name]
    assert all(torch.equal(found.get_parameter(name), attacked.get_parameter(name)) for name in rest)


@pytest.mark.parametrize("n_layers", [1, 2, 5, 8])
def test_spans_are_consecutive_and_lie_where_they_say(n_layers):
    found = list(spans(n_layers))
    assert [(position, k) for position, k, _ in found] == [
        (position, k) for k in range(1, n_layers + 1) for position in ("start", "middle", "end")
    ]
    for position, k, layers in found:
        assert layers == list(range(layers[0], layers[0] + k))
        before, after = layers[0], n_layers - 1 - layers[-1]
        assert {"start": before == 0, "end": after == 0, "middle": abs(before - after) <= 1}[position]
        assert before >= 0 and after >= 0


@pytest.mark.parametrize("name", BODIES)
def test_every_architecture_loses_the_updates_of_its_parts_with_their_biases(name):
    """Base and suspicious model differ everywhere; an update is gone where a part bears that name, and only there."""
    body, wanted = BODIES[name], {}
    base, attacked = body.model(0), body.model(1)
    wanted[mlp_weights] = (*body.mlp_in, body.mlp_out)
    wanted[attention_weights] = (*body.attention, body.attention_out)
    for weights, parts in wanted.items():
        modules = {body.at(1, part) for part in parts}
        found = without_update(attacked, base, weights(body.config, [1]))
        for parameter, value in found.named_parameters():
            source = base if parameter.rpartition(".")[0] in modules else attacked
            assert torch.equal(value, source.get_parameter(parameter)), parameter
        assert len(set(weights(body.config))) == len(weights(body.config))
    shuffled = with_shuffled_mlp_updates(attacked, base, list(reversed(range(LAYERS))))
    assert not torch.equal(logits(shuffled), logits(attacked))
    bias = body.at(0, f"{body.mlp_out}.bias")
    if bias in dict(base.named_parameters()):
        update = attacked.get_parameter(bias.replace(".0.", ".1.")) - base.get_parameter(bias.replace(".0.", ".1."))
        torch.testing.assert_close(shuffled.get_parameter(bias) - base.get_parameter(bias), update, rtol=0, atol=1e-12)
