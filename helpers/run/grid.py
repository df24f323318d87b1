"""Grids of runs, planned as one graph of notebooks.

A cell of the grid is one set of parameters, a chain of notebooks. Two cells that agree in all that the first k
notebooks read share those k nodes of the graph, so an injection is trained once for ten values of τ. Which settings a
notebook reads follows from the registry of stages (`core.stages`).
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from helpers.core.checking import Strict, checked
from helpers.core.disk import read_json
from helpers.core.errors import LabError, nearest
from helpers.core.modules import version_of
from helpers.core.paths import ROOT, fingerprint, runs_folder
from helpers.core.run_names import require_outside_runs
from helpers.core.settings import AUTO, Settings, require_name
from helpers.core.slices import modules_named_in
from helpers.core.stages import defended_by, entry, read_by
from helpers.core.yaml_files import read_yaml
from helpers.run.execution import ARENA, NOTEBOOKS, OptionalCells, numbered, read_notebook

NEEDED = re.compile(r"""\brun\.need\(["']([\w/]+)["']\)""")  # a stage that a cell starts from
# what a setting takes in turn: without a value there is no cell
Values = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]


class Grid(Strict):
    """What a sweep's YAML file holds.

    Keys of `fixed` and `grid` are parameters of the notebooks (SEED, TASK …) or dotted numbers of the profile
    (adapter.suppress.tau); each list of `grid` multiplies the cells, and `also` holds further grids for the same table.
    `optional: false` leaves out the notebooks' cells that are tagged so: controls, studies and checks by hand, the
    larger part of their time. `optional: controls` keeps those of the controls. `optional: arena` keeps none, and of
    notebook 09 just the rows of the arena on what notebook 01 planted, without the chain that it compares them with.
    """

    notebooks: list[str] = Field(["01", "03", "04", "05", "06"], min_length=1)
    optional: OptionalCells = True
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
    optional: OptionalCells = True


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
        return [node for node in self.nodes.values() if not is_finished(self.root, node)]


def read_grid(path: Path) -> Grid:
    """Read a sweep's YAML file.

    Raises:
        LabError: no such file, an unknown key or a value of the wrong type, or as `read_yaml`.
    """
    if not path.is_file():
        raise LabError(f"GRID = '{path}' does not exist; examples lie in notebooks/parameters/grids/")
    return checked(Grid, read_yaml(path, "`grid:` with one list for each setting"), f"{path.name}: ")


def plan_sweep(name: str, grid: Grid, folder: Path = NOTEBOOKS) -> Plan:
    """The graph of a grid; nothing runs, of a model its config is read. Ten thousand cells take seconds.

    Raises:
        LabError: a notebook or a setting that does not exist (it names the cell), a notebook whose inputs none before
            it makes, TAU=auto without the notebook that chooses it, or a name that is no folder below `runs/` or lies
            in a run.
    """
    require_name(name)
    require_outside_runs(name)
    plan = Plan(name, runs_folder() / name)
    notebooks = _chosen(folder, grid.notebooks)
    _require_makers(notebooks, grid.optional)
    versions, files, limits = {path: _version(path, grid.optional) for path in notebooks}, {}, {}
    for cell in grid.cells():
        settings = _settings(grid.fixed | cell, limits)
        if grid.optional == ARENA and settings.TAU == AUTO:
            raise LabError(f"`optional: arena` is without the challenge test that chooses TAU = 'auto': {cell}")
        values = settings.values()
        sources = [values["profile"]["model"]["path"], values["data"]["path"], values["rows"]["path"]]
        for path in sources:
            if path not in files:
                files[path] = fingerprint(ROOT / path) if path else ""
        read = [files[path] for path in sources]
        parent, prefix = None, ""
        for path in notebooks:
            prefix = _digest([prefix, path.stem, _read_by(path, values)])
            key = f"{path.stem[:2]}-{prefix[:16]}"
            if key not in plan.nodes:
                called = [version_of(modules)] if (modules := defended_by(path.name[:2], values)) else []
                plan.nodes[key] = Node(
                    key,
                    str(path),
                    settings.model_dump() | {"NAME": f"{name}/{key}"},
                    parent,
                    _digest([versions[path], read, plan.nodes[parent].version if parent else "", *called]),
                    settings.profile.model.runs_on == "cuda",
                    grid.optional,
                )
            parent = key
        plan.cells.append(Cell(cell, parent))
    return plan


def _chosen(folder: Path, wanted: list[str]) -> list[Path]:
    """The notebooks of these numbers, in the order of the folder."""
    notebooks = {path.name[:2]: path for path in numbered(folder)}
    for number in wanted:
        if number not in notebooks:
            raise LabError(f"no notebook '{number}'{nearest(number, notebooks)}")
    return [path for number, path in notebooks.items() if number in wanted]


def _require_makers(notebooks: Sequence[Path], optional: OptionalCells) -> None:
    """Refuse a chain in which a notebook starts from a stage that none before it makes.

    Only stages that a notebook names where it asks for them are seen: `run.need("inject")`.
    """
    for i, path in enumerate(notebooks):
        there = {earlier.name[:2] for earlier in notebooks[:i]}
        for stage in NEEDED.findall("\n".join(_code_cells(path, optional))):
            known = entry(stage)
            if known and known.notebook[:2] not in there:
                raise LabError(
                    f"notebook {path.stem} starts from '{stage}', which {known.notebook} makes: add "
                    f"'{known.notebook[:2]}' to the grid's notebooks, now "
                    f"{', '.join(chosen.name[:2] for chosen in notebooks)}"
                )


def _settings(values: Mapping[str, Any], limits: dict[str, Any]) -> Settings:
    """Upper-case keys are parameters of the notebooks, dotted ones overrides of the profile.

    All that a model cannot follow is refused here: cells may share a notebook, and with it the settings of the first.

    Args:
        values: of a cell.
        limits: of the models that were met, by path; those of a new one are added.
    """
    from helpers.run.costs import known_config  # these load what computes, which a sweep alone may wait for
    from helpers.run.limits import Limits

    if "NAME" in values:
        raise LabError("NAME is the sweep's own, one folder for all cells: leave it out of the grid, and say NAME=…")
    if "OVERRIDES" in values:
        raise LabError("a grid has dotted keys and no OVERRIDES: lora.r: 4 in `fixed`, or lora.r: [4, 8] in `grid`")
    overrides = {key: value for key, value in values.items() if "." in key}
    try:
        settings = Settings.checked({k: v for k, v in values.items() if "." not in k} | {"OVERRIDES": overrides})
        model = settings.profile.model
        if model.path not in limits:
            limits[model.path] = Limits(known_config(model))
        limits[model.path].check(settings)
        return settings
    except LabError as error:
        raise LabError(f"{error} (in the cell {dict(values)})") from None


def settings_of(plan: Plan, cell: Cell) -> Settings:
    """The settings of a cell's last notebook, without the name of its run."""
    return Settings.checked(plan.nodes[cell.leaf].parameters | {"NAME": ""})


def _read_by(notebook: Path, values: Mapping[str, Any]) -> Any:
    """The part of the settings that a notebook reads: all of them where the registry does not know it."""
    if (paths := read_by(notebook.name[:2], values)) is None:
        return values
    found = {}
    for path in paths:
        value: Any = values
        for key in path.split("."):
            value = value[key]
        found[path] = value
    return found


def _version(notebook: Path, optional: OptionalCells) -> str:
    """Digest of the code that a notebook runs: its own cells and what they import of `helpers/`."""
    cells = _code_cells(notebook, optional)
    return _digest([version_of(modules_named_in(cells)), cells])


def _code_cells(notebook: Path, optional: OptionalCells) -> list[str]:
    return [cell.source for cell in read_notebook(notebook, optional).cells if cell.cell_type == "code"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


DONE = "node.json"
PLAN = "sweep.json"
TABLE = "results.csv"


def is_finished(root: Path, node: Node) -> bool:
    """Whether a node was run to its end, by this code and with these files."""
    try:
        return read_json(root / node.key / DONE)["version"] == node.version
    except (OSError, ValueError, KeyError):
        return False
