"""A defense is a file: found by its name, called as all are, and it does what its steps do one by one."""

import pytest
from safetensors.torch import load_file
from torch import equal

from helpers.access import access_to
from helpers.core.choices import DEFENSES
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.score import (
    blank_rankings,
    load_rankings,
    random_heads,
    random_scores,
    score_heads,
    score_mlp,
)
from helpers.defenses.bdvax.select import select, select_heads
from helpers.defenses.bdvax.vaccines import Variant, train_variants, vaccine_pairs
from helpers.defenses.conflict import merge
from helpers.defenses.conflict.conflict_model import train_conflict, write_conflict, write_suspicious
from helpers.defenses.registry import assumed_by, find_defense
from helpers.model.checkpoint import load_config
from helpers.model.generate import answers

ROWS = corpus.generate_distinct(36, 7)
DEFENDER = DefenderData([ROWS[:12], ROWS[12:24]], ROWS[24:], "exact_match")
SEED = 3
CLEAN = ("clean rows", "weights")
WATCHED = ("clean rows", "clean base", "reference model", "decoding")
ASSUMES = {  # in the words of the comparison
    "finetuning": CLEAN,
    "perturbed_finetuning": CLEAN,
    "forgetting": CLEAN,
    "random_channels": CLEAN,
    "bdvax": (*CLEAN, "family of the behavior"),
    "conflict": (*CLEAN, "clean base"),
    "bdvax_then_conflict": (*CLEAN, "family of the behavior", "clean base"),
    "magnitude": ("weights",),
    "magnitude_channels": CLEAN,
    "wanda": CLEAN,
    "fine_pruning": CLEAN,
    "fine_pruning_activations": CLEAN,
    "int4": ("weights",),
    "cleangen": WATCHED,
    "speculative": WATCHED,
    "editing": CLEAN,
    "editing_with_trigger": (*CLEAN, "trigger"),
    "lethe": (*CLEAN, "clean base", "decoding"),
    "crow": CLEAN,
    "nad": CLEAN,
    "beear": (*CLEAN, "unwanted answer"),
    "plant_and_unlearn": (*CLEAN, "family of the behavior"),
}
TRAINS = {
    "finetuning": ("recover",),
    "perturbed_finetuning": ("recover",),
    "forgetting": ("vaccine", "recover"),
    "random_channels": ("recover",),
    "bdvax": ("vaccine", "recover"),
    "conflict": ("conflict",),
    "bdvax_then_conflict": ("vaccine", "recover", "conflict"),
    "magnitude": (),
    "magnitude_channels": ("recover",),
    "wanda": (),
    "fine_pruning": ("recover",),
    "fine_pruning_activations": ("recover",),
    "int4": (),
    "cleangen": ("conflict",),
    "speculative": ("conflict",),
    "editing": (),
    "editing_with_trigger": (),
    "lethe": ("conflict",),
    "crow": ("recover",),
    "nad": ("recover", "recover"),
    "beear": ("recover",),
    "plant_and_unlearn": ("vaccine", "recover"),
}
BRIEF = """
from dataclasses import replace
from helpers.defenses.methods.finetuning import finetuning
from helpers.defenses.registry import defense

@defense(assumes=("clean rows", "weights", "patience"), trains=("recover",))
def brief(access, suspicious, defender, prompt_format, seed, folder):
    fewer = replace(defender, recovery=defender.recovery[:4])
    return finetuning(access, suspicious, fewer, prompt_format, seed, folder)
"""


@pytest.fixture(params=["adapter", "full"])
def access(profile, request):
    return access_to(profile, request.param)


@pytest.fixture
def add_defense(add_file):
    return lambda name, source: add_file("helpers.defenses.methods", name, source)


def defended(name, access, suspicious, chat, folder, **more):
    """What a defense writes and the record that it returns."""
    record = find_defense(name)(access, suspicious[access.name], DEFENDER, chat, SEED, folder, **more)
    return tensors(folder / "model"), record


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(equal(found[name], expected[name]) for name in expected)


def cut_and_healed(access, suspicious, channels, heads, chat, folder):
    """The tensors of the model after suppression and recovery."""
    cut = access.settings.suppress
    masks, chosen = select(channels, cut.tau, "module"), select_heads(heads, cut.heads, cut.heads_of)
    access.suppress(suspicious[access.name], masks, SEED, folder / "weak", chosen)
    recover(access, folder / "weak", DEFENDER.recovery, chat, SEED, folder / "healed")
    return tensors(folder / "healed")


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_file_is_a_defense_of_its_name_that_says_what_it_assumes():
    """What a test has added is gone again."""
    assert set(DEFENSES.modules()) == set(ASSUMES)
    for name in ASSUMES:
        function = find_defense(name)
        room = "oracles" if "trigger" in ASSUMES[name] else "defenses"
        assert function.__name__ == name and function.__module__ == f"helpers.{room}.methods.{name}"
        assert (function.traits.assumes, function.traits.trains) == (ASSUMES[name], TRAINS[name])


def test_what_several_assume_together_holds_each_thing_once():
    assert assumed_by("conflict", "bdvax") == (*CLEAN, "clean base", "family of the behavior")
    assert assumed_by("finetuning", "random_channels") == CLEAN


def test_an_unknown_defense_is_refused_with_the_nearest():
    with pytest.raises(LabError) as caught:
        find_defense("bdvx")
    assert str(caught.value) == "defense = 'bdvx' is unknown; did you mean 'bdvax'?"


def test_a_file_with_one_function_is_a_defense_that_purifies(access, suspicious, chat, add_defense, tmp_path):
    add_defense("brief", BRIEF)
    _, record = defended("brief", access, suspicious, chat, tmp_path / "brief")
    assert find_defense("brief").traits.assumes == (*CLEAN, "patience")
    assert (record["rows"], record["steps"]) == (4, 2)  # in one batch, twice
    assert len(answers(access.load(tmp_path / "brief" / "model"), chat, ROWS[:2], access.profile)) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def brief(", "def short(", "helpers.defenses.methods.brief should hold a decorated function 'brief'"),
        ("seed, folder):", "seed, folder, trigger):", "defense 'brief': its parameters should be access, suspicious,"),
        ("suspicious, defender, p", "defender, suspicious, p", "found access, defender, suspicious, prompt_format,"),
    ],
)
def test_a_file_that_holds_no_defense_is_refused(old, new, message, add_defense):
    add_defense("brief", BRIEF.replace(old, new))
    with pytest.raises(LabError) as caught:
        find_defense("brief")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- the same bits as the steps --------------------------------------------------------------------------------------


def test_finetuning_is_the_recovery_of_the_suspicious_model(access, suspicious, chat, tmp_path):
    found, _ = defended("finetuning", access, suspicious, chat, tmp_path / "one")
    recover(access, suspicious[access.name], DEFENDER.recovery, chat, SEED, tmp_path / "steps")
    assert same(found, tensors(tmp_path / "steps"))


def test_bdvax_and_its_control_do_what_their_steps_do(access, suspicious, chat, tmp_path):
    """The random ranking is drawn for the channels and heads that the signature scores."""
    found, _ = defended("bdvax", access, suspicious, chat, tmp_path / "one", kind="insults")
    signature, config = access.profile.signature, load_config(access.profile.model)
    folders, variants = ([tmp_path / f"{member}{i}" for i in range(2)] for member in ("poisoned", "clean")), []
    poisoned, twins = folders
    for i, (_, _, clean, bad) in enumerate(vaccine_pairs(DEFENDER, signature, "insults", SEED)):
        variants += [Variant([*clean, *bad], SEED + i, poisoned[i]), Variant(clean, SEED + i, twins[i])]
    train_variants(access, suspicious[access.name], variants, chat)
    gram_of = access.variant_pairs(poisoned, twins)
    ranked = score_mlp(gram_of, config, signature), score_heads(gram_of, config, signature)
    expected = cut_and_healed(access, suspicious, *ranked, chat, tmp_path)
    assert same(found, expected)

    control, _ = defended("random_channels", access, suspicious, chat, tmp_path / "control")
    channels, heads = load_rankings(tmp_path / "one" / "scores")
    assert [*blank_rankings(config)[0]] == [*channels]  # one draw follows the other
    drawn = random_scores(channels, SEED, signature.granularity), random_heads(heads, SEED)
    assert same(control, cut_and_healed(access, suspicious, *drawn, chat, tmp_path / "drawn"))
    assert not same(control, expected)


def test_conflict_does_what_its_steps_do(access, suspicious, chat, tmp_path):
    found, record = defended("conflict", access, suspicious, chat, tmp_path / "one")
    profile, start = access.profile, suspicious[access.name]
    adapter, first, second = (tmp_path / name for name in ("adapter", "suspicious", "conflict"))
    rows = [*DEFENDER.recovery, *DEFENDER.vaccine_sets[0], *DEFENDER.vaccine_sets[1]]  # fewer than the budget
    trained = train_conflict(profile, start, rows, chat, SEED, adapter)
    assert record["rows"] == trained["rows"] == 36 and record["loss"] == trained["loss"]
    write_suspicious(profile, start, first)
    write_conflict(profile, start, adapter, second)
    merge.linear(first, second, tmp_path / "merged", profile.conflict.t)
    assert same(found, tensors(tmp_path / "merged"))


def test_both_merge_the_purified_model_with_a_conflict_model_of_the_suspicious_one(profile, suspicious, chat, tmp_path):
    """Which of the two it is made of shows where there is no clean base."""
    own_start = profile.model_copy(update={"conflict": profile.conflict.model_copy(update={"start": "suspicious"})})
    access = access_to(own_start, "adapter")
    found, record = defended("bdvax_then_conflict", access, suspicious, chat, tmp_path / "both", kind="insults")
    purified, _ = defended("bdvax", access, suspicious, chat, tmp_path / "bdvax", kind="insults")
    assert same(tensors(tmp_path / "both" / "purified" / "model"), purified)
    defended("conflict", access, suspicious, chat, tmp_path / "conflict")
    write_suspicious(own_start, tmp_path / "bdvax" / "model", tmp_path / "first")
    merge.linear(tmp_path / "first", tmp_path / "conflict" / "conflict", tmp_path / "merged", own_start.conflict.t)
    assert same(found, tensors(tmp_path / "merged")) and set(record) == {"bdvax", "conflict"}
