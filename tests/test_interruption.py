"""Signals that this process sends to itself."""

import signal
import subprocess
import sys
import threading

import pytest

from helpers.core.interruption import IGNORES, SIGNALS, Terminated, deaf_to_ctrl_c, held_back, terminable

STRUCK = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


@pytest.fixture(autouse=True)
def handlers():
    """Python's own handlers during a test, which must find them restored; pytest's afterwards."""
    theirs = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    ours = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in theirs.items():
        signal.signal(number, handler)
    assert ours == [signal.default_int_handler, signal.SIG_DFL]


def test_sigterm_is_an_interruption():
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_block_ends_before_an_interruption_is_heard(number, kind):
    done = []
    with pytest.raises(KeyboardInterrupt) as stop, terminable(), held_back():
        signal.raise_signal(number)
        done.append("all")
    assert done == ["all"] and stop.type is kind


def test_a_second_ctrl_c_is_heard_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"]


def test_an_interruption_takes_the_place_of_an_error():
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("a worker died")


def test_an_undisturbed_block_keeps_its_error():
    with pytest.raises(ValueError, match="died"), held_back():
        raise ValueError("a worker died")


def test_another_thread_receives_no_signals():
    done = []

    def work():
        with terminable(), held_back():
            done.append("all")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["all"]


def run(program):
    """Exit status of a Python process that a thread of ours starts."""
    status = []
    thread = threading.Thread(target=lambda: status.append(subprocess.call([sys.executable, "-c", program])))
    thread.start()
    thread.join()
    return status[0]


def test_what_starts_deaf_survives_ctrl_c():
    assert run(STRUCK) != 0
    with deaf_to_ctrl_c():
        assert run(STRUCK) == 0
        assert run(f"{IGNORES}\n{STRUCK}") == 0
        hears = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        assert run(f"{IGNORES}\n{hears}{STRUCK}") != 0
    assert run(STRUCK) != 0


def test_ctrl_c_is_heard_when_the_deaf_block_has_ended():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with deaf_to_ctrl_c():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            done.append("all")
        done.append("too far")
    assert done == ["all"]
