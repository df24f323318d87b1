"""Sweeps: a grid of runs, computed by Dask.

Every node of the graph (`run.grid`) is a run folder `runs/<sweep>/<node>/` that begins as hard links to the stages of
the node before it; the last folder of a chain is a complete run. A table of them all is what a sweep is for.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from helpers.core.definitions import definitions
from helpers.core.disk import read_json, working_in, write_json
from helpers.core.errors import LabError
from helpers.core.locks import hold
from helpers.core.paths import MANIFEST, ROOT, runs_folder
from helpers.core.store import Run, Stage
from helpers.measure.reading import is_scored_alone
from helpers.run.cluster import ATTEMPTS, dask_client
from helpers.run.execution import NOTEBOOKS, execute
from helpers.run.grid import DONE, PLAN, TABLE, Grid, Node, Plan, is_finished, plan_sweep, settings_of
from helpers.run.model_costs import spent_on
from helpers.run.summary import sampled_asr

RECORDED = ROOT / "data" / "results"  # sweeps that come with the lab, one JSON file each
EACH = ("triggered", "right", "clean_right")  # of `each`: the letters of single prompts that paired tests read
MEASURES = ("asr", "n", "right_under_trigger", "false_trigger", "utility", "perplexity")


@dataclass(frozen=True)
class Outcome:
    """How a node ended: `error` is "" or one line that names the notebook, the cell and the cause."""

    key: str
    error: str = ""


def sweep(name: str, grid: Grid, scheduler: str = "", folder: Path = NOTEBOOKS) -> pd.DataFrame:
    """Run what is missing of a grid and gather the results; a failed cell does not stop the others.

    Args:
        name: the folder below `runs/`.
        scheduler: address of a running Dask scheduler whose workers share this folder and `runs/`; "" starts workers on
            this machine.
        folder: of the notebooks.

    Returns:
        the table of `results`, also written to `runs/<name>/results.parquet` and `.csv`.

    Raises:
        LabError: `runs/<name>` is no sweep or another process works in it, or a GPU is asked for and no worker has one.
    """
    plan = plan_sweep(name, grid, folder)
    if plan.root.exists() and any(plan.root.iterdir()) and not (plan.root / PLAN).exists():
        raise LabError(f"{plan.root} is there and is no sweep: choose another NAME")
    with working_in(plan.root):
        write_json(plan.root / PLAN, grid.model_dump())
        errors = _compute(plan, scheduler)
        table = results(plan, errors)
        for suffix, write in ((".parquet", table.to_parquet), (".csv", table.to_csv)):
            partial = plan.root / f".partial{suffix}"
            write(partial, index=False)
            partial.replace(plan.root / f"results{suffix}")
    return table


def read_results(name: str) -> tuple[pd.DataFrame, str]:
    """The table that `results` made of a sweep: the reader's own, or else the one that comes with the lab.

    Returns:
        (table without the cells that failed, where it was found).

    Raises:
        LabError: neither is there.
    """
    if (runs_folder() / name / TABLE).is_file():
        table = _stored_table(name)
        return table[table["error"] == ""], f"runs/{name}/{TABLE}"
    recorded = RECORDED / f"{name}.json"
    if recorded.is_file():
        return read_recorded(name), recorded.relative_to(ROOT).as_posix()
    raise LabError(
        f"nothing of a sweep '{name}' is stored: run `make sweep GRID=notebooks/parameters/grids/{name}.yaml`"
    )


def read_recorded(name: str) -> pd.DataFrame:
    """The table of a sweep that comes with the lab, whether or not the reader has one of the same name."""
    return pd.DataFrame(read_json(RECORDED / f"{name}.json")["rows"])


def record_sweep(name: str) -> Path:
    """Keep the table of a finished sweep among those that come with the lab, beside its grid and package versions.

    Raises:
        LabError: the sweep is not there or one of its cells failed.
    """
    folder = runs_folder() / name
    if not (folder / TABLE).is_file():
        raise LabError(f"runs/{name}/{TABLE} is missing: `make sweep GRID=… NAME={name}` makes it")
    table = _stored_table(name)
    if len(failed := table[table["error"] != ""]):
        raise LabError(f"{len(failed)} cells of the sweep '{name}' failed, the first with: {failed['error'].iloc[0]}")
    versions = read_json(folder / table["manifest"].iloc[0])["versions"]
    rows = json.loads(table.drop(columns=["manifest", "error"]).round(6).to_json(orient="records"))
    path = RECORDED / f"{name}.json"
    write_json(path, {"grid": read_json(folder / PLAN), "versions": versions, "rows": rows})
    return path


def _stored_table(name: str) -> pd.DataFrame:
    letters = {f"each_{what}": str for what in EACH}  # some are digits alone
    return pd.read_csv(runs_folder() / name / TABLE, dtype={"error": str, **letters}).fillna({"error": ""})


def results(plan: Plan, errors: Mapping[str, str]) -> pd.DataFrame:
    """One row for each model that a cell measured, one for a cell that failed; rates in [0, 1].

    A model is named as its stage, "evaluate/" left out: "purified", "merges/ties", "argued/book-merged-evidence"; where
    one stage reports of several, each has its name behind that of the stage: "mixtures/M3".

    Args:
        errors: {node: one line} of the nodes that failed.

    Returns:
        a table with the keys of the grid, `model`, the measures with the interval of the ASR, `sampled_asr` (where
        answers were drawn), `task_utility` (that of the task's own families, such as the papers' accuracy on the corpus
        of a class), what each prompt got (`each_…`, for paired tests), the ASR of near misses (`near_…`, for
        the backdoored model), the share `tau` that was suppressed and the one that an oracle would have chosen (where
        the run has come so far, and where the challenge test chose), `seconds` of the whole chain, `own_seconds` and
        `own_peak_mb` of what made the model (see `spent_on`), `manifest` (the file below `runs/<name>/` that tells how
        the row was made) and `error`.
    """
    rows, parameters = [], dict.fromkeys(key for cell in plan.cells for key in cell.values if key.isupper())
    for cell in plan.cells:
        values = {key: plan.nodes[cell.leaf].parameters[key] for key in parameters} | cell.values
        if error := errors.get(cell.leaf, ""):
            rows.append({**values, "model": "", "error": error})
            continue
        settings = settings_of(plan, cell)
        stages = list(Run(plan.root / cell.leaf, settings.config()).stages())
        shared, near = _of_the_run(stages), _near_misses(stages)
        manifests = {stage.name: stage.manifest for stage in stages}
        for stage in stages:
            manifest = (stage.path / MANIFEST).relative_to(plan.root).as_posix()
            for model, report in _reports(stage).items():
                own = _of_a_model(model, report) | _of_the_task(settings.TASK, report)
                own |= near if model == "backdoored" else {}
                own |= {f"own_{what}": value for what, value in spent_on(model, manifests).items()}
                rows.append({**values, **own, **shared, "manifest": manifest, "error": ""})
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["model", "error"])
    return table.astype({"TAU": str}) if "TAU" in table else table  # "auto" beside numbers: a column has one type


def _reports(stage: Stage) -> dict[str, Mapping[str, Any]]:
    """The reports of a stage by model: its result is one, or holds some by name."""
    name = stage.name.removeprefix("evaluate/")
    found = {name: stage.result} | {f"{name}/{part}": inner for part, inner in stage.result.items()}
    needed = {"asr_interval", *MEASURES}
    return {model: one for model, one in found.items() if isinstance(one, Mapping) and one.keys() >= needed}


def _of_a_model(model: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of its model; its utility stays empty where it was measured without the defense's decoding."""
    low, high = report["asr_interval"]
    untold = ("utility", "perplexity") if is_scored_alone(report) else ()
    return {
        "model": model,
        **{measure: report[measure] for measure in MEASURES},
        **dict.fromkeys(untold),
        **{"asr_low": low, "asr_high": high, **report["labels"]},
        **sampled_asr(report),
        **{f"each_{what}": letters for what, letters in report.get("each", {}).items() if what in EACH},
    }


def _of_the_task(task: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The utility in the task's own families, for a task that has some, such as the one of its classes."""
    families = definitions()["behaviors"].get(task, {}).get("families", ())
    right = [report["utility_by_family"][name] for name in families if name in report.get("utility_by_family", {})]
    return {"task_utility": mean(right)} if right else {}


def _near_misses(stages: Sequence[Stage]) -> dict[str, float]:
    """How often the backdoored model answers with the payload to what only resembles its key."""
    results = (stage.result for stage in stages if stage.name == "near_misses")
    return {f"near_{kind}": report["asr"] for result in results for kind, report in result.items()}


def _of_the_run(stages: Sequence[Stage]) -> dict[str, Any]:
    """What holds for all models of a run."""
    columns = {"suppressed": "tau", "oracle": "oracle_tau"}
    shares = {columns[stage.name]: stage.result["tau"] for stage in stages if stage.name in columns}
    return shares | {"seconds": sum(stage.manifest["seconds"] for stage in stages)}


def run_node(node: Node, root: Path, parent: Outcome | None = None) -> Outcome:
    """Execute one node on a worker; what its parent could not do, it does not try.

    A notebook's failure is an outcome, not an exception: it will not go away on another worker.
    """
    if parent and parent.error:
        return Outcome(node.key, parent.error)
    runs = (root / node.key).parents[node.parameters["NAME"].count("/")]
    if runs_folder() != runs:
        return Outcome(node.key, f"a worker keeps its runs in {runs_folder()}, not in {runs}: set LAB_RUNS")
    with hold(root / node.key, wait=True):  # a worker that its sweep has lost may still be at it
        return Outcome(node.key) if is_finished(root, node) else _execute_node(node, root)


def _execute_node(node: Node, root: Path) -> Outcome:
    notebook, folder = Path(node.notebook), root / node.key
    if node.parent:
        _inherit(root / node.parent, folder)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    try:
        execute(notebook, folder / "notebooks" / notebook.name, node.parameters, node.optional)
    except LabError as error:
        return Outcome(node.key, str(error))
    write_json(folder / DONE, {"version": node.version, "parameters": node.parameters})
    return Outcome(node.key)


def _compute(plan: Plan, scheduler: str) -> dict[str, str]:
    """Run the missing nodes; returns what went wrong, {node: one line}."""
    missing = plan.missing()
    if not missing:
        return {}
    from distributed import as_completed

    errors: dict[str, str] = {}
    with dask_client(scheduler, any(node.gpu for node in missing)) as client:
        futures: dict[str, Any] = {}
        for node in missing:
            futures[node.key] = client.submit(
                run_node,
                node,
                plan.root,
                futures.get(node.parent),
                key=f"{plan.name}/{node.key}",
                resources={"GPU": 1} if node.gpu else None,
                retries=ATTEMPTS - 1,  # for a worker's own trouble: a full disk, a lost file
            )
        keys = {future.key: key for key, future in futures.items()}
        progress = tqdm(total=len(missing), desc=f"sweep {plan.name}", unit="notebook")
        for future in as_completed(futures.values()):
            key = keys[future.key]
            outcome = future.result() if future.status == "finished" else Outcome(key, _cause(future, plan))
            if outcome.error:
                errors[key] = outcome.error
            progress.update()
            progress.set_postfix(failed=len(errors))
        progress.close()
    return errors


def _cause(future: Any, plan: Plan) -> str:
    """Why Dask gave a node up: its own fault or that of a node before it."""
    error = future.exception()
    key = getattr(error, "task", future.key).rpartition("/")[2]
    name = Path(plan.nodes[key].notebook).name
    if type(error).__name__ == "KilledWorker":
        return f"{name}: {ATTEMPTS} workers died of it; most often the memory did not suffice"
    return f"{name}: {type(error).__name__}: {error}"


def _inherit(parent: Path, child: Path) -> None:
    """Begin a node's folder with everything of its parent: stages as hard links, pages and figures as copies."""
    for manifest in parent.rglob(MANIFEST):
        stage = manifest.parent.relative_to(parent)
        if not any(part.startswith(".") for part in stage.parts):
            shutil.rmtree(child / stage, ignore_errors=True)
            shutil.copytree(parent / stage, child / stage, copy_function=_link)
    for name in ("notebooks", "figures"):  # these are written in place when a notebook runs again
        if (parent / name).exists():
            shutil.copytree(parent / name, child / name, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
