"""The two kinds of access: which is given, what each starts from, and what each says was changed and can be cut."""

import pytest
import torch
from safetensors.torch import load_file

from helpers.access import AdapterAccess, FullAccess, access_to
from helpers.core.errors import LabError
from helpers.model.architecture import matrices
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base, load_suspect

UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "down"))
FILES = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}


@pytest.fixture(params=["adapter", "full"])
def access(request, profile):
    return access_to(profile, request.param)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def changes(profile, folder):
    """What sets a model apart from the base, {module: [out, in]}, by loading both."""
    base, found = load_base(profile.model), load_suspect(profile.model, folder)
    named = matrices(base.config)
    return {m: (found.get_submodule(m).weight - base.get_submodule(m).weight).detach().double() for m in named}


def test_each_name_gives_its_access_and_the_numbers_of_it(profile):
    adapter, full = (access_to(profile, name) for name in ("adapter", "full"))
    assert (type(adapter), type(full)) == (AdapterAccess, FullAccess)
    assert (adapter.settings, full.settings) == (profile.adapter, profile.full)
    assert (adapter.name, full.name) == ("adapter", "full") and not adapter.edits_weights and full.edits_weights


@pytest.mark.parametrize("name", ["Full", "", "lora"])
def test_another_name_is_refused(profile, name):
    with pytest.raises(LabError, match=f"^access = '{name}' is unknown; .*'?full'?") as told:
        access_to(profile, name)
    assert "\n" not in str(told.value)


def test_other_numbers_are_those_of_this_access_alone(profile, access):
    other = access.with_settings(poison_rate=0.125)
    assert other.settings.poison_rate == 0.125 != access.settings.poison_rate and type(other) is type(access)
    expected = profile.model_dump()
    expected[access.name]["poison_rate"] = 0.125
    assert other.profile.model_dump() == expected


def test_an_injection_starts_from_the_base(profile, access):
    """From all its weights, or from a fresh adapter that adds nothing to it and follows the seed."""
    model, base = access.start(0), dict(load_base(profile.model).named_parameters())
    found, again, other = (trainable(m) for m in (model, access.start(0), access.start(1)))
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    if access.edits_weights:
        assert found.keys() == base.keys() and all(torch.equal(found[name], base[name]) for name in base)
    else:
        assert all("lora_" in name for name in found)
        assert not any(weight.any() for name, weight in found.items() if "lora_B" in name)
        assert not all(torch.equal(found[name], other[name]) for name in found)


def test_its_own_update_is_what_sets_the_suspicious_model_apart(profile, suspicious, access):
    gram_of, slots = access.own_update(suspicious[access.name]), matrices(load_config(profile.model))
    for module, change in changes(profile, suspicious[access.name]).items():
        squares = change.square().sum(dim=1 - slots[module].side)
        torch.testing.assert_close(gram_of(slots[module])[0, 0], squares, rtol=1e-4, atol=1e-6)
        assert squares.min() > 1e-4


@pytest.mark.parametrize("module", [UP, DOWN])
def test_exactly_the_channels_cut_are_others_among_those_that_can_be(profile, suspicious, access, module, tmp_path):
    """Against the tensors of the two files."""
    slot, mask = matrices(load_config(profile.model))[module], torch.arange(128) % 5 == 0
    access.suppress(suspicious[access.name], {module: mask}, 3, tmp_path / "cut")
    before, after = (access.edited_channels(folder, slot) for folder in (suspicious[access.name], tmp_path / "cut"))
    assert torch.equal((before != after).any(dim=1), mask) and before.shape[0] == 128
    ends = {UP: "lora_B", DOWN: "lora_A"}
    name = f"{module}.weight" if access.edits_weights else f"base_model.model.{module}.{ends[module]}.weight"
    stored = load_file(tmp_path / "cut" / FILES[access.name])[name]
    assert torch.equal(after, stored if module == UP else stored.T)
    assert bool(after[mask].any()) == access.edits_weights


def test_the_matrices_that_can_be_edited_are_the_updates_or_the_weights(profile, suspicious, access):
    found, update = access.edited_matrices(suspicious[access.name]), changes(profile, suspicious[access.name])
    assert found.keys() == update.keys()
    whole = load_file(suspicious["full"] / FILES["full"])
    for module, part in found.items():
        if access.edits_weights:
            assert torch.equal(part, whole[f"{module}.weight"])
        else:
            torch.testing.assert_close(part.scale * (part.B @ part.A).double(), update[module], rtol=0, atol=1e-5)
