"""Sweeps on throw-away notebooks: real kernels, real Dask workers, a real scheduler over loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from distributed import Client
from nbformat.v4 import new_code_cell, new_notebook

from helpers.core.disk import read_json, write_json
from helpers.core.errors import LabError
from helpers.core.locks import hold
from helpers.core.paths import MANIFEST
from helpers.core.profile_files import load_profile
from helpers.core.run_names import run_folder
from helpers.core.stages import METHODS, notebooks_of
from helpers.core.store import Run
from helpers.measure.reading import ALONE
from helpers.run import cluster as workers
from helpers.run import sweeps
from helpers.run.grid import Grid, plan_sweep, read_grid
from helpers.run.pipeline import KERNEL, main
from helpers.run.sweeps import sweep

pytestmark = pytest.mark.slow

PARAMETERS = """PROFILE: str = "tiny"
ATTACK: str = "badnets"
TASK: str = "sentiment"
ACCESS: str = "adapter"
SEED: int = 0
NAME: str = ""
DATA: str = ""
TAU: str = ""
OVERRIDES: dict = {}"""
OPEN = """import os, signal
from pathlib import Path
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.core.store import run_of
from helpers.core.paths import runs_folder
settings = Settings.from_notebook(globals())
run, tau = run_of(settings), settings.profile.adapter.suppress.tau

def log(line):
    with open(runs_folder().parent / "log", "a") as file:
        file.write(line + "\\n")"""
INJECT = """def inject(folder):
    log(f"inject {SEED}")
    (folder / "weights").write_text(str(SEED))
run.stage("inject", inject, uses=["seed", "profile.adapter.inject"])"""
CUT = """injected = run.need("inject")
log(f"cut {SEED} {tau}")
run.stage("suppressed", lambda folder: {"weights": (injected.path / "weights").read_text(), "tau": tau},
          uses=["profile.adapter.suppress"], parents=[injected])"""
MEASURE = """cut = run.need("suppressed")
def measured(folder):
    log(f"measure {SEED} {tau}")
    return {"asr": tau, "asr_interval": [0, 1], "labels": {"payload": 1, "answer": 0, "degenerate": 0, "silent": 0},
            "n": 1, "utility": float(cut.result["weights"]), "right_under_trigger": None, "false_trigger": 0.0,
            "perplexity": 1.0, "utility_metric": "exact_match", "decoding": "greedy",
            "each": {"triggered": "p", "right": "0", "clean": "a", "clean_right": "1"}
            } | ({"sampled": {"asr": tau / 2}} if SEED == 1 else {})
run.stage("evaluate/purified", measured, uses=[], parents=[cut])"""
GRID = Grid(notebooks=["01", "05", "06"], grid={"SEED": [1, 2], "adapter.suppress.tau": [0.2, 0.4]})


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Three notebooks that share what a real lab's share, beside an empty runs folder."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    write(tmp_path, "01_inject", INJECT)
    write(tmp_path, "05_suppress", CUT)
    write(tmp_path, "06_recover", MEASURE)
    return tmp_path


def keep_runs_here(client):
    """Have workers that started for another test keep their runs where this one does."""
    client.run(lambda runs: os.environ.update(LAB_RUNS=runs), os.environ["LAB_RUNS"])


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A cluster that several sweeps share, and its client: workers start for longer than most of the cells run."""
    scratch = str(tmp_path_factory.mktemp("scratch"))
    with workers._local_cluster(False, scratch) as cluster, Client(cluster) as client:
        yield cluster, client


def address_of(standing):
    """The address of that cluster, which from now on keeps its runs where this test does and knows of no sweep."""
    cluster, client = standing
    keep_runs_here(client)
    deadline = time.monotonic() + 30
    while cluster.scheduler.tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not cluster.scheduler.tasks
    return cluster.scheduler_address


@pytest.fixture(scope="module")
def finished(standing, tmp_path_factory):
    """A folder as `lab`, in which the sweep "both" of `GRID` is finished."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(folder / "runs"))
        for name, cell in (("01_inject", INJECT), ("05_suppress", CUT), ("06_recover", MEASURE)):
            write(folder, name, cell)
        sweep("both", GRID, address_of(standing), folder=folder / "notebooks")
    return folder


@pytest.fixture
def scheduler(standing, lab):
    """A function that gives the address of that cluster for a sweep of this lab."""
    return partial(address_of, standing)


@pytest.fixture
def swept(lab, finished):
    """A lab of one's own in which that sweep is finished."""
    shutil.copytree(finished, lab, dirs_exist_ok=True)
    return lab


def write(lab, name, *cells):
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[tagged, new_code_cell(OPEN), *map(new_code_cell, cells)])
    notebook.metadata = {"kernelspec": KERNEL}
    (lab / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, lab / "notebooks" / f"{name}.ipynb")


def log(lab):
    return sorted((lab / "log").read_text().splitlines())


def test_importing_what_runs_notebooks_loads_nothing_that_computes():
    heavy = "{'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'} & sys.modules.keys()"
    code = f"import sys, helpers.run.sweeps, helpers.run.pipeline; print(*{heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_cells_share_is_planned_once(lab):
    plan = plan_sweep("both", GRID, lab / "notebooks")
    kinds = [node.key[:2] for node in plan.nodes.values()]
    assert (kinds.count("01"), kinds.count("05"), kinds.count("06"), len(plan.cells)) == (2, 4, 4, 4)
    order = list(plan.nodes)
    assert all(order.index(node.parent) < order.index(node.key) for node in plan.nodes.values() if node.parent)
    assert plan.cells[1].values == {"SEED": 1, "adapter.suppress.tau": 0.4}
    assert plan.nodes[plan.cells[1].leaf].parameters["OVERRIDES"] == {"adapter.suppress.tau": 0.4}


@pytest.mark.parametrize(
    ("setting", "values", "first_to_differ"),
    [
        ("TASK", ["sentiment", "refusal"], "01"),
        ("adapter.inject.lr", [1.0e-3, 2.0e-3], "01"),
        ("full.inject.lr", [1.0e-3, 2.0e-3], None),  # of the other access: no cell reads it
        ("signature.n", [2, 3], "03"),
        ("adapter.vaccine.epochs", [1, 2], "03"),
        ("signature.lam", [0.0, 0.1], "04"),
        ("adapter.suppress.tau", [0.1, 0.2], "05"),
        ("TAU", [0.3, "auto"], "05"),
        ("challenge.threshold", [0.05, 0.1], None),  # read where the challenge test is asked for
        ("adapter.recover.lr", [1.0e-4, 2.0e-4], "06"),
    ],
)
def test_cells_part_at_the_first_notebook_that_reads_what_differs(setting, values, first_to_differ):
    plan = plan_sweep("x", Grid(grid={setting: values}))
    counts = {
        number: sum(key.startswith(number) for key in plan.nodes) for number in Grid.model_fields["notebooks"].default
    }
    assert counts == {number: 2 if first_to_differ and number >= first_to_differ else 1 for number in counts}


def test_where_the_challenge_test_chooses_its_settings_are_read_where_it_runs():
    for setting, values in (("challenge.threshold", [0.05, 0.1]), ("adapter.recover.lr", [1.0e-4, 2.0e-4])):
        plan = plan_sweep("x", Grid(fixed={"TAU": "auto"}, grid={setting: values}))
        counts = {number: sum(key.startswith(number) for key in plan.nodes) for number in ("01", "03", "04", "05")}
        assert counts == {"01": 1, "03": 1, "04": 1, "05": 2}


def test_a_share_in_the_grid_is_a_parameter_or_a_number_of_the_profile(lab, scheduler):
    table = sweep("one", Grid(notebooks=GRID.notebooks, grid={"TAU": [0.2, ""]}), scheduler(), folder=lab / "notebooks")
    shipped = load_profile("tiny").adapter.suppress.tau
    assert table[["TAU", "tau", "asr"]].values.tolist() == [["0.2", 0.2, 0.2], ["", shipped, shipped]]


def test_a_sweep_runs_shared_nodes_once_and_a_rerun_runs_nothing(swept, scheduler):
    lab = swept
    before = pd.read_parquet(lab / "runs" / "both" / "results.parquet")
    table = sweep("both", GRID, scheduler(), folder=lab / "notebooks")
    pd.testing.assert_frame_equal(before, table)
    cells = ["1 0.2", "1 0.4", "2 0.2", "2 0.4"]
    assert log(lab) == [f"cut {c}" for c in cells] + ["inject 1", "inject 2"] + [f"measure {c}" for c in cells]
    assert table[["SEED", "adapter.suppress.tau", "asr", "utility"]].values.tolist() == [
        [1, 0.2, 0.2, 1.0],
        [1, 0.4, 0.4, 1.0],
        [2, 0.2, 0.2, 2.0],
        [2, 0.4, 0.4, 2.0],
    ]
    assert table["tau"].tolist() == table["adapter.suppress.tau"].tolist()  # what was really cut
    assert table[["each_triggered", "each_right", "each_clean_right"]].values.tolist() == 4 * [["p", "0", "1"]]
    stored, _ = sweeps.read_results("both")
    assert stored["each_right"].tolist() == 4 * ["0"]  # text, and no number of two hundred digits
    assert table["sampled_asr"].fillna(-1).tolist() == [0.1, 0.2, -1, -1]  # where answers were drawn
    root = lab / "runs" / "both"
    for name in table["manifest"]:
        assert read_json(root / name)["name"] == "evaluate/purified" and name.endswith(MANIFEST)
    pd.testing.assert_frame_equal(pd.read_parquet(root / "results.parquet"), table)
    assert len(pd.read_csv(root / "results.csv")) == 4
    wider = Grid(notebooks=GRID.notebooks, grid=GRID.grid | {"adapter.suppress.tau": [0.4, 0.6]})
    assert len(sweep("both", wider, scheduler(), folder=lab / "notebooks")) == 4
    assert len(log(lab)) == 14  # cut and measure, for two seeds at the one new share


def test_a_utility_without_the_defense_s_decoding_stays_empty(swept):
    plan = plan_sweep("both", GRID, swept / "notebooks")
    name = sweeps.results(plan, {})["manifest"].iloc[1]
    manifest = read_json(plan.root / name)
    manifest["result"] |= {"utility_metric": "token_accuracy", "decoding": f"CleanGen, greedy; {ALONE}"}
    write_json(plan.root / name, manifest)
    table = sweeps.results(plan, {})
    assert table["utility"].isna().tolist() == table["perplexity"].isna().tolist() == [False, True, False, False]
    assert table["asr"].tolist() == [0.2, 0.4, 0.2, 0.4]  # answers are always written by the decoding


def test_each_report_of_a_stage_that_holds_several_is_a_row(swept):
    plan = plan_sweep("both", GRID, swept / "notebooks")
    name = sweeps.results(plan, {})["manifest"].iloc[1]
    manifest = read_json(plan.root / name)
    report = manifest["result"]
    manifest["result"] = {"M3": report, "both": report | {"asr": 0.9}, "rows": {"asr": 1.0, "n": 5}, "seconds": 3}
    write_json(plan.root / name, manifest)
    table = sweeps.results(plan, {})
    assert table[["model", "asr"]].values.tolist() == [
        ["purified", 0.2],
        ["purified/M3", 0.4],
        ["purified/both", 0.9],
        ["purified", 0.2],
        ["purified", 0.4],
    ]
    assert table["manifest"].iloc[1] == table["manifest"].iloc[2]


def test_the_utility_of_a_tasks_own_families_stands_beside_that_of_all():
    report = {"utility_by_family": {"memory": 0.2, "followup": 0.4, "year": 1.0}}
    assert sweeps._of_the_task("conversation", report) == {"task_utility": pytest.approx(0.3)}
    assert sweeps._of_the_task("sentiment", report) == {}  # insults go with every family
    assert sweeps._of_the_task("emotion", report) == sweeps._of_the_task("mine", report) == {}


def test_several_grids_make_one_plan(lab):
    more = GRID.model_copy(update={"also": [{"SEED": [1, 3], "TASK": ["refusal"]}, {"SEED": [1]}]})
    plan = plan_sweep("mine", more, lab / "notebooks")
    assert [cell.values for cell in plan.cells[4:]] == [
        {"SEED": 1, "TASK": "refusal"},
        {"SEED": 3, "TASK": "refusal"},
        {"SEED": 1},
    ]
    assert len({cell.leaf for cell in plan.cells}) == 7


def test_optional_cells_are_left_out_where_the_grid_says_so(swept, scheduler):
    lab = swept
    path = lab / "notebooks" / "06_recover.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell('log("a study")', metadata={"tags": ["optional"]}))
    notebook.cells.append(new_code_cell('log("a control")', metadata={"tags": ["optional", "control"]}))
    notebook.cells.append(new_code_cell('log("of the chain")', metadata={"tags": ["chain"]}))
    nbformat.write(notebook, path)
    sweep("both", GRID.model_copy(update={"optional": "arena"}), scheduler(), folder=lab / "notebooks")
    assert not {"a study", "a control", "of the chain"} & set(log(lab))
    short = sweep("both", GRID.model_copy(update={"optional": False}), scheduler(), folder=lab / "notebooks")
    assert len(short) == 4 and "a study" not in log(lab) and "a control" not in log(lab)
    assert log(lab).count("of the chain") == 4
    sweep("both", GRID.model_copy(update={"optional": "controls"}), scheduler(), folder=lab / "notebooks")
    assert log(lab).count("a control") == 4 and "a study" not in log(lab)
    whole = sweep("both", GRID, scheduler(), folder=lab / "notebooks")
    assert log(lab).count("a study") == 4 and log(lab).count("inject 1") == 1  # only what differs ran again
    pd.testing.assert_frame_equal(short.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_a_sweep_is_recorded_and_read_back(swept, monkeypatch):
    lab = swept
    monkeypatch.setattr(sweeps, "RECORDED", lab)
    monkeypatch.setattr(sweeps, "ROOT", lab)
    with pytest.raises(LabError, match="nothing of a sweep 'mine' is stored: run `make sweep GRID="):
        sweeps.read_results("mine")
    with pytest.raises(LabError, match="runs/mine/results.csv is missing"):
        sweeps.record_sweep("mine")
    table = pd.read_parquet(lab / "runs" / "both" / "results.parquet")
    own, place = sweeps.read_results("both")
    assert place == "runs/both/results.csv" and own["asr"].tolist() == table["asr"].tolist()
    assert sweeps.record_sweep("both") == lab / "both.json"
    assert Grid.model_validate(read_json(lab / "both.json")["grid"]) == GRID
    assert read_json(lab / "both.json")["versions"]["torch"] == torch.__version__
    (lab / "runs" / "both" / "results.csv").unlink()
    recorded, place = sweeps.read_results("both")
    assert place == "both.json" and recorded["asr"].tolist() == table["asr"].tolist()


def test_a_sweep_with_a_failure_is_not_recorded(swept, scheduler, monkeypatch):
    lab = swept
    monkeypatch.setattr(sweeps, "RECORDED", lab)
    write(lab, "06_recover", MEASURE, 'assert (SEED, tau) != (2, 0.4), "too much"')
    sweep("both", GRID, scheduler(), folder=lab / "notebooks")
    with pytest.raises(LabError, match="1 cells of the sweep 'both' failed, the first with: 06_recover.ipynb, cell"):
        sweeps.record_sweep("both")
    own, _ = sweeps.read_results("both")
    assert len(own) == 3 and not (lab / "both.json").exists()


def test_changed_notebooks_run_again(lab, scheduler):
    one = Grid(notebooks=GRID.notebooks, fixed={"adapter.suppress.tau": 0.7}, grid={"SEED": [1]})
    sweep("one", one, scheduler(), folder=lab / "notebooks")
    write(lab, "06_recover", MEASURE, "log('more')")
    assert [node.key[:2] for node in plan_sweep("one", one, lab / "notebooks").missing()] == ["06"]
    sweep("one", one, scheduler(), folder=lab / "notebooks")
    assert log(lab) == ["cut 1 0.7", "inject 1", "measure 1 0.7", "more"]  # the stage itself was still good


def test_a_failing_cell_is_named_and_the_others_finish(swept, scheduler, capsys):
    lab = swept
    (lab / "log").unlink()
    write(lab, "05_suppress", CUT, "if SEED == 2 and tau == 0.4: raise LabError('nothing left to cut')")
    (lab / "grid.yaml").write_text(
        "notebooks: ['01', '05', '06']\ngrid: {SEED: [1, 2], adapter.suppress.tau: [0.2, 0.4]}"
    )
    assert main(["sweep", str(lab / "grid.yaml"), "--name", "both", "--scheduler", scheduler()], lab / "notebooks") == 2
    table = pd.read_csv(lab / "runs" / "both" / "results.csv")
    assert table["error"].fillna("").tolist() == ["", "", "", "05_suppress.ipynb, cell 5: nothing left to cut"]
    assert "1 of the cells failed" in capsys.readouterr().err
    assert not any(line == "measure 2 0.4" for line in log(lab))


def test_a_sweep_whose_every_cell_fails_still_has_a_table(lab, scheduler, capsys):
    write(lab, "01_inject", "raise LabError('no such weights')")
    (lab / "grid.yaml").write_text("notebooks: ['01', '05', '06']\ngrid: {SEED: [1, 2]}")
    assert main(["sweep", str(lab / "grid.yaml"), "--name", "none", "--scheduler", scheduler()], lab / "notebooks") == 2
    table = pd.read_csv(lab / "runs" / "none" / "results.csv")
    assert table["SEED"].tolist() == [1, 2]
    assert set(table["error"]) == {"01_inject.ipynb, cell 4: no such weights"}
    assert "2 of the cells failed" in capsys.readouterr().err


def test_a_worker_that_dies_while_it_starts_is_told_in_one_line(lab, monkeypatch):
    born_dead = workers._local_workers(False, str(lab))
    for worker in born_dead.values():
        worker["options"]["preload"] = "import os; os._exit(1)"
    monkeypatch.setattr(workers, "_local_workers", lambda *_: born_dead)
    with pytest.raises(LabError, match="^a worker of the sweep died while it started: the same command tries again$"):
        sweep("mine", GRID, folder=lab / "notebooks")


def test_a_killed_worker_is_replaced_and_the_stage_made_again(lab):
    die = "marker = run.folder.parent.parent / 'died'\nif not marker.exists():\n    marker.touch()\n    log('killed')\n"
    die += "    os.kill(os.getppid(), signal.SIGKILL)\n    import time; time.sleep(60)\n"
    dying = INJECT.replace("    (folder", "    die()\n    (folder")
    write(lab, "01_inject", "def die():\n" + "".join(f"    {line}\n" for line in die.splitlines()), dying)
    one = Grid(notebooks=GRID.notebooks, fixed={"adapter.suppress.tau": 0.7}, grid={"SEED": [1]})
    table = sweep("one", one, folder=lab / "notebooks")
    assert table["utility"].tolist() == [1.0] and (table["error"] == "").all()
    assert log(lab) == ["cut 1 0.7", "inject 1", "inject 1", "killed", "measure 1 0.7"]


def test_a_second_sweep_of_one_name_is_refused(lab, scheduler):
    sweep("both", Grid(notebooks=["01"], grid={"SEED": [1]}), scheduler(), folder=lab / "notebooks")
    with hold(lab / "runs" / "both"), pytest.raises(LabError, match="^runs/both is in use by another process: wait"):
        sweep("both", GRID, scheduler(), folder=lab / "notebooks")
    assert log(lab) == ["inject 1"]


def test_a_node_that_another_worker_has_finished_meanwhile_is_not_run_again(lab):
    plan = plan_sweep("both", GRID, lab / "notebooks")
    node = next(iter(plan.nodes.values()))
    (plan.root / node.key).mkdir(parents=True)
    write_json(plan.root / node.key / sweeps.DONE, {"version": node.version})
    assert sweeps.run_node(node, plan.root) == sweeps.Outcome(node.key)
    assert not (lab / "log").exists()


def started(lab):
    """A sweep in a process and a session of its own."""
    (lab / "grid.yaml").write_text("notebooks: ['01', '05']\ngrid: {SEED: [1]}")
    program = "import signal, sys; from pathlib import Path; from helpers.run.pipeline import main\n"
    program += "if __name__ == '__main__':\n    "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n    "  # ignored in a shell's background jobs
    program += "sys.exit(main(['sweep', sys.argv[1], '--name', 'both'], Path(sys.argv[2])))"
    (lab / "program.py").write_text(program)  # Dask's workers import it
    command = [sys.executable, lab / "program.py", lab / "grid.yaml", lab / "notebooks"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=os.environ | {"TQDM_DISABLE": "1"}, **options)


@pytest.mark.parametrize("strike", [os.kill, os.killpg], ids=["sweep", "terminal"])  # which strikes the workers as well
def test_an_interruption_while_the_workers_start_is_told_alone(lab, strike):
    with started(lab) as process:
        while process.poll() is None and not psutil.Process(process.pid).children():
            time.sleep(0.01)
        time.sleep(0.5)  # the cluster is half-way up
        family = psutil.Process(process.pid).children(recursive=True)
        strike(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert errors.strip() == "interrupted: finished stages are kept, the same command resumes"
    assert psutil.wait_procs(family, timeout=15)[1] == []


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_killed_sweep_leaves_no_process_and_no_file_and_goes_on_where_it_was(
    lab, scheduler, monkeypatch, number, status, told
):
    monkeypatch.setenv("TMPDIR", str(lab / "tmp"))
    (lab / "tmp").mkdir()
    waits = "import time\nwhile not (runs_folder().parent / 'go').exists():\n    log('waits')\n    time.sleep(0.2)"
    write(lab, "05_suppress", waits, CUT)
    with started(lab) as process:
        while process.poll() is None and not ((lab / "log").exists() and "waits" in log(lab)):
            time.sleep(0.1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if number == signal.SIGINT:  # a terminal sends it to the workers as well
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=180)
    assert process.returncode == status and "Traceback" not in errors
    remedy = "finished stages are kept, the same command resumes"
    assert errors.strip().endswith(f"{told}: {remedy}" if told else "")
    assert len(family) >= 3 and psutil.wait_procs(family, timeout=15)[1] == []
    (lab / "go").touch()
    others = "" if number == signal.SIGKILL else scheduler()  # once on workers of its own, as the killed one
    assert (sweep("both", read_grid(lab / "grid.yaml"), others, folder=lab / "notebooks")["error"] == "").all()
    assert [line for line in log(lab) if line != "waits"] == ["cut 1 0.5", "inject 1"]
    assert not list((lab / "runs").rglob(".*")) and not list((lab / "tmp").iterdir())


def test_a_cell_that_kills_every_worker_is_given_up(swept):
    lab = swept
    write(lab, "05_suppress", CUT, "if SEED == 2: os.kill(os.getppid(), signal.SIGKILL)")
    grid = Grid(notebooks=GRID.notebooks, fixed={"adapter.suppress.tau": 0.2}, grid={"SEED": [1, 2]})
    table = sweep("both", grid, folder=lab / "notebooks")
    assert table["error"].tolist() == [
        "",
        "05_suppress.ipynb: 3 workers died of it; most often the memory did not suffice",
    ]


@contextmanager
def command(*words):
    """A Dask process of its own, stopped afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]], stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@contextmanager
def cluster(folder, *resources):
    """A scheduler and one worker, each a process of its own; yields the address and a client."""
    file, options = folder / "scheduler.json", ("--no-dashboard", "--host", "127.0.0.1")
    with command("dask_scheduler", *options, "--port", "0", "--scheduler-file", str(file)):
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        options += ("--nthreads", "1", "--local-directory", str(folder / "scratch"))
        with command("dask_worker", address, *options, *resources), Client(address) as client:
            client.wait_for_workers(1, timeout=60)
            yield address, client


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """Such a cluster whose worker says that it has a GPU."""
    with cluster(tmp_path_factory.mktemp("declared"), "--resources", "GPU=1") as running:
        yield running


@pytest.fixture
def with_gpu(declared, lab):
    """The address of that cluster, which keeps the runs of this lab."""
    address, client = declared
    keep_runs_here(client)
    return address


def test_a_running_scheduler_does_the_work(lab, with_gpu):
    one_seed = GRID.model_copy(update={"grid": GRID.grid | {"SEED": [1]}})
    table = sweep("both", one_seed, with_gpu, folder=lab / "notebooks")
    assert (table["error"] == "").all() and len(table) == 2
    assert log(lab).count("inject 1") == 1


ON_GPU = Grid(notebooks=GRID.notebooks, fixed={"model.device": "cuda"}, grid={"SEED": [1]})


def test_a_gpu_is_a_resource_that_a_worker_must_have(lab, scheduler):
    with pytest.raises(LabError, match="no worker has one: `.venv/bin/dask worker … --resources GPU=1` starts"):
        sweep("gpu", ON_GPU, scheduler(), folder=lab / "notebooks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the worker only says that it has a GPU")
def test_a_worker_that_declares_a_gpu_gets_the_work(lab, with_gpu):
    looks = "from helpers.run.start import open_run\nopen_run(settings)"
    write(lab, "01_inject", looks, INJECT)
    table = sweep("gpu", ON_GPU, with_gpu, folder=lab / "notebooks")
    assert "01_inject.ipynb, cell 4: the profile asks for a GPU" in table["error"].item()


def test_a_scheduler_that_is_not_there(lab, monkeypatch):
    monkeypatch.setattr(workers, "SCHEDULER_SECONDS", 1)
    with pytest.raises(LabError, match="no Dask scheduler answers at SCHEDULER=tcp://127.0.0.1:9"):
        sweep("both", GRID, "tcp://127.0.0.1:9", folder=lab / "notebooks")


def test_thousands_of_cells_are_planned(lab):
    grid = Grid(grid={"SEED": list(range(10)), "adapter.suppress.tau": [i / 201 for i in range(1, 201)]})
    plan = plan_sweep("large", grid)
    assert len(plan.cells) == 2000 and len(plan.nodes) == 10 * 3 + 2000 * 2
    assert not plan.root.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}", "grid"),
        ("gird: {SEED: [1]}", "unknown parameter 'gird'; did you mean 'grid'"),
        ("- 1", "should hold `grid:`"),
        ("grid: {SEED: 3}", "grid.SEED = 3 should be a valid list"),
        ("grid: {SEED: []}", r"grid.SEED = \[\] should have at least 1 item"),
        ("grid: {SEED: [1]}\nalso: [{}]", "also.0 = {} should have at least 1 item"),
        ("notebooks: []\ngrid: {SEED: [1]}", r"notebooks = \[\] should have at least 1 item"),
    ],
)
def test_a_broken_grid_is_refused(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(LabError, match=message):
        read_grid(path)


def test_workers_get_the_cards_that_this_process_may_use(monkeypatch):
    def cards():
        return [worker["options"]["env"] for worker in workers._local_workers(True, "scratch").values()]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cards() == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert cards() == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(LabError, match="the profile asks for a GPU and none is here"):
        cards()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(grid={"SEDE": [1]}), r"unknown parameter 'SEDE'; did you mean 'SEED'\?.*in the cell {'SEDE': 1}"),
        (Grid(grid={"adapter.suppress.tao": [0.1]}), "did you mean 'adapter.suppress.tau'"),
        (Grid(grid={"adapter.suppress.tau": [0.1, 1.5]}), "in the cell {'adapter.suppress.tau': 1.5}"),
        (
            Grid(grid={"conflict.method": ["linear", "tie"]}),
            r"'tie' is unknown; did you mean 'ties'\?.*in the cell {'conflict.method': 'tie'}",
        ),
        (Grid(notebooks=["01", "77"], grid={"SEED": [1]}), "no notebook '77'"),
        (Grid(grid={"NAME": ["a"]}), "NAME is the sweep's own"),
        (Grid(grid={"OVERRIDES": [{"lora.r": 4}]}), "a grid has dotted keys and no OVERRIDES: lora.r: 4 in `fixed`"),
        (
            Grid(grid={"adapter.suppress.tau": [0.5, 1e-5]}),  # both cells share the notebooks before 05
            "selects none of the .* channels.*in the cell {'adapter.suppress.tau': 1e-05}",
        ),
    ],
)
def test_an_impossible_grid_is_refused_before_anything_runs(grid, message):
    with pytest.raises(LabError, match=message):
        plan_sweep("x", grid)


@pytest.mark.parametrize("order", [["06", "01", "05"], ["05", "06", "01", "01"]])
def test_notebooks_run_in_their_own_order_whatever_the_grids(lab, order):
    found = plan_sweep("x", GRID.model_copy(update={"notebooks": order}), lab / "notebooks")
    assert found == plan_sweep("x", GRID, lab / "notebooks")


@pytest.mark.parametrize(
    ("notebooks", "reader", "stage", "maker"),
    [
        (["04"], "04_score_signature", "inject", "01_inject_backdoor"),
        (["03"], "03_train_vaccines", "inject", "01_inject_backdoor"),
        (["04", "01"], "04_score_signature", "variants", "03_train_vaccines"),
        (["01", "03", "05"], "05_suppress_channels", "scores", "04_score_signature"),
        (["01", "03", "04", "06"], "06_recover_fluency", "challenge", "05_suppress_channels"),
        (["01", "08"], "08_external_evidence", "merged", "07_merge_conflict"),
        (["01", "07", "12", "15"], "15_real_model", "ablations/kinds", "02_sanity_checks"),
    ],
)
@pytest.mark.parametrize("optional", [True, "controls", False])
def test_a_notebook_that_starts_from_what_none_before_it_makes_is_refused(notebooks, reader, stage, maker, optional):
    with pytest.raises(LabError) as error:
        plan_sweep("x", Grid(notebooks=notebooks, optional=optional, grid={"SEED": [1]}))
    assert str(error.value) == (
        f"notebook {reader} starts from '{stage}', which {maker} makes: add '{maker[:2]}' to the grid's notebooks, "
        f"now {', '.join(sorted(notebooks))}"
    )


@pytest.mark.parametrize("notebooks", [*map(notebooks_of, METHODS.values()), ["01"], ["01", "02", "07", "08"]])
@pytest.mark.parametrize("optional", [True, "controls", False])
def test_the_notebooks_of_every_method_make_what_they_start_from(notebooks, optional):
    assert plan_sweep("x", Grid(notebooks=notebooks, optional=optional, grid={"SEED": [1]})).cells


def test_the_rows_of_the_arena_can_do_without_the_chain_they_are_compared_with():
    def planned(optional):
        return plan_sweep("x", Grid(notebooks=["01", "09"], optional=optional, grid={"SEED": [1]}))

    assert len(planned("arena").nodes) == 2
    with pytest.raises(LabError, match="without the challenge test that chooses TAU = 'auto'"):
        plan_sweep("x", Grid(notebooks=["01", "09"], optional="arena", grid={"SEED": [1], "TAU": ["auto"]}))
    for optional in (True, "controls", False):
        with pytest.raises(LabError, match="09_compare_defenses starts from 'challenge', which 05"):
            planned(optional)


def test_a_missing_grid_and_a_run_in_the_way_are_told(lab):
    with pytest.raises(LabError, match="does not exist; examples lie in notebooks/parameters/grids/"):
        read_grid(lab / "lost.yaml")
    (lab / "runs" / "mine").mkdir(parents=True)
    (lab / "runs" / "mine" / "summary.json").touch()
    with pytest.raises(LabError, match="is no sweep: choose another NAME"):
        sweep("mine", GRID, folder=lab / "notebooks")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine/inject", "NAME = 'mine/inject' lies in the run 'mine': choose a name outside of it"),
        ("my grid", "NAME = 'my grid' should be plain folder names"),
        ("../mine", "NAME = '../mine' should be plain folder names"),
    ],
)
def test_a_name_that_no_sweep_can_have_is_told_when_it_is_planned(lab, name, message):
    Run(lab / "runs" / "mine", {}).stage("inject", lambda folder: None, uses=[])
    with pytest.raises(LabError, match=message):
        plan_sweep(name, GRID, lab / "notebooks")


def test_a_sweep_and_its_runs_may_lie_some_folders_deep(lab, scheduler):
    one = Grid(notebooks=["01"], grid={"SEED": [1]})
    table = sweep("deep/er", one, scheduler(), folder=lab / "notebooks")
    assert (table["error"] == "").all() and log(lab) == ["inject 1"]
    with pytest.raises(LabError, match="NAME = 'deep' holds the run 'deep/er/01-"):
        run_folder("deep")


def test_the_shipped_grids_are_valid(tmp_path, monkeypatch):
    (tmp_path / "index.noun").touch()
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))  # one of them asks for a dictionary
    for path in sorted((Path(__file__).parent.parent / "notebooks" / "parameters" / "grids").glob("*.yaml")):
        assert plan_sweep(path.stem, read_grid(path)).cells


def test_a_grid_that_needs_a_dictionary_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("helpers.defenses.conflict.wordnet.PLACES", ())
    with pytest.raises(LabError, match="install wordnet-base"):
        plan_sweep("x", Grid(fixed={"evidence.book": "wordnet"}, grid={"SEED": [1]}))


def test_stages_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    stage = tmp_path / "parent" / "inject"
    stage.mkdir(parents=True)
    (stage / MANIFEST).write_text("{}")

    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    sweeps._inherit(tmp_path / "parent", tmp_path / "child")
    assert (tmp_path / "child" / "inject" / MANIFEST).read_text() == "{}"
