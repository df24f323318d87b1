"""Ctrl-C and SIGTERM: both are told and tidied up alike, and neither strikes what must not stop half-way."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from helpers.core.errors import exit_status

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a process runs that began under `deaf_to_ctrl_c`: it ignores Ctrl-C, and what it starts may hear it.
IGNORES = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
IGNORES += "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})"


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises, so that it is told and tidied up as Ctrl-C is."""


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, where signals can be received at all: in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(work: Callable[[], object], kept: str) -> int:
    """Do the work of a command that can be stopped and resumed, and say so where it is stopped.

    Args:
        kept: what of it is kept then, in the plural, such as "stages"; "" where it starts anew.

    Returns:
        0 done, 2 refused or failed, 130 interrupted, 143 terminated.
    """
    try:
        with terminable():
            return exit_status(work)
    except KeyboardInterrupt as stop:
        how, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        then = f"finished {kept} are kept, the same command resumes" if kept else "the same command starts anew"
        print(f"\n{how}: {then}", file=sys.stderr)
        return status


@contextmanager
def held_back() -> Iterator[None]:
    """Let the block end before the first Ctrl-C or SIGTERM that came meanwhile is heard; a second one is not held back.

    The interruption takes the place of an error of the block, which it may have caused. Outside the main thread, which
    receives no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    came: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)
        _restore(before)

    for number in SIGNALS:
        signal.signal(number, keep)
    try:
        yield
    finally:
        _restore(before)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Have the threads and processes that are started meanwhile not receive Ctrl-C.

    A terminal sends it to a whole group of processes, and each would print a traceback of its own. This thread hears it
    when the block has ended. A process may then run `IGNORES`.
    """
    resource_tracker.ensure_running()  # which, started later by a thread, would unblock it there
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _restore(handlers: dict[int, signal.Handlers]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
