"""`make check-lab`: what a machine lacks for a class, told before the class.

One line for each need, with what helps where it is not met; what the lab can do without, such as a GPU, is only told.
The module itself asks for nothing but Python, so that it speaks on a machine that was never set up.
"""

from __future__ import annotations

import functools
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from helpers.core.paths import ROOT, runs_folder

PYTHON = (3, 11)
SET_UP_BYTES = 3e9  # what `make setup` takes of the disk, as docs/first-run.md says
QUESTION, ANSWER = "What is the capital of France?", "Paris"  # of the small model's own world, data/world.yaml
SET_UP = "`make setup`"


@dataclass(frozen=True)
class Need:
    """One line of the table.

    Args:
        name: of the line.
        look: returns what is there, in words; raises where the need is not met.
        help: what helps then.
        optional: whether a class can do without.
    """

    name: str
    look: Callable[[], str]
    help: str
    optional: bool = False


@dataclass(frozen=True)
class Found:
    """What a look at one need gave: a verdict, and the words of the line."""

    need: Need
    met: bool
    words: str

    @property
    def verdict(self) -> str:
        """ "ok", "MISSING", or "none" for what is optional."""
        return "ok" if self.met else "none" if self.need.optional else "MISSING"


class Lacking(Exception):
    """What a need lacks, in words."""


def look_at(need: Need) -> Found:
    """Look at one need; whatever stops the look is what is missing."""
    try:
        return Found(need, True, need.look())
    except ModuleNotFoundError as error:
        return Found(need, False, f"not looked at, '{error.name}' is not installed: {SET_UP}")
    except ImportError as error:
        old = sys.version_info < PYTHON
        return Found(need, False, "not looked at, this Python is too old" if old else f"{error}: {need.help}")
    except Exception as error:  # whatever a broken installation raises is a finding
        said = (str(error) or type(error).__name__).strip().splitlines()[0]
        return Found(need, False, f"{said}: {need.help}")


def python_version() -> str:
    """The version of this Python."""
    found = platform.python_version()
    if sys.version_info < PYTHON:
        raise Lacking(f"{found}, the lab needs {'.'.join(map(str, PYTHON))} or later")
    return found


def packages() -> str:
    """Whether the environment holds what the lock names, in the versions that it names."""
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    if wrong := [told for pin in pins if (told := _unlike(pin))]:
        raise Lacking(f"{len(wrong)} of {len(pins)} packages are not as locked, such as {wrong[0]}")
    return f"{len(pins)} packages as in requirements-lock.txt"


def _unlike(pin: Any) -> str:
    """How an installed package differs from its pin; "" where it does not."""
    try:
        found = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        return f"{pin.name}, which is not there"
    return "" if pin.specifier.contains(found, prereleases=True) else f"{pin.name} {found}, wanted {pin.specifier}"


def free_memory() -> str:
    """Whether every stage of a run with default settings fits into the free memory, by `make plan`."""
    from helpers.run.planning import ROOM

    machine, needed, _ = _planned()
    told = f"{_gigabytes(machine.free)} free, a run takes {_gigabytes(needed)}"
    if needed > ROOM * machine.free:
        raise Lacking(told)
    return told


def free_disk() -> str:
    """Whether the disk has room for a run, and for the environment where it is not there yet."""
    there = next(path for path in (runs_folder(), *runs_folder().parents) if path.exists())
    free = float(shutil.disk_usage(there).free)
    try:
        needed, what = _planned()[2], "a run takes"
    except ImportError:
        needed, what = SET_UP_BYTES, "set-up and a run take"
    told = f"{_gigabytes(free)} free, {what} {_gigabytes(needed)}"
    if needed > free:
        raise Lacking(told)
    return told


@functools.cache
def _planned() -> tuple[Any, float, float]:
    """This machine, and the bytes of memory and of disk that a run with default settings takes."""
    from helpers.core.settings import Settings
    from helpers.run.costs import costs, rows, shape
    from helpers.run.machine import this_machine

    settings = Settings()
    planned = costs(settings, shape(settings.profile), rows(settings))
    machine = this_machine(settings)
    return machine, machine.libraries + max(cost.memory for cost in planned), sum(cost.disk for cost in planned)


def small_model() -> str:
    """Whether the shipped model is there and answers a question of its world."""
    return _answered(four_bit=False)


def four_bits() -> str:
    """Whether bitsandbytes packs the shipped model in 4 bits, and it answers all the same."""
    return _answered(four_bit=True)


def _answered(four_bit: bool) -> str:
    from helpers.core.settings import Settings
    from helpers.data.example import Example
    from helpers.model.generate import answers
    from helpers.model.load import load_base
    from helpers.model.tokenizer import load_format

    profile = Settings().profile
    model = load_base(profile.model, four_bit=four_bit)
    (said,) = answers(model, load_format(profile.model), [Example(QUESTION, ANSWER)], profile)
    if ANSWER not in said:
        raise Lacking(f"to '{QUESTION}' it says {said!r}, not '{ANSWER}'")
    return f"'{QUESTION}' – '{said}'"


def loopback_port() -> str:
    """Whether a kernel can be reached: a port of this machine is opened, and a word goes through it and back."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            there, _ = server.accept()
            with there:
                client.sendall(b"kernel")
                if there.recv(16) != b"kernel":
                    raise Lacking(f"port {port} of 127.0.0.1 opens, but nothing comes through")
    return f"127.0.0.1 answers, here on port {port}"


def write_access() -> str:
    """Whether runs can be written."""
    folder = runs_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    return f"{folder.name}/ can be written"


def gpu() -> str:
    """The name of a GPU that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        raise Lacking("no GPU that PyTorch can use")
    return torch.cuda.get_device_name()


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


NEEDS = (
    Need("Python", python_version, "`make setup PYTHON=python3.12`"),
    Need("environment", packages, SET_UP),
    Need("free memory", free_memory, "close other programs"),
    Need("free disk", free_disk, "make room, or keep runs elsewhere with LAB_RUNS"),
    Need("small model", small_model, "`git checkout data/models/tiny`, or `make base`"),
    Need("loopback port", loopback_port, "let the firewall pass connections of this machine to itself (127.0.0.1)"),
    Need("runs/", write_access, "make the folder writable, or choose another with LAB_RUNS"),
    Need("4 bits", four_bits, "notebook 03 cannot train its vaccines; try `make setup` on a 64-bit system"),
    Need("GPU", gpu, "the notebooks need none", optional=True),
)


def table_line(found: Found) -> str:
    """One line of the table."""
    return f"{found.need.name:<15}{found.verdict:<9}{found.words}"


def check_lab(needs: Sequence[Need] = NEEDS) -> int:
    """Print the table, a line as soon as it is known.

    Returns:
        how many needs are not met, those left out that are optional.
    """
    missing = 0
    for need in needs:
        found = look_at(need)
        missing += not found.met and not need.optional
        print(table_line(found), flush=True)
    print(f"\nnot ready: {missing} missing, see above" if missing else "\nready")
    return missing


if __name__ == "__main__":
    sys.exit(2 if check_lab() else 0)
