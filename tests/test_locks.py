"""Locks of run folders, held by real processes: who is refused, who waits, and what is left of one that was killed."""

import errno
import fcntl
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from helpers.core.disk import whole_or_nothing
from helpers.core.errors import LabError
from helpers.core.locks import hold, making
from helpers.core.paths import ROOT
from helpers.core.slices import Code
from helpers.core.store import Run

pytestmark = pytest.mark.slow

IN_USE = "runs/x is in use by another process: wait until it has ended, or choose another NAME"
HEAD = """import sys, time
from pathlib import Path
from helpers.core.locks import hold, making
from helpers.core.store import Run
folder = Path(sys.argv[1])
"""
WAIT = 'print("ready", flush=True)\n    sys.stdin.read()'
HOLD = f"with hold(folder):\n    {WAIT}"
MAKE = f"with making(folder, 'inject'):\n    {WAIT}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "x"


def started(program, folder):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + program, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def other(program, folder):
    """Another process that runs `program` up to its line "ready", and on when its input is closed."""
    with started(program, folder) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_run_is_kept_for_one_process_until_it_ends_however_it_ends(folder):
    with other(HOLD, folder) as holder:
        with pytest.raises(LabError) as refused, hold(folder):
            pass
        assert str(refused.value) == IN_USE
        with hold(folder.with_name("y")):  # another run
            pass
        holder.kill()
        holder.wait()
        with hold(folder):
            pass


def test_a_lone_notebook_makes_no_stage_of_a_run_that_is_kept_but_loads_what_is_there(folder):
    made = Run(folder, {}).stage("inject", lambda partial: {"asr": 0.5}, uses=[])
    with other(HOLD, folder):
        again = Run(folder, {})
        assert again.stage("inject", lambda partial: {}, uses=[]).result == made.result
        with pytest.raises(LabError, match=IN_USE):
            again.stage("scores", lambda partial: {}, uses=[])
    assert again.stage("scores", lambda partial: {}, uses=[]).fresh


def test_a_chain_is_refused_while_a_lone_notebook_makes_a_stage(folder):
    with other(MAKE, folder), pytest.raises(LabError, match=IN_USE), hold(folder):
        pass
    with hold(folder):
        pass


def test_what_the_keeper_has_started_may_make_stages(folder):
    child = "with making(folder, 'inject'):\n    print('ready')"
    grandchild = f"import subprocess\nsys.exit(subprocess.call([sys.executable, '-c', {HEAD + child!r}, folder]))"
    with hold(folder), making(folder, "scores"):
        process = started(grandchild, folder)
        told, errors = process.communicate(timeout=60)
    assert (told, process.returncode) == ("ready\n", 0), errors


def test_two_that_need_one_stage_make_it_once(folder, capfd):
    slow = (
        'def make(partial):\n    print("ready", flush=True)\n    time.sleep(1)\n    return {"by": "other"}\n'
        "from helpers.core.slices import Code\nRun(folder, {}).stage('inject', make, uses=[], code=Code(()))"
    )
    with other(slow, folder) as process:
        stage = Run(folder, {}).stage("inject", lambda partial: {"by": "this"}, uses=[], code=Code(()))
        assert process.wait(timeout=60) == 0
    assert (stage.result, stage.fresh) == ({"by": "other"}, False)
    assert capfd.readouterr().out == "waiting for another process, which makes x/inject\n"


def test_two_stages_of_one_run_are_made_at_the_same_time(folder):
    with other(MAKE, folder):
        assert Run(folder, {}).stage("scores", lambda partial: {}, uses=[]).fresh


def test_one_that_waits_gets_the_run_when_it_is_free(folder):
    with other(HOLD, folder) as holder:
        waiting = started("with hold(folder, wait=True):\n    print('ready')", folder)
        time.sleep(2)
        assert waiting.poll() is None
        holder.kill()
        assert waiting.communicate(timeout=60)[0] == "ready\n"


def test_a_file_system_without_locks_is_used_without(folder, monkeypatch):
    def answer(number):
        def flock(file, kind):
            raise OSError(number, "no locks")

        monkeypatch.setattr(fcntl, "flock", flock)

    answer(errno.ENOLCK)
    with hold(folder):
        assert Run(folder, {}).stage("inject", lambda partial: {}, uses=[]).fresh
    answer(errno.EIO)
    with pytest.raises(OSError, match="no locks"), hold(folder):
        pass


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    """The second is told; what the first writes stays whole. What a killed one has left is cleared away."""
    folder, partial = tmp_path / "model", tmp_path / ".partial-model"
    partial.mkdir()
    (partial / "left").write_text("half a model")
    with whole_or_nothing(folder) as first:
        (first / "weights").write_text("whole")
        with pytest.raises(LabError, match="another process writes to .*partial-model: wait until it has ended"):
            with whole_or_nothing(folder):
                raise AssertionError
        assert [path.name for path in first.iterdir()] == ["weights"]
    assert [path.name for path in folder.iterdir()] == ["weights"] and not partial.exists()
    with pytest.raises(LabError, match="is not empty"):
        with whole_or_nothing(folder):
            raise AssertionError
    assert not partial.exists()
