"""Writing so that nothing is lost: whole files, one line for a full or read-only disk, temporary files that go."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.core.errors import LabError
from helpers.core.locks import alone_in, hold

MEGABYTE = 1_000_000


def settle(folder: Path) -> None:
    """Have a folder and all in it on the disk, so that not even a power cut leaves a name without its content."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def clear(folder: Path) -> None:
    """Remove everything in a folder, and leave the folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a folder on a file system that knows this of files only
            raise
    finally:
        os.close(descriptor)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process and the kernels it starts, and all that they write for a while inside it.

    Raises:
        LabError: another process works there, or it cannot be written.
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

    Args:
        folder: the run's.
        stage: its name, for the message.

    Raises:
        LabError: for these; any other error as it is.
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


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _disk_full(error: BaseException) -> bool:
    """Whether an error means "no space left"; safetensors and torch wrap the operating system's own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _refused(error: BaseException, folder: Path) -> bool:
    """Whether an error means that something in this folder, or the folder itself, may not be written."""
    refused = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    if not refused:
        return False
    place = Path(str(error.filename or folder))
    return place.is_relative_to(folder.parent) or folder.is_relative_to(place)  # or a folder around it


@contextmanager
def whole_or_nothing(folder: Path | str) -> Iterator[Path]:
    """A folder to write to, which takes its name when the block has ended well and is removed when it has not.

    Raises:
        LabError: there is something in `folder` already, or another process writes to it.
    """
    folder = Path(folder)
    partial = folder.with_name(f".partial-{folder.name}")
    partial.mkdir(parents=True, exist_ok=True)
    with alone_in(partial):
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise LabError(f"{folder} is not empty: choose another folder, or remove it")
            clear(partial)  # of what a process that was killed has left
            yield partial
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
