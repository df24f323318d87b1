"""Run folders: nothing is lost, nothing stale is believed."""

import contextlib
import errno
import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from helpers.core import cost as costs
from helpers.core import slices, store
from helpers.core.cost import measured, versions
from helpers.core.disk import MEGABYTE, read_json, working_in, write_json
from helpers.core.errors import LabError
from helpers.core.paths import MANIFEST, ROOT, runs_folder
from helpers.core.settings import Settings
from helpers.core.slices import code_of
from helpers.core.store import Run
from helpers.run.start import open_run

CONFIG = {"seed": 0, "task": "sentiment", "profile": {"lora": {"r": 8, "alpha": 16}, "name": "tiny"}}


class Maker:
    """A stage's work: writes a file, counts its calls."""

    def __init__(self, text="weights", result=None):
        self.text, self.result, self.calls = text, result, 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "model.bin").write_text(self.text)
        return self.result


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "runs" / "x", CONFIG)


def told(call, *args, **kwargs) -> str:
    """The message of the LabError that a call must raise: one line."""
    with pytest.raises(LabError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hidden(run):
    return [path.name for path in run.folder.rglob(".*")]


def test_a_stage_is_made_once_and_then_loaded(run):
    make = Maker(result={"asr": 0.5, "interval": (0.4, 0.6)})
    first = run.stage("evaluate/clean", make, uses=["seed"], note="why")
    again = Run(run.folder, CONFIG).stage("evaluate/clean", make, uses=["seed"])
    assert make.calls == 1 and first.fresh and not again.fresh
    assert first.result == again.result == {"asr": 0.5, "interval": [0.4, 0.6]}
    assert first.manifest == again.manifest and again.path == run.folder / "evaluate" / "clean"
    assert (again.path / "sub" / "model.bin").read_text() == "weights" and not hidden(run)


def test_a_manifest_tells_what_made_the_stage_and_what_it_cost(run):
    parent = run.stage("inject", Maker(), uses=["seed"])
    manifest = read_json(run.stage("scores", Maker(), uses=["profile.lora"], parents=[parent]).path / MANIFEST)
    assert manifest["uses"] == {"profile.lora": {"r": 8, "alpha": 16}}
    assert manifest["parents"] == {"inject": parent.digest}
    assert manifest["code"] == code_of(Maker()).identity()
    assert manifest["versions"] == versions() and manifest["versions"].keys() >= {"python", "torch", "transformers"}
    assert manifest["seconds"] >= 0 and manifest["peak_rss_mb"] > 10
    assert datetime.fromisoformat(manifest["finished"]).tzinfo is not None
    assert manifest["files"] == {"sub/model.bin": len("weights")} and manifest["result"] == {}


def test_only_a_setting_that_a_stage_uses_makes_it_anew(run):
    make = Maker()
    run.stage("inject", make, uses=["seed", "profile.lora"])
    other_task = Run(run.folder, CONFIG | {"task": "refusal"})
    assert not other_task.stage("inject", make, uses=["seed", "profile.lora"]).fresh
    other_seed = Run(run.folder, CONFIG | {"seed": 3})
    assert other_seed.stage("inject", make, uses=["seed", "profile.lora"]).fresh
    wider = Run(run.folder, CONFIG | {"seed": 3, "profile": {"lora": {"r": 4, "alpha": 16}}})
    assert wider.stage("inject", make, uses=["seed", "profile.lora"]).fresh
    assert make.calls == 3 and not hidden(run)


def test_new_parents_make_new_children(run):
    parent = run.stage("inject", Maker(), uses=["seed"])
    make = Maker()
    run.stage("scores", make, uses=[], parents=[parent])
    other = Run(run.folder, CONFIG | {"seed": 3})
    assert other.stage("scores", make, uses=[], parents=[other.stage("inject", Maker(), uses=["seed"])]).fresh
    assert make.calls == 2


def test_new_code_makes_a_new_stage_and_refuses_the_old(run, monkeypatch):
    make = Maker()
    run.stage("inject", make, uses=[])
    monkeypatch.setattr(store, "version_of", lambda modules: "later")
    monkeypatch.setattr(slices, "version_of", lambda modules: "later")
    assert told(run.need, "inject") == (
        "runs/x/inject was made by another version of helpers/: rerun notebook "
        "01_inject_backdoor.ipynb or choose another NAME"
    )
    assert run.stage("inject", make, uses=[]).fresh and make.calls == 2


def test_an_unknown_setting_is_named(run):
    assert told(run.stage, "inject", Maker(), uses=["sede"]) == (
        "no setting 'sede' in the configuration; did you mean 'seed'?"
    )
    assert "no setting 'seed.deeper'" in told(run.stage, "inject", Maker(), uses=["seed.deeper"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the work failed"), SystemExit(1)])
def test_an_interrupted_stage_leaves_the_older_result_and_no_half_one(run, error):
    def interrupted(folder):
        (folder / "half").write_text("half a model")
        raise error

    earlier = run.stage("inject", Maker("older"), uses=["seed"])
    other = Run(run.folder, CONFIG | {"seed": 3})
    with pytest.raises(type(error)):
        other.stage("inject", interrupted, uses=["seed"])
    assert (run.folder / "inject" / "sub" / "model.bin").read_text() == "older" and not hidden(run)
    assert run.need("inject").digest == earlier.digest


def test_a_rerun_resumes_at_the_interrupted_stage(run):
    def interrupted(folder):
        raise KeyboardInterrupt

    first, second = Maker(), Maker()
    parent = run.stage("inject", first, uses=[])
    with pytest.raises(KeyboardInterrupt):
        run.stage("scores", interrupted, uses=[], parents=[parent])
    again = Run(run.folder, CONFIG)
    again.stage("scores", second, uses=[], parents=[again.stage("inject", first, uses=[])])
    assert (first.calls, second.calls) == (1, 1)


def test_what_a_killed_process_left_is_swept_away(run):
    for leftover in (".partial-inject", ".replaced-inject"):
        (run.folder / leftover).mkdir()
        (run.folder / leftover / MANIFEST).write_text("{}")
    assert list(run.stages()) == []
    assert run.stage("inject", Maker(), uses=[]).fresh and not hidden(run)


def test_an_older_result_survives_an_interruption_while_it_is_replaced(run, monkeypatch):
    run.stage("inject", Maker("older"), uses=["seed"])
    rename = type(run.folder).rename

    def interrupted(path, target):
        if path.name.startswith(".partial-"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(run.folder), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(run.folder, CONFIG | {"seed": 3}).stage("inject", Maker("newer"), uses=["seed"])
    assert (run.need("inject").path / "sub" / "model.bin").read_text() == "older" and not hidden(run)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_loses_nothing(run, error):
    def full(folder):
        raise error

    parent = run.stage("inject", Maker(), uses=[])
    message = told(run.stage, "variants/0-clean", full, uses=[], parents=[parent])
    assert message.startswith("disk full while writing runs/x/variants/0-clean (") and "MB free)" in message
    assert not hidden(run) and run.need("inject")


def test_another_os_error_stays_what_it_is(run):
    def lost(folder):
        raise FileNotFoundError("rows.json")

    with pytest.raises(FileNotFoundError, match="rows.json"):
        run.stage("inject", lost, uses=[])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_told(run, number):
    def refused(folder):
        raise OSError(number, "not here", str(folder / "model.bin"))

    remedy = "make it writable and rerun, finished stages are kept"
    assert (
        told(run.stage, "evaluate/clean", refused, uses=[])
        == f"cannot write runs/x/evaluate/clean (not here): {remedy}"
    )
    with pytest.raises(LabError, match=f"cannot write runs/x .not here.: {remedy}"), working_in(run.folder):
        refused(run.folder)
    assert not hidden(run)


def test_a_folder_that_cannot_be_made_is_told(monkeypatch):
    def refused(self, **_):
        raise PermissionError(errno.EACCES, "not here", "/closed")  # above the runs, as mkdir with its parents tells it

    monkeypatch.setattr(Path, "mkdir", refused)
    assert told(Run, Path("/closed/a/runs/x"), {}).startswith("cannot write runs/x (not here): make it writable")


def test_a_file_elsewhere_that_may_not_be_read_stays_what_it_is(run, tmp_path):
    def refused(folder):
        raise PermissionError(errno.EACCES, "not yours", str(tmp_path / "models" / "model.bin"))

    with pytest.raises(PermissionError, match="not yours"):
        run.stage("inject", refused, uses=[])


def test_what_a_stage_writes_for_a_while_lies_in_the_run_folder(run):
    places, before = [], tempfile.gettempdir()

    def make(folder):
        with tempfile.TemporaryDirectory() as scratch, tempfile.NamedTemporaryFile() as file:
            places.extend([scratch, file.name])
        tempfile.mkdtemp()  # of one who does not tidy up

    leftover = run.folder / "evaluate" / ".scratch-clean" / "old"
    leftover.mkdir(parents=True)
    stage = run.stage("evaluate/clean", make, uses=[])
    assert len(places) == 2 and all(place.startswith(str(run.folder)) for place in places)
    assert stage.manifest["files"] == {} and not hidden(run) and tempfile.gettempdir() == before


def test_whoever_works_in_a_run_keeps_its_temporary_files_there(run, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/before")
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    (run.folder / ".scratch" / "old").mkdir(parents=True)
    with working_in(run.folder):
        assert tempfile.mkdtemp().startswith(str(run.folder)) and os.environ["TMPDIR"].startswith(str(run.folder))
        assert os.environ["IPYTHONDIR"].startswith(str(run.folder)) and not list(run.folder.rglob("old"))
    assert os.environ["TMPDIR"] == "/before" and "IPYTHONDIR" not in os.environ and not hidden(run)


def test_a_stage_is_on_the_disk_before_it_gets_its_name(run, monkeypatch):
    synced, missing = set(), []
    fsync, rename = os.fsync, type(run.folder).rename

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(path, target):
        missing.extend(inner for inner in (path, *path.rglob("*")) if inner.stat().st_ino not in synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(type(run.folder), "rename", renamed)
    run.stage("inject", Maker(), uses=[])
    assert not missing and run.folder.stat().st_ino in synced  # and so is the name


def test_an_older_result_is_found_again_where_its_replacement_was_killed(run):
    make = Maker("older")
    run.stage("inject", make, uses=["seed"])
    (run.folder / "inject").rename(run.folder / ".replaced-inject")
    (run.folder / ".partial-inject").mkdir()
    assert not run.stage("inject", make, uses=["seed"]).fresh and make.calls == 1
    (run.folder / "inject").rename(run.folder / ".replaced-inject")
    assert Run(run.folder, CONFIG | {"seed": 3}).stage("inject", make, uses=["seed"]).fresh and not hidden(run)


@pytest.mark.parametrize("damage", ["", '{"name": "inj', "[]", "{}", '{"name": "other", "files": {}}', "\xff"])
def test_a_damaged_manifest_counts_as_missing(run, damage):
    make = Maker()
    path = run.stage("inject", make, uses=[]).path / MANIFEST
    path.write_text(damage, encoding="latin-1")
    assert "runs/x/inject is missing" in told(run.need, "inject")
    assert run.stage("inject", make, uses=[]).fresh and make.calls == 2


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("cut")])
def test_a_lost_or_cut_off_file_counts_as_missing(run, damage):
    stage = run.stage("inject", Maker(), uses=[])
    damage(stage.path / "sub" / "model.bin")
    assert "runs/x/inject is missing" in told(run.need, "inject")


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("inject", "notebook 01_inject_backdoor.ipynb"),
        ("evaluate/clean", "notebook 01_inject_backdoor.ipynb"),
        ("variants/3-clean", "notebook 03_train_vaccines.ipynb"),
        ("scores", "notebook 04_score_signature.ipynb"),
        ("suppressed", "notebook 05_suppress_channels.ipynb"),
        ("purified", "notebook 06_recover_fluency.ipynb"),
        ("mine", "the notebook that makes it"),
    ],
)
def test_a_missing_stage_is_told_with_the_notebook_that_makes_it(run, name, maker):
    assert told(run.need, name) == f"runs/x/{name} is missing: run {maker} or `make run` first"


def test_a_needed_stage_must_be_made_from_the_present_settings(run):
    parent = run.stage("inject", Maker(), uses=["seed", "profile.lora"])
    run.stage("scores", Maker(), uses=["task"], parents=[parent])
    assert run.need("scores").manifest["parents"] == {"inject": parent.digest}
    remedy = "rerun notebook 01_inject_backdoor.ipynb or choose another NAME"
    other = Run(run.folder, CONFIG | {"seed": 3})
    assert told(other.need, "scores") == f"runs/x/inject was made with seed = 0, now seed = 3: {remedy}"
    other = Run(run.folder, CONFIG | {"profile": {"lora": {"r": 8, "alpha": 32}}})
    assert f"profile.lora.alpha = 16, now profile.lora.alpha = 32: {remedy}" in told(other.need, "inject")
    other = Run(run.folder, {"seed": 0, "profile": CONFIG["profile"]})
    assert told(other.need, "scores").startswith("runs/x/scores was made with task; now there is no setting 'task'")


def test_a_stage_of_the_defenders_must_be_made_from_the_present_rows(run):
    run.stage("variants", Maker(), uses=["seed"])
    other = Run(run.folder, CONFIG | {"rows": {"path": "more.json"}})
    assert told(other.need, "variants") == (
        "runs/x/variants was made without ROWS, now ROWS = 'more.json': rerun notebook 03_train_vaccines.ipynb or "
        "choose another NAME"
    )
    other.stage("variants", Maker(), uses=["seed", "rows"])
    assert other.need("variants")


def test_a_parent_that_changes_while_a_stage_waits_for_the_run_is_refused(run, monkeypatch):
    """Another process has made it anew with other settings: what it left is not what the stage was asked to read."""
    rest = {"access": "adapter", "data": {"path": ""}, "rows": {"path": ""}, "challenge": None}
    config = CONFIG | rest | {"profile": CONFIG["profile"] | {"signature": {}}}
    mine, other = Run(run.folder, config), Run(run.folder, config | {"seed": 3})
    mine.stage("variants", Maker(), uses=[], parents=[mine.stage("inject", Maker("first"), uses=["seed"])])

    @contextlib.contextmanager
    def waiting(*_):
        monkeypatch.undo()
        other.stage("inject", Maker("second"), uses=["seed"])
        yield

    monkeypatch.setattr(store, "making", waiting)
    make = Maker()
    assert "runs/x/inject was made with seed = 3, now seed = 0" in told(mine.stage, "scores", make)
    assert not make.calls and not (run.folder / "scores").exists()


def test_a_child_of_a_remade_or_vanished_parent_is_refused(run):
    run.stage("scores", Maker(), uses=[], parents=[run.stage("inject", Maker(), uses=[])])
    run.stage("inject", Maker(), uses=["task"])
    assert told(run.need, "scores") == (
        "runs/x/scores was made from an earlier runs/x/inject: rerun notebook "
        "04_score_signature.ipynb or choose another NAME"
    )
    (run.folder / "inject" / MANIFEST).unlink()
    assert "runs/x/inject is missing" in told(run.need, "scores")


def test_stages_are_listed_in_order_and_without_stale_ones(run):
    for name in ("scores", "evaluate/clean", "inject"):
        run.stage(name, Maker(), uses=["seed"] if name == "inject" else [])
    assert [stage.name for stage in run.stages()] == ["scores", "evaluate/clean", "inject"]
    other = Run(run.folder, CONFIG | {"seed": 3})
    assert [stage.name for stage in other.stages()] == ["scores", "evaluate/clean"]


def test_open_run_follows_the_settings_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "elsewhere"))
    run = open_run(Settings(SEED=4))
    assert run.folder == tmp_path / "elsewhere" / "tiny-badnets-sentiment-adapter-4"
    assert run.config["seed"] == 4 and run.figures.is_dir()
    monkeypatch.setenv("LAB_RUNS", "")  # set to nothing is not set
    assert runs_folder() == ROOT / "runs"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "asks for a GPU" in told(open_run, Settings(PROFILE="llama-2-7b-chat"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two runs below `runs/`: one with a stage of each kind, one two folders deep that has only begun."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    for name, stages in (("mine", ["inject", "evaluate/clean"]), ("group/old", ["evaluate/clean"])):
        run = open_run(Settings(NAME=name))
        for stage in stages:
            run.stage(stage, Maker(), uses=[])
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["mine/inject", "mine/evaluate/clean", "mine/evaluate", "mine/a/b", "group/old/x"])
def test_a_run_inside_another_is_refused(folders, name):
    outer = "group/old" if name.startswith("group") else "mine"
    before = sorted(folders.rglob("*"))
    assert (
        told(open_run, Settings(NAME=name)) == f"NAME = '{name}' lies in the run '{outer}': choose a name outside of it"
    )
    assert sorted(folders.rglob("*")) == before


def test_a_run_around_another_is_refused(folders):
    assert told(open_run, Settings(NAME="group")) == "NAME = 'group' holds the run 'group/old': choose another name"


@pytest.mark.parametrize("name", ["mine", "group/old", "group/new", "mine2/x", "minor"])
def test_runs_are_opened_again_and_beside_each_other(folders, name):
    for _ in range(2):
        run = open_run(Settings(NAME=name))
        assert run.folder == folders / name
        run.stage("scores", Maker(), uses=[])


@pytest.mark.parametrize("damage", ["{", "[]", '{"name": 3}', '{"name": ""}'])
def test_a_damaged_manifest_makes_no_other_run(folders, damage):
    (folders / "mine" / "evaluate" / "clean" / MANIFEST).write_text(damage)
    assert open_run(Settings(NAME="mine")).folder == folders / "mine"
    assert "lies in the run 'mine'" in told(open_run, Settings(NAME="mine/evaluate"))


def test_peak_memory_sees_what_was_already_given_back():
    with measured() as cost:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
        time.sleep(5 * costs.SAMPLE_SECONDS)
        held = psutil.Process().memory_info().rss / MEGABYTE
        del block
    assert cost["peak_rss_mb"] >= held - 50 and cost["seconds"] >= 5 * costs.SAMPLE_SECONDS


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"asr": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"asr": object()})
    assert read_json(path) == {"asr": 0.5} and [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text()) == {"asr": 0.5}
