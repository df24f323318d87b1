"""The chain: the notebooks of a method, in order, with one set of parameters.

The notebooks are the program; this module only hands them their parameters, stops at the first that fails, and
gathers what they recorded into `summary.json`. Nothing flows between two notebooks but the run folder, so a rerun
after an interruption passes quickly over everything that is finished.

    python -m helpers.run.pipeline run --method bdvax --task refusal --seed 3 --set "signature.lam=0.1 lora.r=4"
    python -m helpers.run.pipeline plan --task refusal         # what such a run will cost
    python -m helpers.run.pipeline sweep GRID                  # all cells of a grid
    python -m helpers.run.pipeline execute          # refresh the outputs stored in the notebooks themselves
    python -m helpers.run.pipeline inspect DATA     # what lies in a folder or file of real rows
    python -m helpers.run.pipeline record NAME …    # keep the summaries of finished runs as recorded results
    python -m helpers.run.pipeline record-sweep NAME …
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pandas as pd

from helpers import plots
from helpers.core import stages
from helpers.core.device import require_device
from helpers.core.disk import read_json, working_in, write_json
from helpers.core.errors import LabError
from helpers.core.interruption import status_of
from helpers.core.paths import ROOT, SUMMARY, existing, runs_folder
from helpers.core.run_names import run_folder
from helpers.core.settings import Settings
from helpers.core.store import Run, run_of
from helpers.measure.asr import LABELS
from helpers.run.execution import NOTEBOOKS, execute, numbered
from helpers.run.grid import read_grid
from helpers.run.rates import percent, span
from helpers.run.summary import rows_of, summarise, table
from helpers.run.sweeps import record_sweep, sweep

RESULTS = ROOT / "data" / "results" / "tiny.json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def run_notebooks(settings: Settings, folder: Path = NOTEBOOKS, method: str = stages.DEFAULT) -> Run:
    """Execute the notebooks of a method into `runs/<name>/notebooks/`, printing a line for each.

    Args:
        method: one of `core.stages.METHODS`.

    Raises:
        LabError: an unknown method, or the first notebook that fails; the stages finished before it are kept.
    """
    numbers = stages.notebooks_of(stages.method(method))
    require_device(settings.profile.model)
    run = run_of(settings)  # the notebooks hold the settings against the model
    chosen = [path for path in numbered(folder) if path.name[:2] in numbers]
    for _ in _execute_each(chosen, run.folder / "notebooks", settings.model_dump()):
        pass
    return run


def refresh_outputs(folder: Path = NOTEBOOKS) -> None:
    """Execute every numbered notebook in place with its own defaults, leaving no trace of when and by whom.

    A notebook is replaced only when all of it has run.
    """
    with TemporaryDirectory() as temporary:
        for notebook, output in _execute_each(numbered(folder), Path(temporary), {}):
            nbformat.write(tidy(nbformat.read(output, as_version=4)), notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strip what differs between two equal executions: timings, widget state, papermill's notes, the kernel's name."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {
                key: value
                for key, value in cell.metadata.items()
                if key not in ("papermill", "execution") and (key, value) != ("tags", [])
            }
        )
    return notebook


def record(names: Sequence[str], results: Path = RESULTS, figure: Path = ROOT / "figures" / "overview.png") -> None:
    """Keep the summaries of finished runs as the lab's recorded results, draw the overview and print the table.

    Args:
        names: of runs below `runs/`.
        results, figure: the JSON file and the PNG to write.

    Raises:
        LabError: a run has no summary.
    """
    summaries = {name: read_json(_summary(name)) for name in names}
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, summaries)
    plots.save(plots.overview(by_setting(summaries)), figure)
    print(results_table(summaries))


def by_setting(summaries: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Recorded runs sorted by what was attacked and how.

    Returns:
        {"adapter, sentiment": {model: {measure: [one value per seed]}}}, rates in [0, 1].
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for summary in map(stages.by_present_names, summaries.values()):
        models = found.setdefault(f"{summary['access']}, {summary['task']}", {})
        for row in rows_of(summary):
            measured = models.setdefault(row, {"asr": [], "right_under_trigger": [], "utility": []})
            for measure, values in measured.items():
                values.append(summary[row][measure])
    return found


def results_table(summaries: Mapping[str, Any]) -> str:
    """The recorded runs as a Markdown table: means over the seeds in percent, the range of the ASR in brackets."""
    settings = by_setting(summaries)
    seeds = {setting: len(models["clean"]["asr"]) for setting, models in settings.items()}
    heads = [f"{setting} (seeds: {seeds[setting]}): ASR · right · utility" for setting in settings]
    lines = [f"| small model, % | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in dict.fromkeys(row for models in settings.values() for row in models):
        cells = []
        for models in settings.values():
            if row not in models:
                cells.append("")
                continue
            right, utility = (percent(mean(models[row][m])) for m in ("right_under_trigger", "utility"))
            cells.append(f"{span(models[row]['asr'])} · {right} · {utility}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(name: str) -> Path:
    path = runs_folder() / name / SUMMARY
    if not path.is_file():
        raise LabError(f"{_shown(path)} is missing: `make run NAME={name}` makes it")
    return path


def main(arguments: Sequence[str] | None = None, folder: Path = NOTEBOOKS) -> int:
    """Command line; returns the exit status: 0 done, 2 refused or failed, 130 interrupted, 143 terminated."""
    options = _parser().parse_args(arguments)
    kept = options.command in (_run, _sweep)
    return status_of(lambda: options.command(options, folder), "stages" if kept else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.run.pipeline", description="Run the notebooks.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="the notebooks of a method with one set of parameters, into runs/<name>/")
    run.set_defaults(command=_run)
    plan = commands.add_parser("plan", help="what such a run will cost, and whether it fits this machine")
    plan.set_defaults(command=_plan)
    for command in (run, plan):
        Settings.add_options(command)
    which = f"{', '.join(stages.METHODS)}; by default {stages.DEFAULT}"
    run.add_argument("--method", default=stages.DEFAULT, help=f"the defense: {which}")
    execute = commands.add_parser("execute", help="refresh the outputs stored in the notebooks")
    execute.set_defaults(command=lambda options, folder: refresh_outputs(folder))
    grid = commands.add_parser("sweep", help="all cells of a grid, into runs/<name>/, on all cores or a cluster")
    grid.add_argument("grid", type=Path, metavar="GRID", help="YAML file, such as notebooks/parameters/grids/tau.yaml")
    grid.add_argument("--name", default="", help="folder below runs/; the name of the file when empty")
    grid.add_argument("--scheduler", default="", help="tcp://… of a running Dask scheduler; workers here when empty")
    grid.set_defaults(command=_sweep)
    look = commands.add_parser("inspect", help="what lies in a folder or file of real rows, and what is wrong with it")
    look.add_argument("data", metavar="DATA", help=Settings.model_fields["DATA"].description)
    look.set_defaults(command=_inspect)
    keep = commands.add_parser("record", help="keep the summaries of runs in data/results/ and draw the overview")
    keep.add_argument("names", nargs="+", help="folders below runs/")
    keep.set_defaults(command=lambda options, folder: record(options.names))
    sweeps = commands.add_parser("record-sweep", help="keep the tables of finished sweeps in data/results/")
    sweeps.add_argument("names", nargs="+", help="folders below runs/")
    sweeps.set_defaults(command=_record_sweeps)
    return parser


def _record_sweeps(options: argparse.Namespace, folder: Path) -> None:
    for name in options.names:
        print(_shown(record_sweep(name)))


def _inspect(options: argparse.Namespace, folder: Path) -> None:
    from helpers.run.inspection import inspect

    for line in inspect(existing(options.data)):
        print(line)


def _plan(options: argparse.Namespace, folder: Path) -> None:
    from helpers.run.planning import plan_lines  # loads what computes: the notebooks' kernels do so themselves

    settings = Settings.from_options(options)
    run_folder(settings.name)  # refuses one that a run could not have
    for line in plan_lines(settings):
        print(line)


def _run(options: argparse.Namespace, folder: Path) -> None:
    settings, method = Settings.from_options(options), stages.known_method(options.method)
    settings = _with_rows_of(method, settings)
    require_device(settings.profile.model)
    with working_in(run_folder(settings.name)):
        (run_folder(settings.name) / SUMMARY).unlink(missing_ok=True)  # is there only where all of the run is
        run = run_notebooks(settings, folder, method)
        summary = summarise(run, method)
        write_json(run.folder / SUMMARY, summary)
    seconds, peak = sum(summary["seconds"].values()), max(summary["peak_rss_mb"].values())
    print(f"\n{table(summary)}\n\nstages: {seconds:.0f} s, at most {peak:.0f} MB")
    for label, path in (("summary", SUMMARY), ("figures", "figures"), ("notebooks", "notebooks")):
        print(f"{label}: {_shown(run.folder / path)}")


def _with_rows_of(method: str, settings: Settings) -> Settings:
    """The settings with the rows of the arena that belong to a method; numbers that no defense takes are refused."""
    if rows := stages.METHODS[method].defense:
        settings = settings.model_copy(update={"DEFENSE": ",".join(filter(None, [rows, settings.DEFENSE]))})
    if settings.DEFENSE:
        from helpers.run.arena.rows import require_numbers  # loads what computes

        require_numbers(settings.rows)
    return settings


def _sweep(options: argparse.Namespace, folder: Path) -> None:
    name = options.name or options.grid.stem
    table = sweep(name, read_grid(options.grid.expanduser()), options.scheduler, folder)
    failed = table[table["error"] != ""]
    # where every cell failed, there are no measures
    shown = table[table["error"] == ""].drop(columns=["manifest", "error", *LABELS], errors="ignore")
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_rows", 100):
        print(shown.to_string(index=False))
    print(f"\nresults: {_shown(runs_folder() / name / 'results.csv')} (and .parquet)")
    if len(failed):
        lines = "\n".join(sorted(set(failed["error"])))
        raise LabError(f"{len(failed)} of the cells failed; the same command tries them again:\n{lines}")


def _execute_each(
    notebooks: Sequence[Path], outputs: Path, parameters: Mapping[str, Any]
) -> Iterator[tuple[Path, Path]]:
    """Run notebooks in order, a printed line for each; yields (notebook, executed copy)."""
    outputs.mkdir(exist_ok=True)
    for notebook in notebooks:
        print(f"{notebook.stem:<28}", end="", flush=True)
        start = time.perf_counter()
        try:
            execute(notebook, outputs / notebook.name, parameters)
        except LabError:
            print(" failed")
            raise
        print(f"{time.perf_counter() - start:7.1f} s", flush=True)
        yield notebook, outputs / notebook.name


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
