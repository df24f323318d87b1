"""Run folders: the only memory between two notebooks.

A run is a folder; a stage is a folder in it, made once. Beside its files lies `manifest.json`: the settings the stage
used, the digests of the stages it was made from and of the code that made it. Equal digests mean an equal result, so
it is loaded; any difference means it is made again, or refused where it is only needed. A stage is built in a hidden
folder and renamed into place when complete and on the disk: no interruption leaves half a model that looks like a whole
one.
What is written for a while lies in the run folder as well, where the next attempt removes what a killed one has left.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.core.cost import measured, versions
from helpers.core.disk import read_json, settle, sync, temporary_files_in, write_json, writing
from helpers.core.errors import LabError, nearest
from helpers.core.locks import making
from helpers.core.modules import version_of
from helpers.core.paths import MANIFEST
from helpers.core.run_names import run_folder
from helpers.core.settings import Settings
from helpers.core.slices import Code, code_of
from helpers.core.stages import entry


@dataclass(frozen=True)
class Stage:
    """One finished step of a run: its folder of files, its results, and the manifest that vouches for both."""

    name: str
    path: Path
    result: dict[str, Any]
    manifest: dict[str, Any]
    fresh: bool  # made just now, rather than loaded

    @property
    def digest(self) -> str:
        """Identity of everything this stage was made from."""
        return self.manifest["digest"]


class Run:
    """A run folder and the configuration its stages are held against.

    Args:
        folder: where the stages live; made on demand.
        config: plain nested values, as `Settings.config()` gives them.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))  # tuples become lists, as they will in the manifest
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def figures(self) -> Path:
        """Folder for this run's figures."""
        path = self.folder / "figures"
        path.mkdir(exist_ok=True)
        return path

    def stage(
        self,
        name: str,
        make: Callable[[Path], dict[str, Any] | None],
        uses: Sequence[str] | None = None,
        parents: Sequence[Stage] = (),
        note: str = "",
        code: Code | None = None,
    ) -> Stage:
        """Load a stage, or make it when it is missing or anything it depends on has changed.

        What it depends on stands in `core.stages`, and the code that makes it is found by itself (`core.slices`).

        Args:
            name: a word, or two joined by a slash ("evaluate/clean"); never the first word of another stage.
            make: writes its files into the folder it is given and returns its results (JSON-able).
            uses: of a stage that is not in the registry: dotted paths into the configuration, all the settings that
                can change the outcome beyond those of its parents.
            parents: the stages it reads beside those that the registry names.
            note: one line for the manifest.
            code: what makes the stage, where it is not `make` but the cell of a notebook.

        Raises:
            LabError: the disk is full, the folder cannot be written, another process keeps the run, a stage it is made
                from is missing, or nothing is known of what it depends on; whatever `make` raises, after removing its
                half-made folder.
        """
        code = code or code_of(make)
        if known := self._known(self._inputs(name, uses, parents, code)):
            return known
        with writing(self.folder, name), making(self.folder, name):
            _bring_back(self.folder / name)
            inputs = self._inputs(name, uses, parents, code)  # while this process waited, another may have changed them
            if known := self._known(inputs):
                return known
            manifest = {**inputs, "digest": _digest(inputs), "note": note}
            self._build(self.folder / name, make, manifest)
        return Stage(name, self.folder / name, manifest["result"], manifest, fresh=True)

    def is_made(self, name: str, code: Code) -> bool:
        """Whether `stage` would load this stage of the registry rather than make it."""
        return self._known(self._inputs(name, None, (), code)) is not None

    def need(self, name: str) -> Stage:
        """A finished stage that an earlier notebook made from these very settings.

        Raises:
            LabError: it, or a stage it was made from, is missing or was made from other settings, other parents or
                other code of `helpers`; the message names the difference and the notebook to run.
        """
        stage = self._read(name)
        if stage is None:
            raise LabError(f"{self._shown(name)} is missing: run {_maker(name)} or `make run` first")
        remedy = f"rerun {_maker(name)} or choose another NAME"
        for path, recorded in stage.manifest["uses"].items():
            try:
                current = _lookup(self.config, path)
            except LabError as error:
                raise LabError(f"{self._shown(name)} was made with {path}; now there is {error}: {remedy}") from None
            if difference := _difference(path, recorded, current):
                raise LabError(f"{self._shown(name)} was made with {difference}: {remedy}")
        known, source = entry(name), self.config.get("rows", {}).get("path")
        if known and known.defends and source and "rows" not in stage.manifest["uses"]:
            raise LabError(f"{self._shown(name)} was made without ROWS, now ROWS = '{source}': {remedy}")
        code = stage.manifest["code"]
        if not isinstance(code, dict) or version_of(tuple(code["modules"])) != code["helpers"]:
            raise LabError(f"{self._shown(name)} was made by another version of helpers/: {remedy}")
        for parent, digest in stage.manifest["parents"].items():
            if self.need(parent).digest != digest:
                raise LabError(f"{self._shown(name)} was made from an earlier {self._shown(parent)}: {remedy}")
        return stage

    def stages(self) -> Iterator[Stage]:
        """Every stage that `need` would accept, in the order they were finished."""
        found = []
        for path in self.folder.rglob(MANIFEST):
            name = path.parent.relative_to(self.folder).as_posix()
            try:
                found.append(self.need(name))
            except LabError:
                continue
        yield from sorted(found, key=lambda stage: stage.manifest["finished"])

    def _inputs(self, name: str, uses: Sequence[str] | None, parents: Sequence[Stage], code: Code) -> dict[str, Any]:
        """Everything that a stage is made from; its digest is the stage's identity."""
        known = entry(name)
        if uses is None:
            if known is None:
                raise LabError(
                    f"stage '{name}' is not in the registry (helpers/core/stages.py): enter it there, or say "
                    "uses=[…], the settings that it depends on"
                )
            uses, code = known.settings(self.config), code.reaching(known.modules(self.config))
            parents = [*(self.need(parent) for parent in known.made_from(self.config)), *parents]
        return {
            "name": name,
            "uses": {path: _lookup(self.config, path) for path in uses},
            "parents": {parent.name: parent.digest for parent in parents},
            "code": code.identity(),
        }

    def _known(self, inputs: Mapping[str, Any]) -> Stage | None:
        """The stage on disk, if it was made from these inputs."""
        known = self._read(inputs["name"])
        return known if known and known.digest == _digest(inputs) else None

    def _read(self, name: str) -> Stage | None:
        """The stage on disk; None when there is none, its manifest is damaged or one of its files is gone."""
        path = self.folder / name
        try:
            manifest = read_json(path / MANIFEST)
            whole = manifest["name"] == name and manifest["files"] == _sizes(path)
            return Stage(name, path, manifest["result"], manifest, fresh=False) if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _build(self, path: Path, make: Callable[[Path], dict[str, Any] | None], manifest: dict[str, Any]) -> None:
        """Make a stage in a hidden folder beside `path`, complete its manifest, and put it in place of an older one."""
        partial, replaced, scratch = (_beside(path, kind) for kind in ("partial", "replaced", "scratch"))
        for leftover in (partial, replaced):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            with temporary_files_in(scratch), measured() as cost:
                result = make(partial) or {}
            manifest.update(
                cost,
                result=json.loads(json.dumps(result)),
                files=_sizes(partial),
                versions=versions(),
                finished=datetime.now(UTC).isoformat(timespec="microseconds"),
            )
            write_json(partial / MANIFEST, manifest)
            settle(partial)
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            _bring_back(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        sync(path.parent)

    def _shown(self, name: str) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{name}"


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}")


def _bring_back(path: Path) -> None:
    """Give the older result its name again where its replacement was interrupted."""
    if not path.exists() and (replaced := _beside(path, "replaced")).exists():
        replaced.rename(path)


def run_of(settings: Settings) -> Run:
    """The run folder of these settings, for a process that computes nothing itself: no model is looked at."""
    return Run(run_folder(settings.name), settings.config())


def _digest(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    value = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise LabError(
                f"no setting '{path}' in the configuration"
                + (nearest(key, value) if isinstance(value, Mapping) else "")
            )
        value = value[key]
    return value


def _difference(path: str, recorded: Any, current: Any) -> str:
    """The first differing leaf, as "seed = 0, now seed = 3"; "" when both are equal."""
    if isinstance(recorded, dict) and isinstance(current, dict):
        leaves = (_difference(f"{path}.{key}", recorded.get(key), current.get(key)) for key in recorded | current)
        return next(filter(None, leaves), "")
    return "" if recorded == current else f"{path} = {recorded}, now {path} = {current}"


def _maker(name: str) -> str:
    known = entry(name)
    return f"notebook {known.notebook}.ipynb" if known else "the notebook that makes it"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file a stage wrote, so that a deleted or cut-off checkpoint is noticed."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
