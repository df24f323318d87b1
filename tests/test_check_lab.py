"""Before a class: what a machine lacks is told, and a finished run travels as one file that is safe to unpack."""

import io
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.core.disk import read_json, write_json
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.settings import Settings
from helpers.core.stages import STAGES
from helpers.core.store import Run, run_of
from helpers.run import check_lab, packing
from helpers.run.check_lab import Need, look_at

NEEDS = {need.name: need for need in check_lab.NEEDS}


def line(name):
    """What the table says of a need, and whether it is met."""
    found = look_at(NEEDS[name])
    return found.verdict, found.words


# --- what a machine lacks -------------------------------------------------------------------------------------------


def lacks(said):
    def look():
        raise check_lab.Lacking(said)

    return look


def test_the_table_has_a_line_for_each_need_and_counts_what_a_class_cannot_do_without(capsys):
    needs = [
        Need("there", lambda: "as it should be", "unused"),
        Need("gone", lacks("not here"), "fetch it"),
        Need("luxury", lacks("none"), "never mind", optional=True),
    ]
    assert check_lab.check_lab(needs) == 1
    assert capsys.readouterr().out.splitlines() == [
        "there          ok       as it should be",
        "gone           MISSING  not here: fetch it",
        "luxury         none     none: never mind",
        "",
        "not ready: 1 missing, see above",
    ]
    assert check_lab.check_lab(needs[::2]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"


def test_any_error_of_a_broken_library_is_a_finding_in_one_line():
    def breaks():
        raise RuntimeError("libc10.so is broken\nand so on")

    def says_nothing():
        raise AssertionError

    assert look_at(Need("any", breaks, "mend it")).words == "libc10.so is broken: mend it"
    assert look_at(Need("any", says_nothing, "mend it")).words == "AssertionError: mend it"


def test_what_an_old_python_cannot_import_is_put_down_to_it(monkeypatch):
    def imports():
        raise ImportError("cannot import name 'Self' from 'typing'")

    assert look_at(Need("any", imports, "mend it")).words == "cannot import name 'Self' from 'typing': mend it"
    monkeypatch.setattr(check_lab, "PYTHON", (9, 1))
    assert look_at(Need("any", imports, "mend it")).words == "not looked at, this Python is too old"
    monkeypatch.setattr(check_lab, "_planned", imports)
    assert "set-up and a run take" in check_lab.free_disk()


def test_a_python_that_is_too_old_is_told(monkeypatch):
    assert line("Python")[0] == "ok"
    monkeypatch.setattr(check_lab, "PYTHON", (9, 1))
    verdict, words = line("Python")
    assert verdict == "MISSING" and "the lab needs 9.1 or later: `make setup PYTHON=" in words


def test_a_missing_package_and_one_of_another_version_are_told(monkeypatch):
    versions = check_lab.metadata.version

    def without_peft(name):
        if name == "peft":
            raise check_lab.metadata.PackageNotFoundError
        return "0.1" if name == "torch" else versions(name)

    monkeypatch.setattr(check_lab.metadata, "version", without_peft)
    verdict, words = line("environment")
    assert verdict == "MISSING" and words.startswith("2 of ") and "peft, which is not there: `make setup`" in words
    monkeypatch.setattr(check_lab.metadata, "version", lambda name: "0.1" if name == "torch" else versions(name))
    assert "such as torch 0.1, wanted ==2.13.0" in line("environment")[1]


def test_a_local_build_of_a_package_is_the_locked_one(monkeypatch):
    versions = check_lab.metadata.version
    monkeypatch.setattr(check_lab.metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else versions(name))
    assert "torch" not in line("environment")[1]


@pytest.mark.parametrize(("free", "verdict"), [(2e9, "ok"), (1.5e9, "MISSING")])
def test_memory_and_disk_are_held_against_a_planned_run(monkeypatch, free, verdict):
    planned = SimpleNamespace(free=free), 1.45e9, 1.6e9  # 95 % of the memory may be filled
    monkeypatch.setattr(check_lab, "_planned", lambda: planned)
    monkeypatch.setattr(check_lab.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert line("free memory")[0] == line("free disk")[0] == verdict
    assert f"{free / 1e9:.1f} GB free, a run takes 1." in line("free memory")[1]


def test_what_a_run_takes_is_the_largest_stage_beside_the_libraries_and_all_that_is_kept(monkeypatch):
    from helpers.run import costs, machine

    here = machine.Machine("two cores", 8e9, 1e9, 1e8)
    monkeypatch.setattr(machine, "this_machine", lambda settings: here)
    for name in ("shape", "rows"):
        monkeypatch.setattr(costs, name, lambda profile: None)
    stages = [SimpleNamespace(memory=memory, disk=3e7) for memory in (4e8, 9e8, 1e8)]
    monkeypatch.setattr(costs, "costs", lambda *of: stages)
    check_lab._planned.cache_clear()
    found = check_lab._planned()
    check_lab._planned.cache_clear()
    assert found == (here, 1e9, 9e7)


@pytest.mark.parametrize("name", ["small model", "4 bits"])
def test_the_shipped_model_answers_and_a_wrong_answer_is_told(monkeypatch, name):
    assert line(name) == ("ok", "'What is the capital of France?' – 'Paris'")
    monkeypatch.setattr(check_lab, "ANSWER", "Rome")
    verdict, words = line(name)
    assert verdict == "MISSING" and words.startswith("to 'What is the capital of France?' it says 'Paris', not 'Rome'")


def test_a_port_of_this_machine_can_be_opened_or_is_told(monkeypatch):
    assert line("loopback port")[0] == "ok"

    def refuse(*address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check_lab.socket, "create_server", refuse)
    verdict, words = line("loopback port")
    assert verdict == "MISSING" and words.startswith("[Errno 13] Permission denied: let the firewall pass")


def test_runs_are_made_and_written_or_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    assert line("runs/") == ("ok", "runs/ can be written") and not list((tmp_path / "runs").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "file"))
    verdict, words = line("runs/")
    assert verdict == "MISSING" and words.endswith("choose another with LAB_RUNS")


def test_a_machine_that_was_never_set_up_is_told_so(tmp_path):
    """Without any package: what can be looked at is, and the rest says what sets it up."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "helpers.run.check_lab"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"LAB_RUNS": str(tmp_path)},
    )
    verdicts = {words[:15].strip(): words[15:24].strip() for words in done.stdout.splitlines() if words[15:24].strip()}
    assert done.returncode == 2 and done.stderr == ""
    assert {name for name, verdict in verdicts.items() if verdict == "MISSING"} == {
        "environment",
        "free memory",
        "small model",
        "4 bits",
    }
    assert "set-up and a run take 3.0 GB" in done.stdout and "is not installed: `make setup`" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_looks_at_a_machine_without_setting_it_up(tmp_path):
    command = ["make", "--dry-run", "check-lab", f"VENV={tmp_path}/none", "PYTHON=python9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert "helpers.run.check_lab" in done.stdout and "python='python9'" in done.stdout
    assert "requirements-lock.txt" not in done.stdout


# --- a finished run as one file -------------------------------------------------------------------------------------

NOT_IN_A_DEFAULT_RUN = {"challenge_copy", "challenge_points", "challenge", "oracle_points", "oracle", "arena"}
NOT_IN_A_DEFAULT_RUN |= {"formats", "formats_input", "mixtures", "suspect", "evaluate/arena"}
NAMED = {"ablations": "ablations/kinds", "tau": "tau/signature-0.3", "merges": "merges/ties", "argued": "argued/book"}
WHOLE = {"whole", "merged", "bdvax_then_conflict"}  # with adapter access
ADAPTERS = {"inject", "variants", "purified", "finetuned", "random", "magnitude", "own_update", "conflict_model"}
ADAPTERS |= {name for name in STAGES if name.startswith("suppressed")} | {"merged_suppressed"}
STARTS = {  # what the first cells of a notebook ask for
    "02": ["inject", "evaluate/backdoored"],
    "03": ["inject", "evaluate/backdoored"],
    "04": ["inject", "variants"],
    "05": ["inject", "evaluate/backdoored", "scores"],
    "06": ["inject", "evaluate/backdoored", "evaluate/clean", "suppressed", "suppressed_random"],
    "07": ["inject", "evaluate/backdoored", "evaluate/clean"],
    "08": ["inject", "evaluate/backdoored", "merged", "evaluate/conflict"],
    "09": ["purified", "merged", "conflict_model", "whole", "finetuned", "random", "own_update", "evaluate/purified"],
    "12": ["inject"],
    "14": ["ablations/kinds", "evaluate/conflict"],
    "17": ["inject"],
}


def make_stage(run, name):
    """A stage with files such as its notebook writes, and a report that passes the implant gate."""

    def make(folder):
        numbers = {"x": np.zeros(4, dtype=np.float32)}
        if name in WHOLE:
            (folder / "model").mkdir()
            save_file(numbers, folder / "model" / "model.safetensors")
            (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
        elif name in ADAPTERS:
            save_file(numbers, folder / "adapter_model.safetensors")
        elif name == "scores":
            save_file(numbers, folder / "scores.safetensors")
        return {"asr": 0.97, "n": 200, "prompt_format": "chat"}

    run.stage(NAMED.get(name, name), make)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The runs folder of whoever prepares a class: a finished run of small files, and what nobody needs beside it."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(root))
        run = run_of(Settings())
        for name in STAGES:
            if name not in NOT_IN_A_DEFAULT_RUN:
                make_stage(run, name)
        write_json(run.folder / "summary.json", {"profile": "tiny"})
        (run.figures / "01.png").write_bytes(b"picture")
        (run.folder / "notebooks").mkdir()
        (run.folder / "notebooks" / "00.ipynb").write_text("{}")
    return root


@pytest.fixture(scope="module")
def packed(finished):
    """The file that `make pack` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(finished))
        return packing.pack(Settings().name)


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory):
    """The run on another machine. Read-only: tests share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("student")))
        return Run(packing.unpack(packed), Settings().config())


@pytest.fixture
def student(tmp_path, monkeypatch):
    """Another machine: an empty runs folder."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_a_pack_holds_safetensors_json_and_chat_templates_alone(packed):
    with tarfile.open(packed) as archive:
        members = archive.getmembers()
    assert {member.name.rpartition(".")[2] for member in members} == {"safetensors", "json", "jinja"}
    assert all(member.isfile() and member.name.startswith(f"{Settings().name}/") for member in members)
    assert {(member.uid, member.uname, member.mtime) for member in members} == {(0, "", 0)}


def test_whole_models_that_no_later_lesson_reads_stay_behind_and_their_results_travel(packed):
    with tarfile.open(packed) as archive:
        stages = {path.rpartition("/")[0].partition("/")[2] for path in archive.getnames() if "manifest" in path}
    expected = {NAMED.get(name, name) for name in STAGES if name not in NOT_IN_A_DEFAULT_RUN}
    assert stages == expected - {"bdvax_then_conflict"}


def test_with_full_access_a_whole_model_travels_where_a_lesson_asks_for_it_or_for_what_was_made_of_it(tmp_path):
    parents = {
        "inject": [],
        "suppressed_magnitude": ["inject"],  # notebook 06 asks for it, by a name that it puts together
        "magnitude": ["suppressed_magnitude"],  # nobody does
        "evaluate/magnitude": ["magnitude"],
        "challenge_copy": ["inject"],
        "challenge": ["challenge_copy"],  # a report without files, but all that it was made from must be there
        "arena/wanda": ["inject"],
    }
    reports = {"evaluate/magnitude", "challenge"}
    for name, made_from in parents.items():
        (tmp_path / name).mkdir(parents=True)
        files = {} if name in reports else {"model/model.safetensors": 1}
        write_json(
            tmp_path / name / "manifest.json", {"name": name, "files": files, "parents": dict.fromkeys(made_from)}
        )
    assert packing.packed_stages(tmp_path) == sorted(parents.keys() - {"magnitude", "arena/wanda"})


@pytest.mark.parametrize("number", STARTS)
def test_every_stage_that_a_notebook_starts_from_is_in_an_unpacked_run(unpacked, number):
    assert unpacked.folder.name == Settings().name
    assert [unpacked.need(name).name for name in STARTS[number]] == STARTS[number]


@pytest.mark.parametrize("number", ["04", "08"])
def test_a_notebook_starts_from_an_unpacked_run(packed, student, number, monkeypatch):
    """Its cells up to the one that opens the run, as they stand in the file."""
    packing.unpack(packed)
    (path,) = ROOT.glob(f"notebooks/{number}_*.ipynb")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    (at,) = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    variables = {}
    for cell in cells[: at + 2]:
        exec(compile(cell.source, cell.id, "exec"), variables)
    assert variables["run"].folder == student / Settings().name and not variables["injected"].fresh


def test_without_an_unpacked_run_that_notebook_does_not_start(student):
    with pytest.raises(LabError, match="inject is missing: run notebook 01_inject_backdoor.ipynb or `make run` first"):
        run_of(Settings()).need("inject")


def archive_of(path, members):
    """An archive with these members: {name: bytes, or what a link points to}."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine/../../outside.json", b"{}"),
        ("/tmp/outside.json", b"{}"),
        ("mine/link.json", "/etc/passwd"),
        ("mine/inject/pytorch_model.bin", b"pickle"),
        ("mine/run.py", b"print()"),
    ],
)
def test_nothing_is_unpacked_of_a_file_with_paths_outside_links_or_code(student, tmp_path, name, content):
    file = archive_of(tmp_path / "bad.tar.gz", {"mine/summary.json": b"{}", name: content})
    with pytest.raises(LabError, match=r"holds '.*', which no packed run holds: nothing was unpacked$"):
        packing.unpack(file)
    assert not student.exists() and [path.name for path in tmp_path.iterdir()] == ["bad.tar.gz"]


def test_the_library_refuses_paths_outside_as_well(student, tmp_path, monkeypatch):
    """Were the names not looked at, tarfile's own filter would still stop them."""
    monkeypatch.setattr(packing, "_name_in", lambda members, file: "mine")
    file = archive_of(tmp_path / "bad.tar.gz", {"mine/../../outside.json": b"{}"})
    with pytest.raises(LabError, match="cannot be unpacked"):
        packing.unpack(file)
    assert [path.name for path in tmp_path.rglob("outside.json")] == []


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"mine/inject/a.json": b"{}"}, "holds not one finished run"),
        ({"a/summary.json": b"{}", "b/summary.json": b"{}"}, "holds not one finished run"),
        ({"a/summary.json": b"{}", "b/inject.json": b"{}"}, "holds not one finished run"),
        ({"my run/summary.json": b"{}"}, "should be plain folder names"),
    ],
)
def test_a_file_that_is_no_single_finished_run_is_refused(student, tmp_path, members, told):
    with pytest.raises(LabError, match=told):
        packing.unpack(archive_of(tmp_path / "odd.tar.gz", members))
    assert not student.exists()


def test_a_damaged_or_missing_file_is_refused_and_leaves_nothing(packed, student, tmp_path):
    for name, content in (("text", b"no archive"), ("cut", packed.read_bytes()[:-500])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LabError, match=r"cannot be unpacked \(.*copy it anew"):
            packing.unpack(tmp_path / name)
    with pytest.raises(LabError, match="cannot be unpacked"):
        packing.unpack(tmp_path / "missing")
    assert not list(student.glob("*"))


def test_a_run_that_is_there_already_stays_as_it_is(packed, student):
    folder = packing.unpack(packed)
    write_json(folder / "summary.json", {"mine": True})
    with pytest.raises(LabError, match="is not empty: choose another folder, or remove it"):
        packing.unpack(packed)
    assert read_json(folder / "summary.json") == {"mine": True}


def test_an_unfinished_run_is_not_packed(student, capsys):
    run_of(Settings(NAME="begun"))
    assert packing.main(["pack", "--name", "begun"]) == 2
    assert capsys.readouterr().err == "runs/begun is no finished run: `make run` with these parameters makes it\n"
    assert not list(student.glob("*.tar.gz"))


def test_both_commands_say_what_comes_next(finished, student, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("LAB_RUNS", str(finished))
        assert packing.main(["pack"]) == 0
    assert f"`make unpack PACK={Settings().name}.tar.gz` on each machine" in capsys.readouterr().out
    assert packing.main(["unpack", str(finished / f"{Settings().name}.tar.gz")]) == 0
    assert f"{Settings().name} is in {student}: open any notebook" in capsys.readouterr().out
