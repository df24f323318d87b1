"""Sweeps: a grid of runs as one graph of notebooks, computed by Dask.

A cell of the grid is one set of parameters, a chain of notebooks. Two cells that agree in all that the first k
notebooks read share those k nodes of the graph, so an injection is trained once for ten values of τ. Every node is a
run folder `runs/<sweep>/<node>/` that begins as hard links to the stages of the node before it; the last folder of a
chain is a complete run. Which settings a notebook reads stands in `READS`; the digests of the stages guard it: a key
that is missing there makes a later notebook compute a stage again, never load a wrong one.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import psutil
from pydantic import Field
from tqdm.auto import tqdm

from helpers.core.checking import Strict, checked
from helpers.core.code_version import code_version
from helpers.core.disk import read_json, working_in, write_json
from helpers.core.errors import LabError, nearest
from helpers.core.interruption import IGNORES, deaf_to_ctrl_c, held_back
from helpers.core.locks import hold
from helpers.core.paths import MANIFEST, ROOT, fingerprint, runs_folder
from helpers.core.run_names import require_outside_runs
from helpers.core.settings import Settings, require_name
from helpers.core.store import Run, Stage, made_by
from helpers.core.yaml_files import read_yaml
from helpers.defenses.conflict.merge import require_method
from helpers.run.execution import NOTEBOOKS, execute, numbered, read_notebook

DONE, PLAN, TABLE = "node.json", "sweep.json", "results.csv"
RECORDED = ROOT / "data" / "results"  # sweeps that come with the lab, one JSON file each
RUN_MEMORY = 2_000_000_000  # bytes that one run of the small model may take, with some to spare
ATTEMPTS = 3  # a node is given up after so many workers died of it
SCHEDULER_SECONDS = 20  # how long a running scheduler may take to answer

# what a notebook reads beyond what the notebooks before it read; others are taken to read everything
READS = {
    "01": ["attack", "task", "access", "seed", "data", "profile.evaluation", "profile.{access}.inject"]
    + ["profile.{access}.poison_rate", "profile.editing", "profile.layerwise", "profile.adaptive"]
    + ["profile.model", "profile.lora", "profile.lengths"],
    "02": [],
    "03": ["profile.signature.family", "profile.signature.n", "profile.{access}.recover.rows"]
    + ["profile.{access}.vaccine", "profile.{access}.vaccine_weights"],
    "04": ["profile.signature"],
    "05": ["profile.{access}.suppress", "challenge"],
    "06": ["profile.{access}.recover"],
    "07": ["profile.conflict"],
    "08": [],
    "09": [],
    "10": ["profile.conflict.budget"],
    "11": [],
    "12": [],
}
NEEDED = re.compile(r"""\brun\.need\(["']([\w/]+)["']\)""")  # a stage that a cell starts from
MEASURES = ("asr", "n", "right_under_trigger", "false_trigger", "utility", "perplexity")


# what a setting takes in turn: without a value there is no cell
Values = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]


class Grid(Strict):
    """What a sweep's YAML file holds.

    Keys of `fixed` and `grid` are parameters of the notebooks (SEED, TASK …) or dotted numbers of the profile
    (adapter.suppress.tau); each list of `grid` multiplies the cells, and `also` holds further grids for the same table.
    `optional: false` leaves out the notebooks' cells that are tagged so: controls, studies and checks by hand, the
    larger part of their time.
    """

    notebooks: list[str] = Field(["01", "03", "04", "05", "06"], min_length=1)
    optional: bool = True
    fixed: dict[str, Any] = {}
    grid: Values
    also: list[Values] = []

    def cells(self) -> Iterator[dict[str, Any]]:
        """Every combination of each grid."""
        for grid in (self.grid, *self.also):
            for values in itertools.product(*grid.values()):
                yield dict(zip(grid, values, strict=True))


@dataclass(frozen=True)
class Node:
    """One notebook run with one set of parameters; `parent` is the node it continues."""

    key: str
    notebook: str
    parameters: dict[str, Any]
    parent: str | None
    version: str
    gpu: bool
    optional: bool = True


@dataclass(frozen=True)
class Cell:
    """One point of the grid and the node that completes it."""

    values: dict[str, Any]
    leaf: str


@dataclass
class Plan:
    """The graph of a sweep: `nodes` in an order in which each comes after its parent."""

    name: str
    root: Path
    cells: list[Cell] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)

    def missing(self) -> list[Node]:
        """The nodes that are not finished, or were made by other code or from other files."""
        return [node for node in self.nodes.values() if not _finished(self.root, node)]


@dataclass(frozen=True)
class Outcome:
    """How a node ended: `error` is "" or one line that names the notebook, the cell and the cause."""

    key: str
    error: str = ""


def read_grid(path: Path) -> Grid:
    """Read a sweep's YAML file.

    Raises: LabError naming an unknown key or a value of the wrong type, or as `read_yaml`.
    """
    if not path.is_file():
        raise LabError(f"GRID = '{path}' does not exist; examples lie in notebooks/parameters/grids/")
    return checked(Grid, read_yaml(path, "`grid:` with one list for each setting"), f"{path.name}: ")


def plan_sweep(name: str, grid: Grid, folder: Path = NOTEBOOKS) -> Plan:
    """The graph of a grid; nothing runs, no model is read. Ten thousand cells take seconds.

    Raises: LabError for a notebook or a setting that does not exist, naming the cell; for a notebook whose inputs none
        before it makes; and for a name that is no folder below `runs/` or lies in a run.
    """
    require_name(name)
    require_outside_runs(name)
    plan = Plan(name, runs_folder() / name)
    notebooks = _chosen(folder, grid.notebooks)
    _require_makers(notebooks, grid.optional)
    versions, files = {path: _version(path, grid.optional) for path in notebooks}, {}
    for cell in grid.cells():
        settings = _settings(grid.fixed | cell)
        values = settings.values()
        for path in (values["profile"]["model"]["path"], values["data"]["path"]):
            if path not in files:
                files[path] = fingerprint(ROOT / path) if path else ""
        read = [files[values["profile"]["model"]["path"]], files[values["data"]["path"]]]
        parent, prefix = None, ""
        for path in notebooks:
            prefix = _digest([prefix, path.stem, _read_by(path, values)])
            key = f"{path.stem[:2]}-{prefix[:16]}"
            if key not in plan.nodes:
                plan.nodes[key] = Node(
                    key,
                    str(path),
                    settings.model_dump() | {"NAME": f"{name}/{key}"},
                    parent,
                    _digest([versions[path], read, plan.nodes[parent].version if parent else ""]),
                    settings.profile.model.runs_on == "cuda",
                    grid.optional,
                )
            parent = key
        plan.cells.append(Cell(cell, parent))
    return plan


def sweep(name: str, grid: Grid, scheduler: str = "", folder: Path = NOTEBOOKS) -> pd.DataFrame:
    """Run what is missing of a grid and gather the results; a failed cell does not stop the others.

    Args: name of the folder below `runs/`; scheduler, address of a running Dask scheduler whose workers share this
        folder and `runs/` ("" starts workers on this machine); folder of the notebooks.
    Returns: the table of `results`, also written to `runs/<name>/results.parquet` and `.csv`.
    Raises: LabError when `runs/<name>` is no sweep or another process works in it, or a GPU is asked for and no worker
        has one.
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

    Returns: (table without the cells that failed, where it was found).
    Raises: LabError where there is neither.
    """
    if (runs_folder() / name / TABLE).is_file():
        table = _stored_table(name)
        return table[table["error"] == ""], f"runs/{name}/{TABLE}"
    recorded = RECORDED / f"{name}.json"
    if recorded.is_file():
        return pd.DataFrame(read_json(recorded)["rows"]), recorded.relative_to(ROOT).as_posix()
    raise LabError(
        f"nothing of a sweep '{name}' is stored: run `make sweep GRID=notebooks/parameters/grids/{name}.yaml`"
    )


def record_sweep(name: str) -> Path:
    """Keep the table of a finished sweep among those that come with the lab, beside its grid and package versions.

    Raises: LabError when the sweep is not there or one of its cells failed.
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
    return pd.read_csv(runs_folder() / name / TABLE, dtype={"error": str}).fillna({"error": ""})


def results(plan: Plan, errors: Mapping[str, str]) -> pd.DataFrame:
    """One row for each model that a cell measured, one for a cell that failed; rates in [0, 1].

    A model is named as its stage, "evaluate/" left out: "purified", "merges/ties", "argued/book-merged-evidence".

    Columns: the keys of the grid, `model`, the measures with the interval of the ASR, the ASR of near misses (`near_…`,
    for the backdoored model), the share `tau` that was cut and the one that an oracle would have chosen (where the run
    has come so far, and where the challenge test chose), `seconds` of the whole chain, `manifest` (the file below
    `runs/<name>/` that tells how the row was made), `error`.
    """
    rows, parameters = [], dict.fromkeys(key for cell in plan.cells for key in cell.values if key.isupper())
    for cell in plan.cells:
        values = {key: plan.nodes[cell.leaf].parameters[key] for key in parameters} | cell.values
        if error := errors.get(cell.leaf, ""):
            rows.append({**values, "model": "", "error": error})
            continue
        stages = list(Run(plan.root / cell.leaf, _settings_of(plan, cell).config()).stages())
        shared, near = _of_the_run(stages), _near_misses(stages)
        for stage in stages:
            if stage.result.keys() >= {"asr_interval", *MEASURES}:
                own = _of_a_model(stage) | (near if stage.name == "evaluate/backdoored" else {})
                manifest = (stage.path / MANIFEST).relative_to(plan.root).as_posix()
                rows.append({**values, **own, **shared, "manifest": manifest, "error": ""})
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["model", "error"])
    return table.astype({"TAU": str}) if "TAU" in table else table  # "auto" beside numbers: a column has one type


def _of_a_model(stage: Stage) -> dict[str, Any]:
    """What a report says of its model."""
    low, high = stage.result["asr_interval"]
    return {
        "model": stage.name.removeprefix("evaluate/"),
        **{measure: stage.result[measure] for measure in MEASURES},
        **{"asr_low": low, "asr_high": high, **stage.result["labels"]},
    }


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
        return Outcome(node.key) if _finished(root, node) else _execute_node(node, root)


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
    with _client(scheduler, any(node.gpu for node in missing)) as client:
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


@contextmanager
def _client(scheduler: str, gpu: bool) -> Iterator[Any]:
    """A Dask client: of a running scheduler, or of workers started here and stopped again."""
    import dask
    from distributed import Client

    if scheduler:
        try:
            client = Client(scheduler, timeout=SCHEDULER_SECONDS)
        except OSError as error:
            raise LabError(f"no Dask scheduler answers at SCHEDULER={scheduler}: `dask scheduler` starts it") from error
        with client:
            workers = client.scheduler_info(-1)["workers"].values()
            if gpu and not any("GPU" in worker["resources"] for worker in workers):
                raise LabError("the profile asks for a GPU and no worker has one: dask worker … --resources GPU=1")
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},  # one progress bar is enough
    }
    with dask.config.set(settings), TemporaryDirectory() as scratch, ExitStack() as stack:
        with held_back():  # a cluster that is stopped half-way leaves semaphores and tasks behind
            cluster = stack.enter_context(_local_cluster(gpu, scratch))
            client = stack.enter_context(Client(cluster))
        yield client


def _local_cluster(gpu: bool, scratch: str) -> Any:
    """Workers on this machine.

    Raises: LabError when one of them dies before it has begun; from then on Dask replaces it.
    """
    from distributed import SpecCluster

    workers, scheduler = _local_workers(gpu, scratch), _local_scheduler()
    try:  # closed by whoever asked for it; at the exit Dask would stumble over one that was interrupted half-way
        with deaf_to_ctrl_c():
            return SpecCluster(workers, scheduler, silence_logs="CRITICAL", shutdown_on_close=False)
    except RuntimeError as error:
        raise LabError("a worker of the sweep died while it started: the same command tries again") from error


def _local_scheduler() -> dict[str, Any]:
    from distributed import Scheduler

    return {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }


def _local_workers(gpu: bool, scratch: str) -> dict[int, dict[str, Any]]:
    """One worker for each GPU, or as many single-threaded ones as cores and memory allow."""
    from distributed import Nanny

    if gpu:
        import torch

        environments = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(torch.cuda.device_count())]
    else:
        cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
        count = max(1, min(cores, psutil.virtual_memory().available // RUN_MEMORY))
        environments = [{"OMP_NUM_THREADS": str(cores // count), "TQDM_DISABLE": "1"}] * count
    options = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": None, "local_directory": scratch}
    options["preload"] = IGNORES  # Ctrl-C is for the sweep to tell
    return {
        i: {"cls": Nanny, "options": {**options, "env": env, "resources": {"GPU": 1} if gpu else None}}
        for i, env in enumerate(environments)
    }


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


def _finished(root: Path, node: Node) -> bool:
    try:
        return read_json(root / node.key / DONE)["version"] == node.version
    except (OSError, ValueError, KeyError):
        return False


def _chosen(folder: Path, wanted: list[str]) -> list[Path]:
    """The notebooks of these numbers, in the order of the folder."""
    notebooks = {path.name[:2]: path for path in numbered(folder)}
    for number in wanted:
        if number not in notebooks:
            raise LabError(f"no notebook '{number}'{nearest(number, notebooks)}")
    return [path for number, path in notebooks.items() if number in wanted]


def _require_makers(notebooks: Sequence[Path], optional: bool) -> None:
    """Refuse a chain in which a notebook starts from a stage that none before it makes.

    Only stages that a notebook names where it asks for them are seen: `run.need("inject")`.
    """
    for i, path in enumerate(notebooks):
        there = {earlier.name[:2] for earlier in notebooks[:i]}
        for stage in NEEDED.findall("\n".join(_code_cells(path, optional))):
            maker = made_by(stage)
            if maker and maker[:2] not in there:
                raise LabError(
                    f"notebook {path.stem} starts from '{stage}', which {maker} makes: add '{maker[:2]}' to the grid's "
                    f"notebooks, now {', '.join(chosen.name[:2] for chosen in notebooks)}"
                )


def _settings(values: Mapping[str, Any]) -> Settings:
    """Upper-case keys are parameters of the notebooks, dotted ones overrides of the profile."""
    if "NAME" in values:
        raise LabError("NAME is the sweep's own, one folder for all cells: leave it out of the grid, and say NAME=…")
    overrides = {key: value for key, value in values.items() if "." in key}
    try:
        settings = Settings.checked({k: v for k, v in values.items() if "." not in k} | {"OVERRIDES": overrides})
        require_method(settings.profile.conflict.method)  # cells may share all notebooks before 07
        return settings
    except LabError as error:
        raise LabError(f"{error} (in the cell {dict(values)})") from None


def _settings_of(plan: Plan, cell: Cell) -> Settings:
    return Settings.checked(plan.nodes[cell.leaf].parameters | {"NAME": ""})


def _read_by(notebook: Path, values: Mapping[str, Any]) -> Any:
    """The part of the settings that a notebook reads, by `READS`."""
    if (paths := READS.get(notebook.name[:2])) is None:
        return values
    found = {}
    for path in paths:
        value: Any = values
        for key in path.format(access=values["access"]).split("."):
            value = value[key]
        found[path] = value
    return found


def _version(notebook: Path, optional: bool) -> str:
    """Digest of the code that a notebook runs: its own cells and `helpers/`."""
    return _digest([code_version(), _code_cells(notebook, optional)])


def _code_cells(notebook: Path, optional: bool) -> list[str]:
    return [cell.source for cell in read_notebook(notebook, optional).cells if cell.cell_type == "code"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
