"""Who works in a run folder, by locks of the operating system: they end with their process, however it ends.

`hold` keeps a whole run for one chain of notebooks, `making` one stage for the process that makes it; the files they
lock lie in `<run>/locks/` and stay there. A file system that has no locks is used without. On a network disk the locks
hold between machines where the server keeps them (NFS 4 does), and else, as with `local_lock`, on each machine alone.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from helpers.core.errors import LabError

LOCKS = "locks"
# what a file system without locks answers, or one that locks only what is open for writing, which no folder can be
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


@contextmanager
def hold(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep a run folder for this process and those that it starts.

    Args:
        folder: made on demand.
        wait: until it is free.

    Raises:
        LabError: another process keeps it, or makes a stage of it, and `wait` is False.
    """
    with _opened(folder / LOCKS / "run") as file:
        if not _locked(file, fcntl.LOCK_EX, wait):
            raise _in_use(folder)
        file.seek(0)
        file.truncate()
        json.dump([socket.gethostname(), os.getpid()], file)
        file.flush()
        yield


@contextmanager
def making(folder: Path, name: str) -> Iterator[None]:
    """Keep one stage of a run for this process, after whoever makes it now.

    Args:
        folder: the run's, made on demand.
        name: the stage's.

    Raises:
        LabError: another process, not one that started this one, keeps the whole run.
    """
    whole, own = (folder / LOCKS / file for file in ("run", f"stage-{name.replace('/', '-')}"))
    with _opened(whole) as run, _opened(own) as stage:
        if not _locked(run, fcntl.LOCK_SH) and not _held_for_us(run):
            raise _in_use(folder)
        if not _locked(stage, fcntl.LOCK_EX):
            print(f"waiting for another process, which makes {folder.name}/{name}", flush=True)
            _locked(stage, fcntl.LOCK_EX, wait=True)
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a folder that is there, of whatever kind, for this process.

    Raises:
        LabError: another process keeps it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(descriptor, fcntl.LOCK_EX):
            raise LabError(f"another process writes to {folder}: wait until it has ended, then try again")
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")  # NFS locks only what is open for writing


def _locked(file: IO[str] | int, kind: int, wait: bool = False) -> bool:
    """Lock an open file, until it is closed; False when another process has locked it."""
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
    return True


def _held_for_us(file: IO[str]) -> bool:
    """Whether the process that keeps the run is this one or one that it descends from."""
    file.seek(0)
    try:
        host, pid = json.load(file)
    except ValueError:  # it is about to write its name
        return False
    us = psutil.Process()
    return host == socket.gethostname() and pid in (us.pid, *(parent.pid for parent in us.parents()))


def _in_use(folder: Path) -> LabError:
    name = f"{folder.parent.name}/{folder.name}"
    return LabError(f"{name} is in use by another process: wait until it has ended, or choose another NAME")
