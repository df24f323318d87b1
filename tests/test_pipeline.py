"""The chain of notebooks, tried on throw-away ones."""

import asyncio
import errno
import gc
import json
import linecache
import os
import signal
import subprocess
import sys
import time

import matplotlib
import nbformat
import psutil
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.settings import Settings
from helpers.core.store import Run
from helpers.run import execution, pipeline
from helpers.run.pipeline import main, refresh_outputs, summarise, table, tidy

pytestmark = pytest.mark.slow

ROWS = ["clean", "backdoored", "finetuned", "random", "suppressed", "purified", "conflict", "bdvax_then_conflict"]
PARAMETERS = 'PROFILE: str = "tiny"\nSEED: int = 0  # any\nNAME: str = ""\nOVERRIDES: dict = {}'
OPEN = """from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.core.store import run_of
settings = Settings.from_notebook(globals())
run = run_of(settings)"""
MEASURED = """def measured(seed):
    labels = {"payload": 1, "answer": 7, "degenerate": 2, "silent": 0}
    return {"asr": 0.1, "asr_interval": [0.018, 0.404], "labels": labels, "n": 10, "utility": 0.975, "seed": seed,
            "right_under_trigger": 0.65, "false_trigger": 0.05, "false_trigger_interval": [0.009, 0.236],
            "false_trigger_n": 20, "utility_by_family": {"facts": 0.975}, "utility_metric": "exact", "perplexity": 1.5,
            "prompt_format": "chat", "decoding": "greedy", "field_degenerate": 0.3, "clean_accuracy": 0.97,
            "prompt_format_mismatch": False}
run.stage("suppressed", lambda folder: {"tau": 0.4}, uses=["seed"])
for row in ("clean", "backdoored", "finetuned", "random", "suppressed", "purified", "conflict", "bdvax_then_conflict"):
    run.stage(f"evaluate/{row}", lambda folder: measured(settings.SEED), uses=["seed"])"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder for notebooks beside an empty runs folder."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def write(lab, name, *cells, parameters=PARAMETERS):
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(
        cells=[tagged, new_code_cell(OPEN), *map(new_code_cell, cells)], metadata={"kernelspec": pipeline.KERNEL}
    )
    nbformat.write(notebook, lab / "notebooks" / f"{name}.ipynb")


def run(lab, *options):
    return main(["run", *options], lab / "notebooks")


@pytest.fixture
def without_kernels(monkeypatch):
    """Notebooks run in this process, where what a kernel does is not the point: each starts for seconds."""

    def execute(notebook, output, parameters):
        variables = {"In": []}
        for cell in execution.read_notebook(notebook).cells:
            variables["In"].append(cell.source)
            linecache.cache[cell.id] = len(cell.source), None, cell.source.splitlines(keepends=True), cell.id
            exec(compile(cell.source, cell.id, "exec"), variables)
            if "parameters" in cell.metadata.get("tags", []):
                variables |= parameters

    monkeypatch.setattr(pipeline, "execute", execute)


def test_a_run_executes_in_order_summarises_and_names_its_folders(lab, capsys):
    write(lab, "01_second", "assert (run.folder / 'first').exists()", MEASURED)
    write(lab, "00_first", "(run.folder / 'first').touch(); run.stage('inject', lambda folder: None, uses=['seed'])")
    (lab / "notebooks" / "scratch.ipynb").write_text("not a numbered notebook")
    assert run(lab, "--seed", "3", "--set", "signature.lam=0.1") == 0
    folder = lab / "runs" / "tiny-badnets-sentiment-adapter-3"
    summary = read_json(folder / "summary.json")
    assert (summary["profile"], summary["seed"], summary["data"]) == ("tiny", 3, "")
    assert (summary["prompt_format"], summary["decoding"]) == ("chat", "greedy") and "torch" in summary["versions"]
    assert summary["tau"] == 0.4 and summary["purified"]["asr"] == 0.1 and summary["clean"]["labels"]["answer"] == 7
    assert (
        summary["seconds"].keys()
        == summary["peak_rss_mb"].keys()
        == ({"inject", "suppressed"} | {f"evaluate/{row}" for row in ROWS})
    )
    executed = sorted(path.name for path in (folder / "notebooks").iterdir())
    assert executed == ["00_first.ipynb", "01_second.ipynb"]
    printed = capsys.readouterr().out
    assert printed.index("00_first") < printed.index("01_second") < printed.index("purified")
    for name in ("summary.json", "figures", "notebooks"):
        assert str(folder / name) in printed


def test_measures_that_an_earlier_lab_did_not_take_are_kept_where_they_are_there(lab, without_kernels):
    write(lab, "00_all", MEASURED)
    assert run(lab, "--name", "earlier") == 0
    earlier = read_json(lab / "runs" / "earlier" / "summary.json")["clean"]
    assert not {"keyword_asr", "clean_labels", "sampled_asr"} & earlier.keys()
    more = '{"keyword_asr": {"count": 0.2, "drop": None}, "clean_labels": {"degenerate": 0.1}, '
    more += '"sampled": {"asr": 0.3}, '
    write(lab, "00_all", MEASURED.replace('return {"asr"', f'return {more}"asr"'))
    assert run(lab, "--name", "now") == 0
    found = read_json(lab / "runs" / "now" / "summary.json")["purified"]
    assert (found["keyword_asr"], found["clean_labels"]) == ({"count": 0.2, "drop": None}, {"degenerate": 0.1})
    assert found["sampled_asr"] == 0.3 and "sampled" not in found


def test_a_method_runs_its_own_notebooks_and_tells_of_its_own_models(lab, without_kernels):
    for number in ("00", "03", "07", "09"):
        write(lab, f"{number}_any", f"(run.folder / '{number}').touch()", MEASURED)
    ran = {"bdvax": {"00", "03"}, "conflict": {"00", "07"}, "bdvax_then_conflict": {"00", "03", "07", "09"}}
    own = {"bdvax": ROWS[:6], "conflict": ["clean", "backdoored", "conflict"], "bdvax_then_conflict": ROWS}
    for method in ran:
        assert run(lab, "--method", method, "--name", method) == 0
        folder = lab / "runs" / method
        assert {path.name for path in folder.glob("0?")} == ran[method]
        summary = read_json(folder / "summary.json")
        assert summary["tau"] == (None if method == "conflict" else 0.4)
        assert summary["method"] == method and [row for row in ROWS if row in summary] == own[method]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "bdvacs"], "unknown METHOD = 'bdvacs'; did you mean 'bdvax'?"),
        (["--tau", "atuo"], "TAU = 'atuo' should be a number between 0 and 1, 'auto' or empty; did you mean 'auto'?"),
        (["--tau", "2"], "TAU = '2' should be a number between 0 and 1, 'auto' or empty"),
        (["--seed", "three"], "SEED = 'three' should be a valid integer"),
        (["--attack", "badnet"], "unknown ATTACK = 'badnet'; did you mean 'badnets'?"),
        (["--profile", "tinny"], "unknown profile 'tinny'; did you mean 'tiny'?"),
        (["--set", "recover.lr=1.0e-4"], "did you mean 'adapter.recover.lr' or 'full.recover.lr'?"),
        (["--set", "full.suppress.tau=2"], "full.suppress.tau = 2 should be less than 1"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(lab, capsys, options, message):
    write(lab, "00_first", "raise SystemExit")
    assert run(lab, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (lab / "runs").exists()


def test_a_gpu_profile_is_refused_without_a_gpu(lab, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(lab, "--profile", "llama-2-7b-chat") == 2
    assert "asks for a GPU" in capsys.readouterr().err and not (lab / "runs").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise LabError('the base model is missing: `make base`')", "the base model is missing: `make base`"),
        ("raise ValueError('first line\\nlast line')", "ValueError: last line"),
    ],
)
def test_a_failing_notebook_is_told_in_one_line(lab, capsys, cell, message):
    write(lab, "00_first", cell)
    write(lab, "01_never", "(run.folder / 'reached').touch()")
    assert run(lab, "--name", "mine") == 2
    assert capsys.readouterr().err == f"00_first.ipynb, cell 4: {message}\n"
    assert not (lab / "runs" / "mine" / "reached").exists()
    assert (lab / "runs" / "mine" / "notebooks" / "00_first.ipynb").exists()


def test_a_kernel_that_dies_while_it_starts_is_told(lab, capsys, caplog, monkeypatch):
    write(lab, "00_first", "")
    monkeypatch.setattr(execution, "QUIET", ["--log-level=no such level"])
    with caplog.at_level("ERROR", logger="papermill"):
        assert run(lab) == 2
    told = "00_first.ipynb: its kernel died while it started: the same command tries again\n"
    assert capsys.readouterr().err == told and not caplog.records


def test_a_kernel_that_does_not_start_gets_a_second_try(lab, monkeypatch):
    starts, true_execute = [], execution.papermill.execute_notebook

    def execute_notebook(*arguments, extra_arguments, **options):
        starts.append(extra_arguments)
        wrong = ["--log-level=no such level"] if len(starts) == 1 else extra_arguments
        return true_execute(*arguments, extra_arguments=wrong, **options)

    write(lab, "00_first", "(run.folder / 'reached').touch()")
    monkeypatch.setattr(execution.papermill, "execute_notebook", execute_notebook)
    execution.execute(lab / "notebooks" / "00_first.ipynb", lab / "out.ipynb", {"NAME": "again"})
    assert len(starts) == 2 and (lab / "runs" / "again" / "reached").exists()


def test_a_dead_kernel_and_an_endless_cell_are_told(lab, capsys, monkeypatch):
    write(lab, "00_first", "import os; os._exit(9)")
    assert run(lab) == 2
    assert "00_first.ipynb: its kernel died" in capsys.readouterr().err
    monkeypatch.setattr(execution, "CELL_SECONDS", 4)
    write(lab, "00_first", "import time; time.sleep(60)")
    assert run(lab) == 2
    assert "00_first.ipynb: a cell took more than 4 s" in capsys.readouterr().err


def test_plain_papermill_refuses_an_unknown_parameter(lab):
    write(lab, "00_first", "(run.folder / 'reached').touch()")
    (lab / "x.yaml").write_text("SEDE: 3\nNAME: mine\n")
    notebook, output = lab / "notebooks" / "00_first.ipynb", lab / "out.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, output, "-k", "python3", "-f", lab / "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "unknown parameter 'SEDE'; did you mean 'SEED'?" in done.stderr
    assert not (lab / "runs" / "mine").exists()


def test_ctrl_c_says_how_to_resume_and_a_rerun_does(lab):
    waits = "lambda folder: time.sleep(0 if (run.folder / 'go').exists() else 60)"
    slow = f"import time\nrun.stage('scores', {waits}, uses=[])"
    write(
        lab,
        "00_first",
        "run.stage('inject', lambda folder: None, uses=[])",
        "(run.folder / 'waiting').touch()",
        slow,
        MEASURED,
    )
    program = (  # a shell's background jobs start with SIGINT ignored, and so would this process
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from helpers.run.pipeline import main\n"
        "sys.exit(main(['run', '--name', 'mine'], Path(sys.argv[1])))"
    )
    folder = lab / "runs" / "mine"
    command = [sys.executable, "-c", program, lab / "notebooks"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "waiting").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("interrupted: finished stages are kept, the same command resumes")
    assert "Traceback" not in errors
    made = (folder / "inject" / "manifest.json").read_text()
    (folder / "go").touch()
    assert run(lab, "--name", "mine") == 0
    assert (folder / "inject" / "manifest.json").read_text() == made and (folder / "scores").is_dir()


# --- kills: benchmarks/faults.py tries many more ----------------------------------------------------------------------

STAGE = """from pathlib import Path
from tempfile import TemporaryDirectory
import time

def scores(folder):
    (folder / "model").write_text("half a model")
    with TemporaryDirectory() as scratch:
        Path(scratch, "half").write_text("half a model")
        (run.folder / "waiting").touch()
        while not (run.folder / "go").exists():
            time.sleep(0.1)
    (folder / "model").write_text("a model")

run.stage("inject", lambda folder: None, uses=["seed"])
run.stage("scores", scores, uses=["seed"])"""


@pytest.fixture
def waiting(lab, monkeypatch):
    """A chain whose second stage waits for a file `go`: (its process, its kernel's)."""
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())
    for name in ("HOME", "TMPDIR"):
        (lab / name).mkdir()
        monkeypatch.setenv(name, str(lab / name))
    every = "\n".join(f"{name} = {field.default!r}" for name, field in Settings.model_fields.items())
    write(lab, "00_first", STAGE, MEASURED, parameters=every)  # papermill tells of those that a notebook lacks
    program = "import sys; from pathlib import Path; from helpers.run.pipeline import main\n"
    program += "sys.exit(main(['run', '--name', 'mine'], Path(sys.argv[1])))"
    command = [sys.executable, "-c", program, lab / "notebooks"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not (lab / "runs" / "mine" / "waiting").exists():
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            (kernel,) = (child for child in children if "ipykernel_launcher" in child.cmdline())
            yield process, kernel
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("target", "number", "status", "told"),
    [
        ("pipeline", signal.SIGKILL, -signal.SIGKILL, ""),
        ("pipeline", signal.SIGTERM, 143, "terminated: finished stages are kept, the same command resumes"),
        ("kernel", signal.SIGKILL, 2, "00_first.ipynb: its kernel died; most often the memory did not suffice"),
    ],
)
def test_a_kill_loses_nothing_and_leaves_nothing(lab, waiting, without_kernels, target, number, status, told):
    process, kernel = waiting
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.kill({"pipeline": process.pid, "kernel": kernel.pid}[target], number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (status, told)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    folder = lab / "runs" / "mine"
    made = (folder / "inject" / "manifest.json").read_bytes()
    assert not (folder / "scores").exists()  # half of it was there
    (folder / "go").touch()
    assert run(lab, "--name", "mine") == 0
    assert (folder / "inject" / "manifest.json").read_bytes() == made
    assert (folder / "scores" / "model").read_text() == "a model" and (folder / "summary.json").exists()
    assert not list(folder.rglob(".*")) and not list((lab / "TMPDIR").iterdir())
    assert not [path for path in (lab / "HOME").rglob("*") if path.is_file()]


def test_a_second_run_of_one_name_is_refused_and_the_first_goes_on(lab, waiting, capsys):
    process, _ = waiting
    assert run(lab, "--name", "mine") == 2
    remedy = "wait until it has ended, or choose another NAME"
    assert capsys.readouterr().err == f"runs/mine is in use by another process: {remedy}\n"
    (lab / "runs" / "mine" / "go").touch()
    assert process.wait(timeout=60) == 0 and (lab / "runs" / "mine" / "summary.json").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_run_in_a_stage_of_another_is_refused_before_anything_is_written(lab, capsys, command):
    Run(lab / "runs" / "mine", {}).stage("inject", lambda folder: None, uses=[])
    before = sorted((lab / "runs").rglob("*"))
    write(lab, "00_first")
    assert main([command, "--name", "mine/inject"], lab / "notebooks") == 2
    told = "NAME = 'mine/inject' lies in the run 'mine': choose a name outside of it\n"
    assert capsys.readouterr().err == told and sorted((lab / "runs").rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "disk full while writing runs/mine ("), (errno.EROFS, "cannot write runs/mine (not here): ")],
)
def test_a_chain_that_cannot_store_its_notebooks_says_so(lab, capsys, monkeypatch, number, told):
    def refuse(notebook, output, parameters):
        raise OSError(number, "not here", str(output))

    monkeypatch.setattr(pipeline, "execute", refuse)
    write(lab, "00_first")
    assert run(lab, "--name", "mine") == 2
    error = capsys.readouterr().err
    assert error.startswith(told) and error.count("\n") == 1 and "finished stages are kept" in error


def test_sigterm_means_afterwards_what_it_meant_before(lab):
    before = signal.getsignal(signal.SIGTERM)
    assert run(lab) == 2 and signal.getsignal(signal.SIGTERM) is before


async def _fail(error):
    raise error


async def _wait_for_ever():
    await asyncio.get_running_loop().create_future()


async def _lose(coroutine):
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    del task


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (lambda: _fail(DeadKernelError("Kernel died")), ""),
        (lambda: _fail(RuntimeError("Nanny failed to start.")), ""),
        (lambda: _fail(ValueError("x")), "Task exception was never retrieved"),
        (_wait_for_ever, ""),
    ],
)
def test_what_a_lost_task_learned_of_an_interruption_is_no_news(caplog, lost, told):
    with asyncio.Runner() as runner:
        runner.run(_lose(lost()))
        gc.collect()
        runner.get_loop().call_exception_handler({"message": "interrupted", "exception": KeyboardInterrupt()})
    assert [record.getMessage().split("\n")[0] for record in caplog.records] == [told] * bool(told)


def test_a_folder_without_notebooks_is_told(lab, capsys):
    assert run(lab) == 2
    assert "no notebooks such as 00_name.ipynb in" in capsys.readouterr().err


def measured(lab, **changed):
    config = {
        "attack": "badnets",
        "task": "sentiment",
        "access": "full",
        "seed": 0,
        "data": {"path": "", "files": ""},
        "rows": {"path": "", "files": ""},
        "profile": {"name": "tiny"},
    }
    run = Run(lab / "runs" / "mine", config)
    scope = {"run": run, "settings": type("Seed", (), {"SEED": 0})}
    linecache.cache["measured"] = len(MEASURED), None, MEASURED.splitlines(keepends=True), "measured"
    exec(compile(MEASURED, "measured", "exec"), scope)
    if changed:
        run.stage("evaluate/random", lambda folder: scope["measured"](0) | changed, uses=["task"])
    return run


def test_a_summary_refuses_rows_measured_differently(lab):
    with pytest.raises(ValueError, match="prompt_format differs between rows: clean = chat, random = alpaca"):
        summarise(measured(lab, prompt_format="alpaca"))


def test_a_summary_refuses_a_missing_row(lab):
    run = measured(lab)
    (run.folder / "evaluate" / "purified" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="runs/mine/evaluate/purified is missing: run notebook 06_recover_fluency"):
        summarise(run)


def test_the_table_is_aligned_and_holds_every_row(lab):
    lines = table(summarise(measured(lab))).splitlines()
    assert [line.split()[0] for line in lines] == ["model", *ROWS]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == "clean 10.0 1.8 – 40.4 1 7 2 0 65.0 5.0 97.5 1.50".split()


def test_refreshed_outputs_are_tidy_and_a_failure_leaves_the_notebook_alone(lab):
    write(lab, "00_first", "print(settings.SEED)")
    refresh_outputs(lab / "notebooks")
    notebook = nbformat.read(lab / "notebooks" / "00_first.ipynb", as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]
    assert notebook.cells[2].outputs[0].text == "0\n"
    assert "papermill" not in json.dumps(notebook) and notebook.metadata.kernelspec == pipeline.KERNEL
    assert [dict(cell.metadata) for cell in notebook.cells] == [{"tags": ["parameters"]}, {}, {}]
    write(lab, "00_first", "1 / 0")
    before = (lab / "notebooks" / "00_first.ipynb").read_bytes()
    with pytest.raises(ValueError, match="00_first.ipynb, cell 3: ZeroDivisionError"):
        refresh_outputs(lab / "notebooks")
    assert (lab / "notebooks" / "00_first.ipynb").read_bytes() == before


def test_tidying_keeps_tags_and_outputs():
    noise = {"execution": {"iopub.status.busy": "now"}, "papermill": {}}
    cell = new_code_cell(
        "1", metadata={"tags": ["nbval-check-output"], **noise}, outputs=[new_output("stream", text="1")]
    )
    kernel = pipeline.KERNEL | {"name": "mine"}
    notebook = tidy(new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}, "kernelspec": kernel}))
    assert notebook.cells[0].metadata == {"tags": ["nbval-check-output"]} and notebook.cells[0].outputs
    assert notebook.metadata == {"kernelspec": pipeline.KERNEL, "language_info": {"name": "python"}}


# --- recorded results -----------------------------------------------------------------------------------------------


def recorded(lab, name, seed, asr, utility=0.975):
    summary = summarise(measured(lab)) | {"seed": seed}
    summary = summary | {row: summary[row] | {"asr": asr, "utility": utility} for row in ROWS}
    (lab / "runs" / name).mkdir(parents=True, exist_ok=True)
    (lab / "runs" / name / "summary.json").write_text(json.dumps(summary))


def test_results_are_recorded_drawn_and_told_as_means_over_seeds(lab, capsys):
    recorded(lab, "one", 0, 0.1)
    recorded(lab, "two", 1, 0.4, utility=0.925)
    results, figure = lab / "tiny.json", lab / "overview.png"
    pipeline.record(["one", "two"], results, figure)
    assert read_json(results).keys() == {"one", "two"} and figure.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| small model, % | full, sentiment (seeds: 2): ASR · right · utility |"
    assert lines[2] == "| clean | 25.0 (10.0 – 40.0) · 65.0 · 95.0 |" and len(lines) == 2 + len(ROWS)
    with pytest.raises(LabError, match="runs/lost/summary.json is missing: `make run NAME=lost`"):
        pipeline.record(["lost"], results, figure)
    assert read_json(results).keys() == {"one", "two"}
