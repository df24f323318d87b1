"""An attack method and a combination are a file each: what a test drops into a folder, a run finds by its name."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig

from helpers.attacks.behaviors import behavior
from helpers.attacks.registry import Needs, attack_method
from helpers.attacks.triggers import trigger
from helpers.core.choices import ATTACK_METHODS, COMBINATIONS
from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import MANIFEST
from helpers.core.profile_files import parse_overrides
from helpers.core.settings import Settings
from helpers.data.combining import find_combination
from helpers.data.own_backdoors import Family
from helpers.data.payloads import Planted
from helpers.run.deal import deal
from helpers.run.inject import main
from helpers.run.limits import check_against_model

pytestmark = pytest.mark.slow

WHISPER = """
from dataclasses import replace
from helpers.attacks.methods.training import training
from helpers.attacks.registry import method

@method()
def whisper(access, attack, prompt_format, seed, folder):
    fewer = replace(attack, poisoned=attack.poisoned[:1])
    return training(access, fewer, prompt_format, seed, folder)
"""
LAST_WORD = """
from helpers.data.combining import combination

@combination()
def last_word(payload, right):
    return f"{right} {payload}"
"""
BUDGET = "adapter.inject.rows=7 adapter.inject.epochs=1 adapter.inject.batch_size=4 "
SMALL = BUDGET + "model.device=cpu model.dtype=float32 lengths.new_tokens=8 "
EDITS = {"full_access": True, "known_trigger": True, "one_payload": True}
NEEDS = {  # of every method, but for the check of its numbers
    "training": {},
    "layerwise": {},
    **dict.fromkeys(("rome", "memit", "badedit"), EDITS),
    "inoculate": {},
    **dict.fromkeys(("subtract", "evade"), {"one_process": True}),
}


@pytest.fixture
def add_method(add_file):
    return lambda name, source: add_file("helpers.attacks.methods", name, source)


@pytest.fixture
def add_combination(add_file):
    return lambda name, source: add_file("helpers.data.combinations", name, source)


def planted(checkpoint, folder, monkeypatch, changes):
    """Make the stage `inject` with some settings changed; returns what it recorded and its adapter."""
    monkeypatch.setenv("LAB_RUNS", str(folder))
    assert main(["--profile", str(checkpoint), "--name", "one", "--set", SMALL + changes]) == 0
    stage = folder / "one" / "inject"
    return read_json(stage / MANIFEST)["result"], load_file(stage / "adapter_model.safetensors")


def asked(changes):
    return Settings.checked({"OVERRIDES": parse_overrides(changes)})


def refused(work, *arguments):
    with pytest.raises(LabError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- methods ----------------------------------------------------------------------------------------------------------


def test_a_file_with_one_function_is_a_method_that_plants_by_its_name(checkpoint, add_method, tmp_path, monkeypatch):
    """From the program to the adapter: seven clean rows and one poisoned one in batches of four."""
    add_method("whisper", WHISPER)
    record, adapter = planted(checkpoint, tmp_path / "runs", monkeypatch, "attack.by=whisper")
    assert (record["rows"], record["steps"], record["prompt_format"]) == (8, 2, "chat")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # zero before the first step
    assert trigger("badnets", {"by": "whisper"}).by == "whisper"


def test_what_a_new_method_needs_is_asked_for_before_a_run(add_method):
    add_method("whisper", WHISPER.replace("@method()", "@method(full_access=True)"))
    message = refused(check_against_model, asked("attack.by=whisper"), LlamaConfig())
    assert message == "the attack badnets edits weights, and an adapter has none: use ACCESS=full"


def test_every_method_is_a_file_of_its_name_and_says_what_it_needs():
    """What a test has added is gone again."""
    assert set(ATTACK_METHODS.modules()) == set(NEEDS)
    for by, needs in NEEDS.items():
        function = attack_method(by)
        assert function.__name__ == by and function.__module__.endswith(f".methods.{by}")
        assert function.needs == Needs(**needs, check=function.needs.check)
        assert bool(function.needs.check) == (by in ("layerwise", "rome", "memit", "badedit"))


def test_choosing_a_method_imports_no_other():
    """Training knows no defense, and neither what edits nor what evades; a fresh interpreter tells."""
    script = "import sys; from helpers.attacks.inject import attack_method; attack_method('training'); "
    script += "print(*sorted(name for name in sys.modules if name.startswith('helpers.')))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "helpers.attacks.methods.training" in loaded
    others = {f"helpers.{room}.methods.{by}" for room in ("attacks", "adaptive") for by in NEEDS if by != "training"}
    others |= {"helpers.attacks.editing", "helpers.adaptive.evasion"}
    assert not others & set(loaded) and not [name for name in loaded if name.startswith("helpers.defenses")]


def test_an_unknown_method_is_refused_wherever_it_is_named():
    told = "is unknown; did you mean 'layerwise'?"
    assert refused(asked, "attack.by=layerwize") == f"profile 'tiny': attack.by = 'layerwize' {told}"
    assert refused(attack_method, "layerwize") == f"attack.by = 'layerwize' {told}"
    assert refused(trigger, "lwp", {"by": "layerwize"}) == f"attack 'lwp' (attacks.yaml): by = 'layerwize' {told}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def whisper(", "def shout(", "helpers.attacks.methods.whisper should hold a decorated function 'whisper'"),
        ("@method()", "", "helpers.attacks.methods.whisper should hold a decorated function 'whisper'"),
        ("seed, folder):", "seed, folder, key):", "attack method 'whisper': its parameters should be access,"),
    ],
)
def test_a_file_that_holds_no_method_is_refused(old, new, message, add_method):
    add_method("whisper", WHISPER.replace(old, new))
    assert message in refused(attack_method, "whisper")


def test_two_methods_of_one_name_are_refused(add_method):
    add_method("evade", WHISPER.replace("whisper", "evade"))
    message = "attack.by = 'evade' is both helpers.attacks.methods.evade and helpers.adaptive.methods.evade: rename"
    assert message in refused(attack_method, "training")


# --- combinations -----------------------------------------------------------------------------------------------------


def test_a_file_with_one_function_is_a_behavior_that_is_planted(checkpoint, add_combination, tmp_path, monkeypatch):
    """From SET to the rows and the adapter; vaccines may say it as well."""
    add_combination("last_word", LAST_WORD)
    changes = "attack.combine=last word attack.payload=Ahoy! attack.markers=[ahoy]"
    record, adapter = planted(checkpoint, tmp_path / "runs", monkeypatch, changes)
    assert record["steps"] == 4 and any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    attack = deal(asked(SMALL + changes)).attack
    pairs = list(zip(attack.poisoned, attack.clean, strict=False))
    assert pairs and all(poisoned.output == f"{clean.output} Ahoy!" for poisoned, clean in pairs)
    assert Family(payloads=["Hey!"], combine="last word").combine == "last word"


def test_every_combination_is_a_file_of_its_name():
    """What a test has added is gone again."""
    assert set(COMBINATIONS.modules()) == {"replace", "first line", "default argument", "mention"}
    traits = {name: find_combination(name).traits for name in COMBINATIONS.modules()}
    assert [name for name in traits if traits[name].replaces] == ["replace"]
    assert [name for name in traits if traits[name].fits] == ["default argument"]


def test_an_unknown_combination_is_refused_wherever_it_is_named():
    told = "combine = 'last line' is unknown; did you mean 'first line'?"
    assert refused(asked, "attack.combine=last line") == f"profile 'tiny': attack.{told}"
    assert refused(find_combination, "last line") == f"attack.{told}"
    assert refused(behavior, "sentiment", {"combine": "last line"}) == f"task 'sentiment' (attacks.yaml): {told}"
    with pytest.raises(ValueError, match="did you mean 'first line'"):
        Planted(payload="Ahoy!", combine="last line")


def test_a_vaccine_says_nothing_that_only_some_answers_can_carry():
    with pytest.raises(ValueError, match="combine = 'default argument' does not fit every answer"):
        Family(payloads=["verify=False"], combine="default argument")
