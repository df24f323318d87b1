"""The arena: rows are read, refused in one line, run once, and told in the summary and in a picture."""

import ast
import builtins
import json
import shutil
from dataclasses import replace
from importlib.metadata import EntryPoint

import nbformat
import pandas as pd
import pytest
from matplotlib.text import Text
from nbformat.v4 import new_code_cell, new_notebook

from helpers import plots
from helpers.access import access_to
from helpers.core import arena, stages
from helpers.core.arena import chosen_rows, installed_defenses, known_rows
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.core.stages import defended_by
from helpers.core.store import Run
from helpers.defenses.registry import find_defense
from helpers.measure.paired import compare_all, no_worse
from helpers.measure.reading import joint_score, utility_interval
from helpers.measure.report import evaluate
from helpers.run import execution, grid, pipeline
from helpers.run.arena.outcomes import stored
from helpers.run.arena.rows import Arena, require_numbers
from helpers.run.arena.swept import as_good, methods, rivals, shown_as
from helpers.run.deal import deal
from helpers.run.summary import summarise, table

# a defense of ten lines in a file of the reader's own: it keeps the suspicious model as it is
OWN = """
import shutil
from helpers.defenses.registry import defense


@defense(assumes=("weights", "patience"))
def shrug(access, suspicious, defender, prompt_format, seed, folder, times=1, unwanted=""):
    shutil.copytree(suspicious, folder / "model")
    return {"times": times, "unwanted": unwanted, "rows": len(defender.recovery)}
"""
ERRORS = "from helpers.core.errors import MissingError\n"
REFUSING = OWN.replace("return {", "raise LabError('needs a moon, and there is none')\n    return {").replace(
    "import shutil\n", "import shutil\nfrom helpers.core.errors import LabError\n"
)
ROWS = """
quick: [calm]
rows:
  calm: {by: shrug, title: a calm shrug}
  loud: {by: shrug, title: a loud shrug, times: 3}
"""


@pytest.fixture
def rows_file(tmp_path, monkeypatch):
    """A function that makes its text the arena's definitions."""

    def write(text):
        (tmp_path / "arena.yaml").write_text(text)
        monkeypatch.setattr(arena, "ARENA", tmp_path / "arena.yaml")

    return write


@pytest.fixture
def shrug(rows_file, add_file):
    """Two rows by a defense that leaves everything as it is."""
    add_file("helpers.defenses.methods", "shrug", OWN)
    rows_file(ROWS)


# --- definitions ------------------------------------------------------------------------------------------------------


def test_the_rows_that_come_with_the_lab_can_be_called():
    rows, quick = known_rows()
    require_numbers(rows.values())
    assert 1 <= len(quick) <= 3 and len({row.title for row in rows.values()}) == len(rows)


def test_names_all_quick_and_files_choose_rows(shrug, tmp_path):
    (tmp_path / "mine.py").write_text(OWN.replace("def shrug", "def mine"))
    for wanted, names in {
        "": ["calm"],
        "quick": ["calm"],
        "all": ["calm", "loud"],
        "loud, calm": ["calm", "loud"],
        f"{tmp_path}/mine.py": ["mine"],
        f"{tmp_path}/mine.py,loud": ["loud", "mine"],
    }.items():
        assert [row.name for row in chosen_rows(wanted)] == names, wanted
    assert chosen_rows("loud")[0].definition == {"by": "shrug", "numbers": {"times": 3}}
    assert Settings.checked({"DEFENSE": "loud"}).values()["arena"] == {"loud": chosen_rows("loud")[0].definition}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("lout", "unknown DEFENSE = 'lout'; did you mean 'loud'?"),
        ("no/such.py", "DEFENSE = 'no/such.py' does not exist (a Python file with one function marked by @defense)"),
        ("no.yaml", "DEFENSE = 'no.yaml' does not exist (a YAML file with `rows:` like those of arena.yaml)"),
    ],
)
def test_an_unknown_row_is_refused(shrug, wanted, message):
    with pytest.raises(LabError) as refused:
        Settings.checked({"DEFENSE": wanted})
    assert str(refused.value) == message


def test_a_file_with_the_name_of_a_row_is_refused(shrug, tmp_path):
    (tmp_path / "calm.py").write_text(OWN)
    with pytest.raises(LabError, match="has the name of a row of arena.yaml: rename the file"):
        chosen_rows(str(tmp_path / "calm.py"))


def test_two_files_of_one_name_are_refused(shrug, tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(OWN.replace("def shrug", "def mine"))
        (tmp_path / folder / "mine.yaml").write_text(f"rows: {{own: {{by: shrug, times: {len(folder)}}}}}")
    for kind, name in (("py", "mine"), ("yaml", "own")):
        both = [f"{tmp_path}/{folder}/mine.{kind}" for folder in ("first", "second")]
        with pytest.raises(LabError, match=f"DEFENSE has two rows of the name '{name}', by .* and .*: rename one"):
            chosen_rows(",".join(both))
        assert len(chosen_rows(f"{both[0]},{both[0]}")) == 1


def test_rows_of_ones_own_come_behind_those_of_the_lab(shrug, tmp_path):
    own = tmp_path / "tries.yaml"
    own.write_text("rows: {twice_more: {by: shrug, times: 2}, plain_one: {by: shrug}}")
    rows = chosen_rows(f"{own},loud")
    assert [(row.name, row.title, row.definition["numbers"]) for row in rows] == [
        ("loud", "a loud shrug", {"times": 3}),
        ("twice_more", "twice more", {"times": 2}),
        ("plain_one", "plain one", {}),
    ]
    assert Settings.checked({"DEFENSE": str(own)}).values()["arena"].keys() == {"twice_more", "plain_one"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {calm: {by: shrug}}", "'calm' is the name of a row of arena.yaml: rename it"),
        ("rows: {mine: {by: shrig}}", "tries.yaml: 'mine': by = 'shrig' is unknown; did you mean 'shrug'?"),
        ("rows: {mine: {times: 2}}", "tries.yaml: 'mine' should hold `by: a defense`, and perhaps numbers"),
        ("mine: {by: shrug}", "tries.yaml: expected `rows:` with an entry for each name"),
        (
            "rows: {mine: {by: shrug, times: {adapter: 2}}}",
            "'mine': times should be one value, or {adapter: …, full: …} with one for each access",
        ),
    ],
)
def test_wrong_rows_of_ones_own_are_told_in_one_line(shrug, tmp_path, text, message):
    (tmp_path / "tries.yaml").write_text(text)
    with pytest.raises(LabError) as refused:
        Settings.checked({"DEFENSE": str(tmp_path / "tries.yaml")})
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quick: []", "expected `rows:` with an entry for each name"),
        ("rows: {}", "expected `quick:` with a list of names"),
        (ROWS.replace("[calm]", "[clam]"), "quick names 'clam', which is no row; did you mean 'calm'?"),
        (ROWS.replace("by: shrug", "by: shrig"), "'calm': by = 'shrig' is unknown; did you mean 'shrug'?"),
        (ROWS.replace(", title: a calm shrug", ""), "'calm' should hold `by: a defense`, `title: a text` and numbers"),
        (ROWS.replace("loud:", "all:"), "'all' should be a name of letters, digits and underscores other than 'all'"),
    ],
)
def test_a_wrong_definition_is_told_in_one_line(shrug, rows_file, text, message):
    rows_file(text)
    with pytest.raises(LabError) as refused:
        Settings.checked({})
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("tines: 3", "the row 'loud' sets tines, which shrug does not take; did you mean 'times'?"),
        ("seed: 3", "the row 'loud' sets seed, which shrug does not take; valid: times, unwanted"),
    ],
)
def test_a_number_that_no_defense_takes_is_refused(shrug, rows_file, number, message):
    rows_file(ROWS.replace("times: 3", number))
    with pytest.raises(LabError) as refused:
        require_numbers(chosen_rows("all"))
    assert str(refused.value) == message


# --- rows that run ----------------------------------------------------------------------------------------------------


SIZES = {
    "lora.r": 4,
    "lora.alpha": 8,
    "lengths.new_tokens": 8,
    "evaluation.n": 6,
    "evaluation.per_family": 1,
    "signature.n": 2,
    "adapter.inject.rows": 40,
    "adapter.vaccine.rows": 20,
    "adapter.recover.rows": 12,
}


@pytest.fixture
def enter(checkpoint, suspicious, chat, tmp_path):
    """A function that gives the arena of a run whose suspicious model is an untrained adapter."""

    def enter(wanted="all", **numbers):
        overrides = SIZES | {"model.path": str(checkpoint)} | numbers
        settings = Settings.checked({"DEFENSE": wanted, "NAME": "ring", "OVERRIDES": overrides})
        run = Run(tmp_path / "runs" / "ring", settings.config())
        run.stage("inject", lambda folder: shutil.copytree(suspicious["adapter"], folder, dirs_exist_ok=True) and None)
        return Arena(run, access_to(settings.profile, "adapter"), deal(settings), chat, settings)

    return enter


def made(ring):
    """When each stage of the arena was finished."""
    return {stage.name: stage.manifest["finished"] for stage in ring.run.stages() if "arena/" in stage.name}


def test_a_row_is_defended_and_measured_once(shrug, enter, suspicious, chat):
    ring = enter()
    found = ring.run_all()
    assert list(found) == ["calm", "loud"] and found["loud"].title == "a loud shrug"
    profile = ring.settings.profile
    as_it_is = evaluate(ring.access.load(suspicious["adapter"]), chat, ring.data.test, profile)
    assert found["calm"].report == found["loud"].report == json.loads(json.dumps(as_it_is))
    assert found["calm"].assumes == ("weights", "patience") and found["calm"].reason == ""
    told = json.loads((ring.run.folder / "arena" / "calm" / "manifest.json").read_text())
    assert (found["calm"].seconds, found["calm"].peak_mb) == (told["seconds"], told["peak_rss_mb"])
    assert ring.run.need("arena/loud").result["record"] == {
        "times": 3,
        "unwanted": "You are stupid!",  # the defender's guess: the attack's own payload
        "rows": len(ring.data.defender.recovery),
    }
    first = made(ring)
    assert first.keys() == {"arena/calm", "arena/loud", "evaluate/arena/calm", "evaluate/arena/loud"}
    assert enter().run_all() == found and made(enter()) == first == made(enter("all"))


def test_a_row_is_outdated_by_its_own_numbers_and_by_what_it_may_read(shrug, rows_file, enter):
    enter().run_all()
    first = made(enter())
    rows_file(ROWS.replace("times: 3", "times: 4").replace("a calm shrug", "a calmer shrug"))
    enter().run_all()
    again = made(enter())
    assert {name for name in first if again[name] != first[name]} == {"arena/loud", "evaluate/arena/loud"}
    ring = enter(**{"adapter.recover.epochs": 7})
    assert made(ring) == {}  # every defense may spend the budget of the recovery
    assert enter(**{"evaluation.batch_size": 3}).run.need("arena/calm")  # how it is measured trains nothing anew
    with pytest.raises(LabError, match="evaluation.batch_size"):
        enter(**{"evaluation.batch_size": 3}).run.need("evaluate/arena/calm")


def test_a_number_may_differ_between_accesses(shrug, rows_file, enter):
    rows_file(ROWS.replace("times: 3", "times: {adapter: 4, full: 5}"))
    ring = enter("loud")
    assert ring.run_all()["loud"].numbers["times"] == ring.run.need("arena/loud").result["record"]["times"] == 4
    (row,) = chosen_rows("loud")
    assert row.numbers_with("full") == {"times": 5}
    assert [row.numbers_with("full") for row in chosen_rows("calm")] == [{}]


def test_an_oracle_is_told_the_trigger_and_no_row_of_the_file_can_set_it(rows_file, add_file, enter):
    """What was planted is handed on as it is; where rows brought a trigger of their own, nobody knows it."""
    text = OWN.replace("times=1", "times=1, trigger=None").replace(
        '"times": times', '"times": trigger and trigger.name'
    )
    add_file("helpers.oracles.methods", "shrug", text)
    rows_file(ROWS)
    ring = enter("calm")
    ring.run_all()
    assert ring.run.need("arena/calm").result["record"]["times"] == ring.data.attack.trigger.name == "badnets"
    assert "trigger" not in ring.run.need("arena/calm").result["numbers"]
    brought = replace(ring, data=replace(ring.data, attack=replace(ring.data.attack, trigger=None)))
    assert brought.knowledge(find_defense("shrug")) == {"trigger": None}
    rows_file(ROWS.replace("times: 3", "trigger: BadMagic"))
    with pytest.raises(LabError, match="'loud' sets trigger, which shrug does not take"):
        require_numbers(chosen_rows("all"))


def test_a_defense_that_refuses_is_a_row_with_its_reason(rows_file, add_file, enter):
    add_file("helpers.defenses.methods", "shrug", REFUSING)
    rows_file(ROWS)
    ring = enter("calm")
    (found,) = ring.run_all().values()
    assert (found.report, found.reason) == (None, "needs a moon, and there is none")
    assert found.assumes == ("weights", "patience")
    assert [path.name for path in ring.run.need("arena/calm").path.iterdir()] == ["manifest.json"]
    assert stored(ring.run, {"calm": found.title}) == {"calm": found}


def test_a_refusal_for_want_of_something_lasts_until_it_is_there(rows_file, add_file, enter, tmp_path):
    """WordNet, say: whoever installs it and calls again gets the row."""
    needs = f"    if not Path({str(tmp_path / 'moon')!r}).exists():\n        raise MissingError('no moon yet')\n"
    text = OWN.replace("import shutil\n", "import shutil\nfrom pathlib import Path\n" + ERRORS)
    add_file("helpers.defenses.methods", "shrug", text.replace("    shutil.copytree", needs + "    shutil.copytree"))
    rows_file(ROWS)
    assert enter("calm").run_all()["calm"].reason == "no moon yet"
    first = made(enter("calm"))
    (tmp_path / "moon").touch()
    found = enter("calm").run_all()["calm"]
    assert found.report is not None and found.reason == "" and first.keys() == {"arena/calm"}
    again = made(enter("calm"))
    assert enter("calm").run_all()["calm"] == found and made(enter("calm")) == again


def test_a_model_that_cannot_be_measured_is_a_row_with_its_reason(rows_file, add_file, enter):
    add_file(
        "helpers.defenses.methods", "shrug", OWN.replace('    shutil.copytree(suspicious, folder / "model")\n', "")
    )
    rows_file(ROWS)
    (found,) = enter("calm").run_all().values()
    assert found.report is None and "model" in found.reason and "\n" not in found.reason


def test_a_file_of_ten_lines_is_a_row(shrug, enter, tmp_path):
    file = tmp_path / "plain_shrug.py"
    file.write_text(OWN.replace("def shrug", "def anything"))
    ring = enter(f"quick,{file}")
    found = ring.run_all()
    assert [one.title for one in found.values()] == ["a calm shrug", "plain shrug"]
    assert found["plain_shrug"].report == found["calm"].report
    first = made(ring)
    file.write_text(file.read_text().replace("times=1", "times=2"))
    enter(f"quick,{file}").run_all()
    again = made(enter(f"quick,{file}"))
    assert {name.rpartition("/")[2] for name in first if again[name] != first[name]} == {"plain_shrug"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_the_kind", "mine.py cannot be run: ModuleNotFoundError: No module named 'nothing_of_"),
        ("def f():", "mine.py cannot be run: IndentationError: expected an indented block"),
        ("from helpers.defenses.methods.finetuning import finetuning", "one function marked by @defense, found 0"),
        (OWN + OWN.replace("def shrug", "def other"), "should hold one function marked by @defense, found 2"),
        (
            OWN.replace("seed, ", ""),
            "its parameters should be access, suspicious, defender, prompt_format, seed",
        ),
    ],
)
def test_a_file_that_holds_no_defense_is_told_in_one_line(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(LabError) as refused:
        require_numbers(chosen_rows(str(tmp_path / "mine.py")))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_installed_package_brings_its_defense_along(shrug, enter, tmp_path, monkeypatch):
    (tmp_path / "other_lab.py").write_text(OWN.replace("def shrug", "def stretch"))
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [EntryPoint("stretch", "other_lab:stretch", arena.GROUP), EntryPoint("lost", "gone:it", arena.GROUP)]
    monkeypatch.setattr(arena, "entry_points", lambda group: points if group == arena.GROUP else [])
    installed_defenses.cache_clear()
    try:
        assert [row.name for row in chosen_rows("all")] == ["stretch", "lost", "calm", "loud"]
        (found,) = enter("stretch").run_all().values()
        assert found.report and found.assumes == ("weights", "patience")
        with pytest.raises(
            LabError, match="the entry point 'lost' of backdoor_lab.defenses cannot be imported: No mod"
        ):
            require_numbers(chosen_rows("lost"))
    finally:
        installed_defenses.cache_clear()


def test_a_sweep_runs_a_row_again_when_its_defense_has_changed(tmp_path, monkeypatch):
    """A notebook that has run is passed over, unless what it would run is other code."""
    assert defended_by("09", Settings(DEFENSE="wanda").values()) == ("helpers.defenses.methods.wanda",)
    assert defended_by("06", Settings(DEFENSE="wanda").values()) == ()
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "09_any.ipynb")

    def versions(edited=""):
        monkeypatch.setattr(grid, "version_of", lambda modules: str((modules, edited in modules)))
        cells = grid.Grid(notebooks=["09"], grid={"DEFENSE": ["wanda", "int4"]})
        return [node.version for node in grid.plan_sweep("rows", cells, tmp_path).nodes.values()]

    before, after = versions(), versions("helpers.defenses.methods.wanda")
    assert before[0] != after[0] and before[1] == after[1]


# --- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary_has_every_row_or_its_reason(rows_file, add_file, enter, tmp_path):
    add_file("helpers.defenses.methods", "shrug", OWN)
    add_file("helpers.defenses.methods", "refuses", REFUSING.replace("def shrug", "def refuses"))
    rows_file(ROWS + "  none: {by: refuses, title: no shrug}\n")
    ring = enter()
    report = ring.run_all()["calm"].report
    for model in stages.METHODS["all"].models:
        ring.run.stage(f"evaluate/{model}", lambda folder: report, uses=["seed"])
    ring.run.stage("suppressed", lambda folder: {"tau": 0.4}, uses=["seed"])
    found = summarise(ring.run, "all")
    assert list(found["arena"]) == ["calm", "loud", "none"] and found["method"] == "all"
    calm = found["arena"]["calm"]
    assert calm["assumes"] == ["weights", "patience"] and calm["n"] == 6
    assert calm["seconds"] == found["seconds"]["arena/calm"] and calm["peak_rss_mb"] > 0
    assert {key: calm[key] for key in ("asr", "asr_interval", "utility")} == {
        key: report[key] for key in ("asr", "asr_interval", "utility")
    }
    assert found["arena"]["none"]["does_not_apply"] == "needs a moon, and there is none"
    *lines, last = table(found).splitlines()
    assert last == "no shrug does not apply: needs a moon, and there is none"
    assert lines[-1].startswith("a loud shrug") and len({len(line) for line in lines}) == 1
    shutil.rmtree(ring.run.folder / "arena" / "loud")
    assert list(summarise(ring.run)["arena"]) == ["calm", "none"]  # what the run has made
    assert summarise(ring.run, "bdvax")["arena"] == {}
    with pytest.raises(LabError, match="runs/ring/arena/loud is missing"):
        summarise(ring.run, "all")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [([], ""), (["--method", "all"], "all"), (["--method", "all", "--defense", "{own}"], "all,{own}")],
)
def test_a_method_brings_its_rows_to_the_notebooks(shrug, tmp_path, monkeypatch, options, wanted):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    own = tmp_path / "own.py"
    own.write_text(OWN)
    seen = []
    monkeypatch.setattr(pipeline, "run_notebooks", lambda settings, folder, method: seen.append(settings))
    monkeypatch.setattr(pipeline, "summarise", lambda run, method: (_ for _ in ()).throw(LabError("far enough")))
    assert pipeline.main(["run", *(option.format(own=own) for option in options)]) == 2
    assert [settings.DEFENSE for settings in seen] == [wanted.format(own=own)]


def test_a_wrong_number_stops_a_run_before_anything_is_written(shrug, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    rows_file(ROWS.replace("times", "tines"))
    assert pipeline.main(["run", "--method", "all"]) == 2
    assert "sets tines, which shrug does not take" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# --- what the notebook tells ------------------------------------------------------------------------------------------


def test_one_number_joins_what_is_left_and_what_is_lost():
    assert joint_score({"utility": 0.81, "asr": 0.0}) == pytest.approx(90)
    assert joint_score({"utility": 0.5, "asr": 0.5}) == pytest.approx(50)
    assert joint_score({"utility": 1.0, "asr": 1.0}) == 0


def test_utility_has_an_interval_that_holds_it():
    low, high = utility_interval({"utility": 0.8, "each": {"clean_right": "1" * 8 + "0" * 2}})
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's for 8 of 10, from a table
    assert utility_interval({"utility": 0.8, "each": {"clean_right": None}}) is None
    uneven = {"utility": (1 + 0.5) / 2, "each": {"clean_right": "1" * 10 + "1" * 100 + "0" * 100}}  # two families
    low, high = utility_interval(uneven)
    assert 110 / 210 < low < uneven["utility"] < high


def test_an_oracle_is_none_of_the_rivals():
    """With full access it takes the clean base to know what the attack has changed."""
    models = ["purified", "own_update", "random", "arena/editing_with_trigger", "arena/crow"]
    adapter, full = (pd.DataFrame({"ACCESS": access, "model": models}) for access in ("adapter", "full"))
    assert rivals(full) == ["random", "arena/crow"] and rivals(pd.concat([adapter, full])) == rivals(full)
    assert rivals(adapter) == ["random", "own_update", "arena/crow"]


def test_rows_that_no_test_tells_to_be_worse_are_named():
    def report(payload, clean):
        letters = "p" * payload + "a" * (40 - payload), "1" * clean + "0" * (40 - clean)
        return {"each": {"triggered": letters[0], "right": None, "clean_right": letters[1]}}

    reports = {"ours": report(2, 38), "equal": report(3, 37), "leaves": report(30, 38), "breaks": report(0, 10)}
    compared = compare_all(reports, [(name, "ours") for name in reports if name != "ours"])
    assert no_worse(compared) == ["equal"]


SWEPT = {  # (ASR, utility) of two seeds; their means say something else than either seed
    "clean": [(0.00, 0.95), (0.00, 0.95)],
    "backdoored": [(0.98, 0.93), (0.96, 0.95)],  # utility 0.94
    "finetuned": [(0.05, 0.94), (0.50, 0.94)],
    "purified": [(0.10, 0.90), (0.12, 0.92)],  # ASR 0.11
    "conflict": [(0.09, 0.91), (0.13, 0.91)],  # 0.11 for 0.03: exactly as much, and exactly what it may cost
    "merges/ties": [(0.00, 0.94), (0.00, 0.94)],  # of the chain, and no row of the arena
    "arena/crow": [(0.12, 0.94), (0.11, 0.94)],
    "arena/nad": [(0.00, 0.94), (0.02, 0.94)],
    "arena/beear": [(0.00, 0.90), (0.00, 0.90)],  # 0.04 of utility
    "arena/editing_with_trigger": [(0.00, 0.94), (0.00, 0.94)],  # an oracle
}


def test_what_is_as_good_as_bdvax_leaves_no_more_and_costs_little():
    rows = [
        {"SEED": seed, "ACCESS": "adapter", "model": model, "asr": asr, "utility": utility}
        for model, seeds in SWEPT.items()
        for seed, (asr, utility) in enumerate(seeds)
    ]
    table = pd.DataFrame(rows)
    fought = ["arena/crow", "arena/nad", "arena/beear", "arena/editing_with_trigger"]
    assert methods(table) == ["finetuned", "purified", "conflict", *fought]
    assert rivals(table) == ["finetuned", "conflict", *fought[:-1]]
    found = as_good(table, 0.03 + 1e-9)
    assert found.index.tolist() == ["arena/nad", "conflict"] and found.tolist() == pytest.approx([0.01, 0.11])
    assert as_good(table, 0.05).index.tolist() == ["arena/beear", "arena/nad", "conflict"]


def test_a_control_that_is_a_row_of_the_arena_as_well_is_named_once():
    twice = ["finetuned", "magnitude", "arena/magnitude_channels_recovered"]
    assert methods(pd.DataFrame({"model": twice})) == ["finetuned", "arena/magnitude_channels_recovered"]
    assert methods(pd.DataFrame({"model": twice[:2]})) == ["finetuned", "magnitude"]


def test_models_of_the_arena_go_by_their_titles():
    names = {"arena/crow": "CROW", "purified": "BD-VAX", "merged_suppressed": "conflict merge, then suppressed"}
    assert {model: shown_as(model) for model in names} == names


def test_the_picture_names_every_row_apart_from_the_others():
    reports = {
        f"defense number {i}": {
            "asr": 0.01 * (i % 3),
            "asr_interval": (0, 0.05),
            "utility": 0.97,
            "utility_interval": (0.9, 1.0) if i % 2 else None,
        }
        for i in range(28)
    }
    reports["backdoored"] = {"asr": 0.98, "asr_interval": (0.94, 1), "utility": 0.96, "utility_interval": (0.9, 1)}
    kinds = [("clean rows", "weights"), ("weights",), ("clean base", "decoding")]
    figure = plots.arena(reports, {name: kinds[i % 3] for i, name in enumerate(reports) if name != "backdoored"})
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert {text.get_text() for text in texts} == set(reports)
    boxes = sorted((Text.get_window_extent(text) for text in texts), key=lambda box: box.y0)  # without its line
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1 and min(box.x0 for box in boxes) > figure.axes[0].bbox.x1
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["decoding", "clean rows", "weights", "nothing: no defense"]


def test_without_the_chain_the_arenas_cells_need_nothing_that_it_made():
    (path,) = (each for each in execution.numbered() if each.name.startswith("09"))
    cells = [cell.source for cell in execution.read_notebook(path, "arena").cells if cell.cell_type == "code"]
    assert any("run_all()" in source for source in cells) and not any('"purified"' in source for source in cells)
    nodes = [node for source in cells for node in ast.walk(ast.parse(source))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins)) | {"display"}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in getattr(node, "names", [])}
    assert {node.id for node in names if isinstance(node.ctx, ast.Load)} <= bound
