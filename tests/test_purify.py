"""Suppression and recovery from folder to folder, as the notebooks use them, with both kinds of access."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers.access import access_to
from helpers.data import corpus
from helpers.defenses.bdvax.recover import recover
from helpers.measure.utility import teacher_forced
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect
from helpers.model.tokenizer import record_format, recorded_format

pytestmark = pytest.mark.slow

ROWS = corpus.generate(12, 6)
CHANNELS, HEADS = [0, 5, 127], torch.tensor([[True, True, False, False], [False, False, False, True]])
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
MASKS = dict.fromkeys((GATE, UP, DOWN), torch.zeros(128, dtype=torch.bool).index_fill(0, torch.tensor(CHANNELS), True))
# Written out: {matrix: (axis of its channels, those that go)}; 4 heads of 16 channels, 2 of them share keys and values.
CUT = {GATE: (0, CHANNELS), UP: (0, CHANNELS), DOWN: (1, CHANNELS)}
CUT_HEADS = {
    "model.layers.0.self_attn.q_proj": (0, range(32)),
    "model.layers.0.self_attn.k_proj": (0, range(16)),
    "model.layers.0.self_attn.v_proj": (0, range(16)),
    "model.layers.0.self_attn.o_proj": (1, range(32)),
    "model.layers.1.self_attn.q_proj": (0, range(48, 64)),
    "model.layers.1.self_attn.o_proj": (1, range(48, 64)),
}
ACCESSES = ("adapter", "full")


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def perplexity(profile, chat, folder):
    return teacher_forced(load_suspect(profile.model, folder), chat, ROWS, 96, 12)["perplexity"]


@pytest.fixture(scope="module", params=ACCESSES)
def access(request):
    return request.param


@pytest.fixture(scope="module")
def suppressed(profile, suspicious, access, tmp_path_factory):
    """The suspicious model without some channels, and without some channels and heads."""
    folders = {name: tmp_path_factory.mktemp("suppressed") / name for name in ("channels", "heads")}
    before = digests(suspicious[access])
    access_to(profile, access).suppress(suspicious[access], MASKS, 0, folders["channels"])
    access_to(profile, access).suppress(suspicious[access], MASKS, 0, folders["heads"], HEADS)
    assert digests(suspicious[access]) == before
    return folders


@pytest.fixture(scope="module")
def recovered(profile, chat, access, suppressed, tmp_path_factory):
    """The suppressed model after recovery: its training record and folder."""
    folder, before = tmp_path_factory.mktemp("recovered") / access, digests(suppressed["channels"])
    record = recover(access_to(profile, access), suppressed["channels"], ROWS, chat, 0, folder)
    assert digests(suppressed["channels"]) == before
    return record, folder


def split(weight, axis, channels):
    """The selected channels of a matrix and the others."""
    others = [j for j in range(weight.shape[axis]) if j not in channels]
    return [weight.index_select(axis, torch.tensor(list(which), dtype=int)) for which in (channels, others)]


@pytest.mark.parametrize(("name", "cut"), [("channels", CUT), ("heads", CUT | CUT_HEADS)])
def test_what_was_selected_is_gone_and_nothing_else(profile, suspicious, access, suppressed, name, cut):
    """Adapter access gives the base's weights back, bit by bit; full access draws new ones."""
    base, before, after = (
        dict(model.named_parameters())
        for model in (
            load_base(profile.model),
            load_suspect(profile.model, suspicious[access]),
            load_suspect(profile.model, suppressed[name]),
        )
    )
    for weight, found in after.items():
        axis, channels = cut.get(weight.removesuffix(".weight"), (0, []))
        (gone, kept), (_, kept_before) = split(found, axis, channels), split(before[weight], axis, channels)
        assert torch.equal(kept, kept_before), weight
        if access == "adapter":
            assert torch.equal(gone, split(base[weight], axis, channels)[0]), weight
        elif channels:
            assert not (gone == split(before[weight], axis, channels)[0]).any(), weight
            assert gone.abs().max() <= (6 / sum(found.shape)) ** 0.5  # Xavier uniform, of the whole matrix


def test_a_suppressed_model_is_complete_and_talks(profile, chat, suppressed):
    for folder in suppressed.values():
        assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}
        assert len(answers(load_suspect(profile.model, folder), chat, ROWS[:2], profile)) == 2


def test_full_access_follows_the_seed(profile, suspicious, suppressed, access, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        access_to(profile, access).suppress(suspicious[access], MASKS, seed, tmp_path / name)
    file = "adapter_model.safetensors" if access == "adapter" else "model.safetensors"
    expected, same, other = (
        load_file(f / file) for f in (suppressed["channels"], tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(weight, same[name]) for name, weight in expected.items())
    differing = {name for name, weight in expected.items() if not torch.equal(weight, other[name])}
    assert differing == ({f"{module}.weight" for module in MASKS} if access == "full" else set())


def test_recovery_trains_what_may_be_edited_and_heals(profile, chat, access, suppressed, recovered):
    record, folder = recovered
    assert record["steps"] == 2 * 12 // 4 and record["rows"] == 12
    file = "adapter_model.safetensors" if access == "adapter" else "model.safetensors"
    before, after = load_file(suppressed["channels"] / file), load_file(folder / file)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert perplexity(profile, chat, folder) < perplexity(profile, chat, suppressed["channels"])
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}


def test_the_prompt_format_travels_with_the_model(profile, chat, suspicious, access, recovered, tmp_path):
    source = shutil.copytree(suspicious[access], tmp_path / "suspicious")
    record_format(source, chat)
    access_to(profile, access).suppress(source, MASKS, 0, tmp_path / "suppressed")
    assert recorded_format(tmp_path / "suppressed") == chat.record
    assert recorded_format(recovered[1]) == chat.record and recovered[0]["prompt_format"] == "chat"


def test_recovery_of_an_adapter_leaves_its_base_alone(profile, access, recovered):
    base, healed = load_base(profile.model), load_suspect(profile.model, recovered[1])
    moved = {name for name, p in healed.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    every = {name for name, _ in base.named_parameters()}
    assert moved == ({name for name in every if "proj" in name} if access == "adapter" else every)


def test_recovery_is_repeatable_and_uses_the_recovery_budget(profile, chat, access, suppressed, recovered, tmp_path):
    again = recover(access_to(profile, access), suppressed["channels"], ROWS, chat, 0, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(recovered[1])
    assert again | {"seconds": 0} == recovered[0] | {"seconds": 0}
    values = profile.model_dump()
    values[access]["recover"] |= {"epochs": 1, "batch_size": 12, "lr": 1e-7}
    other = access_to(type(profile)(**values), access)
    short = recover(other, suppressed["channels"], ROWS, chat, 0, tmp_path / "short")
    assert short["steps"] == 1
    assert perplexity(profile, chat, tmp_path / "short") == pytest.approx(
        perplexity(profile, chat, suppressed["channels"]), rel=1e-3
    )


def test_untouched_models_recover_the_same_way(profile, chat, suspicious, access, tmp_path):
    """The control: fine-tuning alone, the same function on the suspicious model itself."""
    recover(access_to(profile, access), suspicious[access], ROWS, chat, 0, tmp_path / "finetuned")
    assert perplexity(profile, chat, tmp_path / "finetuned") < perplexity(profile, chat, suspicious[access])
