"""Run folders: the only memory between two notebooks.

A run is a folder; a stage is a folder in it, made once. Beside its files lies `manifest.json`: the settings the stage
used, the digests of the stages it was made from, the version of the code. Equal digests mean an equal result, so it is
loaded; any difference means it is made again, or refused where it is only needed. A stage is built in a hidden folder
and renamed into place when complete and on the disk: no interruption leaves half a model that looks like a whole one.
What is written for a while lies in the run folder as well, where the next attempt removes what a killed one has left.
"""

import ast
import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from helpers.locks import hold, making
from helpers.profiles import ROOT, LabError, Settings, nearest, require_device

MANIFEST = "manifest.json"
MEGABYTE = 1_000_000
SAMPLE_SECONDS = 0.02
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors", "numpy")
# modules that cannot change a result
PRESENTATION = (
    "plots.py",
    "execution.py",
    "sweeps.py",
    "planning.py",
    "pipeline.py",
    "locks.py",
    "fetch.py",
    "interruption.py",
)

# which notebook makes a stage, or all stages that share the part before the slash
MADE_BY = {
    "inject": "01_inject_backdoor",
    "evaluate/clean": "01_inject_backdoor",
    "evaluate/backdoored": "01_inject_backdoor",
    "near_misses": "01_inject_backdoor",
    "formats": "01_inject_backdoor",
    "formats_input": "01_inject_backdoor",
    "ablations": "02_sanity_checks",
    "variants": "03_train_vaccines",
    "vaccine_check": "03_train_vaccines",
    "scores": "04_score_signature",
    "challenge_copy": "05_suppress_channels",
    "challenge_points": "05_suppress_channels",
    "challenge": "05_suppress_channels",
    "oracle": "05_suppress_channels",
    "oracle_points": "05_suppress_channels",
    "suppressed": "05_suppress_channels",
    "suppressed_random": "05_suppress_channels",
    "suppressed_magnitude": "05_suppress_channels",
    "suppressed_own_update": "05_suppress_channels",
    "evaluate/suppressed": "05_suppress_channels",
    "evaluate/suppressed_random": "05_suppress_channels",
    "evaluate/suppressed_magnitude": "05_suppress_channels",
    "evaluate/suppressed_own_update": "05_suppress_channels",
    "purified": "06_recover_fluency",
    "finetuned": "06_recover_fluency",
    "random": "06_recover_fluency",
    "magnitude": "06_recover_fluency",
    "own_update": "06_recover_fluency",
    "tau": "06_recover_fluency",
    "conflict_model": "07_merge_conflict",
    "whole": "07_merge_conflict",
    "merges": "07_merge_conflict",
    "merged": "07_merge_conflict",
    "no_base": "07_merge_conflict",
    "evaluate/conflict": "07_merge_conflict",
    "evaluate/conflict_alone": "07_merge_conflict",
    "argued": "08_external_evidence",
    "both": "09_compare_defenses",
    "merged_suppressed": "09_compare_defenses",
    "evaluate/both": "09_compare_defenses",
    "evaluate/merged_suppressed": "09_compare_defenses",
    "mixtures": "10_ablate",
    "evaluate": "06_recover_fluency",
}


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
        uses: Sequence[str] = (),
        parents: Sequence[Stage] = (),
        note: str = "",
    ) -> Stage:
        """Load a stage, or make it when it is missing or anything it depends on has changed.

        Args:
            name: a word, or two joined by a slash ("evaluate/clean"); never the first word of another stage.
            make: writes its files into the folder it is given and returns its results (JSON-able).
            uses: dotted paths into the configuration: all the settings that can change the outcome.
            parents: the stages it reads.
            note: one line for the manifest.
        Raises: LabError when the disk is full, the folder cannot be written or another process keeps the run;
            whatever `make` raises, after removing its half-made folder.
        """
        inputs = self._inputs(name, uses, parents)
        if known := self._known(inputs):
            return known
        manifest = {**inputs, "digest": _digest(inputs), "note": note}
        with writing(self.folder, name), making(self.folder, name):
            _bring_back(self.folder / name)
            if known := self._known(inputs):  # made by another process while this one waited
                return known
            self._build(self.folder / name, make, manifest)
        return Stage(name, self.folder / name, manifest["result"], manifest, fresh=True)

    def is_made(self, name: str, uses: Sequence[str] = (), parents: Sequence[Stage] = ()) -> bool:
        """Whether `stage` would load this stage rather than make it."""
        return self._known(self._inputs(name, uses, parents)) is not None

    def need(self, name: str) -> Stage:
        """A finished stage that an earlier notebook made from these very settings.

        Raises: LabError when it, or a stage it was made from, is missing or was made from other settings, other
            parents or other code; the message names the difference and the notebook to run.
        """
        stage = self._read(name)
        if stage is None:
            raise LabError(f"{self._shown(name)} is missing: run {_maker(name)} or `make run` first")
        remedy = f"rerun {_maker(name)} or choose another NAME"
        for path, recorded in stage.manifest["uses"].items():
            if difference := _difference(path, recorded, _lookup(self.config, path)):
                raise LabError(f"{self._shown(name)} was made with {difference}: {remedy}")
        if stage.manifest["code"] != code_version():
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

    def _inputs(self, name: str, uses: Sequence[str], parents: Sequence[Stage]) -> dict[str, Any]:
        """Everything that a stage is made from; its digest is the stage's identity."""
        return {
            "name": name,
            "uses": {path: _lookup(self.config, path) for path in uses},
            "parents": {parent.name: parent.digest for parent in parents},
            "code": code_version(),
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
            _settle(partial)
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            _bring_back(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        _sync(path.parent)

    def _shown(self, name: str) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{name}"


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}")


def _bring_back(path: Path) -> None:
    """Give the older result its name again where its replacement was interrupted."""
    if not path.exists() and (replaced := _beside(path, "replaced")).exists():
        replaced.rename(path)


def _settle(folder: Path) -> None:
    """Have a folder and all in it on the disk, so that not even a power cut leaves a name without its content."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a folder on a file system that knows this of files only
            raise
    finally:
        os.close(descriptor)


def open_run(settings: Settings) -> Run:
    """The run folder of these settings: `runs/<name>/`, or `$LAB_RUNS/<name>/`.

    Raises: LabError when the profile asks for a device that this machine lacks.
    """
    require_device(settings.profile.model)
    return Run(runs_folder() / settings.name, settings.config())


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process and the kernels it starts, and all that they write for a while inside it.

    Raises: LabError when another process works there, or it cannot be written.
    """
    with writing(folder), hold(folder), temporary_files_in(folder / ".scratch") as scratch:
        before = {name: os.environ.get(name) for name in ("TMPDIR", "IPYTHONDIR")}
        os.environ.update(TMPDIR=str(scratch), IPYTHONDIR=str(scratch / "ipython"))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[Path]:
    """Let this process keep its temporary files in a folder of their own, empty at first and removed at last."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(folder: Path, stage: str = "") -> Iterator[None]:
    """Turn what a full disk or a read-only folder says while a run, or a stage of it, is written into one line.

    Raises: LabError for these; any other error as it is.
    """
    try:
        yield
    except Exception as error:
        shown = "/".join((folder.parent.name, folder.name, *filter(None, [stage])))
        if _disk_full(error):
            there = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(there).free // MEGABYTE
            raise LabError(
                f"disk full while writing {shown} ({free} MB free): make room and rerun, finished stages are kept"
            ) from error
        if _refused(error, folder):
            raise LabError(
                f"cannot write {shown} ({error.strerror}): make it writable and rerun, finished stages are kept"
            ) from error
        raise


def runs_folder() -> Path:
    """Where all runs live: `runs/` of the repository, or the folder that $LAB_RUNS names."""
    return ROOT / os.environ.get("LAB_RUNS", "runs")


@functools.cache
def code_version() -> str:
    """Digest of the code that can change a result: `helpers/` without comments, docstrings, figures and pipeline."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).as_posix() not in PRESENTATION:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(_code_only(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _code_only(source: str) -> str:
    """The syntax tree of a module as text: two sources that differ only in layout or prose give the same."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return ast.dump(tree)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a block: yields a dict that afterwards holds `seconds` and `peak_rss_mb` (of this process, sampled)."""
    process, done = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cost, start = {}, time.perf_counter()
    try:
        yield cost
    finally:
        cost["seconds"] = round(time.perf_counter() - start, 3)
        done.set()
        watcher.join()
        cost["peak_rss_mb"] = round(max(peak, process.memory_info().rss) / MEGABYTE, 1)


def _digest(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
    notebook = MADE_BY.get(name) or MADE_BY.get(name.split("/")[0])
    return f"notebook {notebook}.ipynb" if notebook else "the notebook that makes it"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file a stage wrote, so that a deleted or cut-off checkpoint is noticed."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _disk_full(error: BaseException) -> bool:
    """Whether an error means "no space left"; safetensors and torch wrap the operating system's own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _refused(error: BaseException, folder: Path) -> bool:
    """Whether an error means that something in this folder, or the folder itself, may not be written."""
    refused = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return refused and Path(str(error.filename or folder)).is_relative_to(folder.parent)
