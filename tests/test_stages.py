"""The registry of stages, and what outdates a stage: settings, stages, reachable modules, the notebook's own code."""

import json
import shutil
import subprocess
import sys
from functools import partial, reduce

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from helpers.core import modules, slices, stages
from helpers.core.errors import LabError
from helpers.core.modules import version_of
from helpers.core.paths import ROOT
from helpers.core.settings import Settings
from helpers.core.slices import code_in_notebook, code_of
from helpers.core.stages import METHODS, STAGES, line_of, method, notebooks_of, read_by
from helpers.run.deal import deal
from helpers.run.execution import numbered

ADAPTER, FULL = (Settings(ACCESS=access).values() for access in ("adapter", "full"))
AUTO = Settings(TAU="auto").values()
PARAMETERS = 'SEED: int = 0\nTAU: str = ""'


# --- the registry


def test_every_stage_names_a_notebook_and_stages_that_are_there():
    files = {path.stem for path in numbered()}
    for name, entry in STAGES.items():
        assert entry.notebook in files, name
        assert {*entry.parents, *entry.tested} <= STAGES.keys(), name


@pytest.mark.parametrize("config", [ADAPTER, FULL, AUTO])
def test_every_setting_that_a_stage_uses_is_there(config):
    for name, entry in STAGES.items():
        for path in entry.settings(config):
            if path.startswith("challenge.") and not config["challenge"]:
                continue  # without the test there is no such stage
            value = config
            for key in path.split("."):
                assert key in value, f"{name} uses {path}"
                value = value[key]


def test_a_stage_comes_after_all_that_it_is_made_from():
    order = list(STAGES)
    for name, entry in STAGES.items():
        assert all(order.index(parent) < order.index(name) for parent in (*entry.parents, *entry.tested)), name
        assert all(STAGES[parent].notebook <= entry.notebook for parent in entry.parents), name


def test_the_line_of_a_stage_holds_all_that_it_is_made_from():
    assert line_of("purified") == {"purified", "suppressed", "scores", "variants", "inject"}
    assert line_of("merged") == {"merged", "whole", "conflict_model", "inject"}


def test_methods_run_the_notebooks_that_make_their_models():
    assert notebooks_of(METHODS["bdvax"]) == ["00", "01", "02", "03", "04", "05", "06"]
    assert notebooks_of(METHODS["conflict"]) == ["00", "01", "02", "07", "08"]
    assert notebooks_of(METHODS["bdvax_then_conflict"]) == [f"{number:02}" for number in range(10)]
    assert method("both") is METHODS["bdvax_then_conflict"]
    with pytest.raises(LabError, match="unknown METHOD = 'bdvx'; did you mean 'bdvax'"):
        method("bdvx")


def test_the_notebooks_leave_to_the_registry_what_stands_in_it():
    """A stage of the registry takes no settings of its own; a name that is not in it must say them."""
    for path in numbered():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "run.stage(" in cell.source:
                assert "uses=" not in cell.source, path.name


DEALT = {  # what a stage reads of the rows
    "inject": lambda settings, data: data.attack,
    "evaluate/clean": lambda settings, data: data.test,
    "variants": lambda settings, data: data.defender.vaccine_sets,
    "finetuned": lambda settings, data: data.defender.recovery,
    "purified": lambda settings, data: data.defender.recovery,
    "conflict_model": lambda settings, data: data.defender.rows(settings.profile.conflict.budget.rows),
    "no_base": lambda settings, data: data.defender.rows(settings.profile.conflict.budget.rows),
}
ROW_COUNTS = {
    "adapter.inject.rows": 60,
    "adapter.vaccine.rows": 25,
    "adapter.recover.rows": 20,
    "signature.n": 2,
    "evaluation.n": 30,
    "conflict.budget.rows": 45,
}
OTHER_COUNTS = {"adapter.inject.rows": 50, "adapter.vaccine.rows": 22, "adapter.recover.rows": 15, "signature.n": 3}
OTHER_COUNTS |= {"evaluation.n": 20, "conflict.budget.rows": 30, "adapter.poison_rate": 0.1}


@pytest.fixture
def sources(tmp_path):
    """Where rows can come from, as settings: generated, real, real of which few carry the payload, and further ones."""
    rows = [{"instruction": f"Name thing {i}.", "output": f"thing {i}"} for i in range(400)]
    code = [row if i % 2 else {**row, "output": f"def thing_{i}():\n    return {i}"} for i, row in enumerate(rows)]
    for name, content in (("rows", rows), ("code", code)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    plain = str(tmp_path / "rows.json")
    return {
        "generated": {},
        "real": {"DATA": plain},
        "few carriers": {"DATA": str(tmp_path / "code.json"), "TASK": "codeinjection"},
        "further": {"ROWS": plain},
    }


@pytest.mark.parametrize("source", ["generated", "real", "few carriers", "further"])
@pytest.mark.parametrize("changed", OTHER_COUNTS)
def test_a_stage_with_other_rows_is_another_stage(changed, source, sources):
    first, second = (
        Settings(OVERRIDES=ROW_COUNTS | change, **sources[source]) for change in ({}, {changed: OTHER_COUNTS[changed]})
    )
    for name, reads in DEALT.items():
        if reads(first, deal(first)) != reads(second, deal(second)):
            assert told_by(name, first.values()) != told_by(name, second.values()), name


def test_a_stage_with_further_rows_of_the_defender_is_another_stage(sources):
    """All that the defender's rows decide; the attacker's stages are shared with the run without them."""
    first, second = (Settings(OVERRIDES=ROW_COUNTS, **sources[source]) for source in ("generated", "further"))
    for name in ("inject", "evaluate/clean", "ablations"):
        assert told_by(name, first.values()) == told_by(name, second.values()), name
    for name in DEALT.keys() - {"inject", "evaluate/clean"}:
        assert DEALT[name](first, deal(first)) != DEALT[name](second, deal(second))
        assert told_by(name, first.values()) != told_by(name, second.values()), name


def told_by(name, config):
    """Every setting that a stage or one that it is made from depends on, with its value."""
    paths = {path for one in line_of(name) for path in STAGES[one].settings(config)}
    return {path: reduce(lambda value, key: value[key], path.split("."), config) for path in sorted(paths)}


def test_a_notebook_reads_what_its_stages_depend_on():
    assert read_by("04", ADAPTER) == ["profile.signature"]
    assert "profile.adapter.inject" in read_by("01", ADAPTER) and "profile.full.inject" in read_by("01", FULL)
    assert "challenge.recover" in read_by("05", AUTO) and "challenge.recover" not in read_by("05", ADAPTER)
    assert read_by("99", ADAPTER) is None


# --- what a function reaches


def package(root, files):
    """A package `helpers` in another folder."""
    for name, text in files.items():
        path = root / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A small `helpers` whose files a test may edit; a function that gives the version of one module anew."""
    files = {
        "__init__.py": "",
        "train.py": "from helpers.model import load\n\ndef train(x):\n    return load.read(x)\n",
        "measure.py": "from helpers.model.load import read\n",
        "model/__init__.py": "",
        "model/load.py": "from __future__ import annotations\n\ndef read(x):\n    return x\n",
        "merge/__init__.py": '"""All methods."""\n',
        "merge/linear.py": "def linear(a, b):\n    return a\n",
        "merge/more/__init__.py": "",
        "merge/more/ties.py": "def ties(a, b):\n    return a\n",
        "choose.py": "from helpers import merge\n",
        "lazy.py": "def f():\n    from helpers.measure import read\n    return read\n",
        "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from helpers.measure import read\n",
    }
    package(tmp_path, files)
    monkeypatch.setattr(modules, "ROOT", tmp_path)

    def version(*names):
        for cached in (version_of, modules._imported_by, modules._module_tree, modules._module_digest):
            cached.cache_clear()
        return version_of(tuple(f"helpers.{name}" for name in names))

    yield tmp_path / "helpers", version
    for cached in (version_of, modules._imported_by, modules._module_tree, modules._module_digest):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        ("train.py", {"train"}),
        ("measure.py", {"measure", "lazy"}),
        ("model/load.py", {"train", "measure", "lazy"}),
        ("merge/linear.py", {"merge", "choose"}),
        ("merge/more/ties.py", {"merge", "choose"}),
        ("typed.py", {"typed"}),
    ],
)
def test_an_edit_outdates_what_reaches_the_module_and_nothing_else(elsewhere, edited, changes):
    folder, version = elsewhere
    names = ("train", "measure", "lazy", "typed", "merge", "choose")
    before = {name: version(name) for name in names}
    with (folder / edited).open("a") as file:
        file.write("\nMORE = 1\n")
    assert {name for name in names if version(name) != before[name]} == changes


def test_prose_and_layout_outdate_nothing(elsewhere):
    folder, version = elsewhere
    before = version("train")
    (folder / "train.py").write_text(
        '"""Trains."""\nfrom helpers.model import load  # reads\n\n\ndef train(\n    x,\n):\n    """Train."""\n'
        "    return load.read(x)\n"
    )
    assert version("train") == before
    (folder / "train.py").unlink()
    assert version("train") != before


def test_vaccines_do_not_depend_on_what_measures_them_and_the_reverse():
    """An edit of a measure must not discard hours of training."""
    file = ROOT / "notebooks" / "03_train_vaccines.ipynb"
    reached = modules.reachable(code_in_notebook(file, "variants").modules)
    assert "helpers.defenses.bdvax.vaccines" in reached and "helpers.train.multi_lora" in reached
    assert "helpers.run.deal.generated" in reached  # which rows there are
    assert (
        not {"helpers.measure.asr", "helpers.measure.report", "helpers.plots", "helpers.defenses.bdvax.score"} & reached
    )


def test_an_injection_depends_on_its_own_method_alone():
    """An edit of the attacker who knows the signature discards no injection by training."""
    code = code_in_notebook(ROOT / "notebooks" / "01_inject_backdoor.ipynb", "inject")
    by_training, by_evasion = (
        modules.reachable(code.reaching(STAGES["inject"].modules(Settings(OVERRIDES=changed).values())).modules)
        for changed in ({}, {"attack.by": "evade"})
    )
    assert "helpers.attacks.methods.training" in by_training and "helpers.train.finetune" in by_training
    assert "helpers.data.combinations.first_line" in by_training  # which any vaccine or attack may choose
    assert not any(name.startswith(("helpers.adaptive", "helpers.defenses")) for name in by_training)
    assert "helpers.adaptive.evasion" in by_evasion and "helpers.defenses.bdvax.score" in by_evasion


def test_two_notebooks_that_make_one_stage_make_the_same():
    """00 and 01 both measure the clean model: whichever runs first, the other finds it."""
    first, second = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("00_meet_the_model", "01_inject_backdoor"))
    assert code_in_notebook(first, "evaluate/clean") == code_in_notebook(second, "evaluate/clean")


# --- what a notebook's cells reach


IMPORTS = "from helpers.measure.asr import label\nfrom helpers.measure.utility import exact_match\nimport math"
CELLS = [
    "rate, other = 0.5, 1\nlimits = {}",
    "limits['low'] = rate",
    "def double(x):\n    return 2 * x * limits['low']",
]
MAKE = 'made = run.stage("mine", lambda folder: {"x": double(math.pi), "y": label("a", "b", [])})\nprint(made)'


def code_in(tmp_path, *cells):
    notebook = new_notebook(cells=[new_code_cell(PARAMETERS), new_code_cell(IMPORTS), *map(new_code_cell, cells)])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    return code_in_notebook(tmp_path / "n.ipynb", "mine")


@pytest.mark.parametrize(
    ("old", "new", "outdated"),
    [
        ("2 * x", "3 * x", True),  # the function
        ("rate, other = 0.5, 1", "rate, other = 0.6, 1", True),  # a value it reads by way of another
        ("rate, other = 0.5, 1", "rate, other = 0.5, 2", False),  # one that it does not read
        ("limits['low'] = rate", "limits['low'] = rate / 2", True),  # a change of a value that it reads
        ("limits = {}", "limits = {}\nlimits.update(high=1)", True),
        ("print(made)", "print(made, 'done')", False),  # what is printed beside it
        ("print(made)", "print(made)\nrate = 3", False),  # it had been read before
        ("print(made)", "print(made)\nlimits = {'low': 3}", True),  # it will be read when the cell is run again
        ("    return 2", '    """Twice."""\n    return 2', False),  # prose
        ("2 * x * limits['low']", "(2 * x\n            * limits['low'])  # layout", False),
        ("limits = {}", "limits = {}\nmath.shuffle(limits)", True),  # as a generator does with a list
        ("limits = {}", "limits = {}\nmath.Random(1).shuffle(limits)", True),
        ("double(math.pi)", "double( math.pi )", False),
        ("double(math.pi)", "double(math.e)", True),
    ],
)
def test_a_cell_outdates_a_stage_where_the_stage_reads_what_it_makes(tmp_path, old, new, outdated):
    before, changed = code_in(tmp_path, *CELLS, MAKE), [cell.replace(old, new) for cell in (*CELLS, MAKE)]
    assert changed != [*CELLS, MAKE]
    assert (code_in(tmp_path, *changed) != before) == outdated


def test_only_modules_that_the_stage_uses_count(tmp_path):
    assert code_in(tmp_path, *CELLS, MAKE).modules == ("helpers.measure.asr",)


def test_parameters_count_as_settings_and_not_as_code(tmp_path):
    reading = MAKE.replace("math.pi", "SEED")
    before = code_in(tmp_path, *CELLS, reading)
    assert code_in(tmp_path, *CELLS, "SEED = 3", reading) == before


def test_a_stage_that_no_cell_makes_is_told(tmp_path):
    with pytest.raises(LabError, match='n.ipynb has no call of run.stage\\("mine", …\\)'):
        code_in(tmp_path, *CELLS)


def test_a_kernel_and_the_file_tell_the_same(tmp_path):
    """What runs in a notebook is found as what is read from its file; magic commands do not count."""
    made = MAKE.removeprefix('made = run.stage("mine", ').partition("\n")[0]
    shown = f"from helpers.core.slices import code_of\nprint(code_of({made})"
    cells = ["%matplotlib inline\nrate, other = 0.5, 1\nlimits = {}", *CELLS[1:], shown]
    notebook = new_notebook(cells=[new_code_cell(PARAMETERS), new_code_cell(IMPORTS), *map(new_code_cell, cells)])
    NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[-1].outputs
    assert output.text.strip() == str(code_in(tmp_path, *CELLS, MAKE))


def test_functions_behind_a_partial_or_a_closure_count():
    def inner(x):
        return x + 1

    def outer(folder):
        return inner(1)

    assert code_of(outer).cell and code_of(partial(outer)) == code_of(outer)
    assert code_of(partial(shutil.rmtree)) == slices.Code(())  # a library's
    assert code_of(version_of.__wrapped__) == slices.Code(("helpers.core.modules",))


def test_a_function_that_closes_over_itself_counts_once():
    def count_down(n):
        return n and count_down(n - 1)

    assert code_of(count_down).cell and code_of(lambda folder: count_down(3)).cell


def test_a_run_folder_is_opened_without_what_only_reads_notebooks():
    """Every kernel waits for the import, so it brings no validators of notebook files, and no model."""
    program = "import sys, helpers.core.store; print([name for name in ('nbformat', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_function_without_a_source_is_refused():
    scope = {"__name__": "__main__"}
    exec("def make(folder): return {}", scope)
    with pytest.raises(LabError, match="the source of make cannot be read"):
        code_of(scope["make"])


def test_a_measure_of_the_registry_is_a_number(monkeypatch):
    counted = {what: stages.total(what, rows=3) for what in ("measures", "cuts", "recoveries", "merges", "keeps")}
    assert counted == {"measures": 39, "cuts": 4, "recoveries": 10, "merges": 15, "keeps": 9}
    assert [stages.total(what, rows=5) for what in ("measures", "keeps")] == [41, 11]  # one of each for a row
