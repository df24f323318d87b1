"""The lab on other people's machines: the container's settings are sound, and the cell for Colab does what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest

from course import colab
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.run.execution import numbered

ADDRESS = "https://example.org/someone/lab"

# --- the container --------------------------------------------------------------------------------------------------


@pytest.fixture
def container():
    return json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_commands_of_the_container_are_targets_of_the_makefile(container):
    commands = [command for key, command in container.items() if key.endswith("Command")]
    assert commands
    targets = set(re.search(r"^\.PHONY: (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "make" and {word for word in words if "=" not in word} <= targets
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_container_has_a_python_that_the_lab_takes_and_the_port_of_jupyterlab(container):
    version = re.search(r"/python:(\d+)\.(\d+)", container["image"])
    assert (int(version[1]), int(version[2])) >= (3, 11)
    assert container["forwardPorts"] == [8888]  # where `make lab` listens unless it is taken
    assert container["portsAttributes"].keys() == {"8888"}
    python = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python == "${containerWorkspaceFolder}/.venv/bin/python"


# --- Colab ----------------------------------------------------------------------------------------------------------


def test_all_copies_begin_with_the_same_folded_cell_and_change_nothing_else(tmp_path):
    copies = colab.write_copies(ADDRESS, tmp_path / "copies")
    assert [path.name for path in copies] == [path.name for path in numbered()]
    found = []
    for copy, original in zip(copies, numbered(), strict=True):
        notebook, before = (nbformat.read(path, as_version=4) for path in (copy, original))
        found.append(notebook.cells.pop(1))
        assert notebook == before and "google.colab" not in nbformat.writes(before)
        nbformat.validate(nbformat.read(copy, as_version=4))
    assert all(cell == found[0] for cell in found)
    assert found[0].metadata == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert found[0].source.count(ADDRESS) == 1 and "\n\nfetch_lab('https://" in found[0].source


def test_the_cell_binds_no_name_that_a_notebook_uses():
    """A stage is known by the statements that made the names it reads; and no constant is taken for a parameter."""
    names = {}
    exec(compile(colab.colab_cell(ADDRESS).source, "colab", "exec"), names)
    assert set(names) - {"__builtins__"} == {"fetch_lab"}
    assert not any("fetch_lab" in path.read_text(encoding="utf-8") for path in numbered())


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "the repository's address is not known: say ADDRESS=https://"),
        ("--upload-pack=touch", "should be an address that git clones"),
        ("http://example.org/a", "should be an address that git clones"),
        ("https://example.org/a; rm", "should be an address that git clones"),
    ],
)
def test_an_address_that_is_missing_or_none_is_refused(address, told, tmp_path):
    with pytest.raises(LabError, match=re.escape(told)):
        colab.write_copies(address, tmp_path / "copies")
    assert not list(tmp_path.iterdir())


def test_the_address_comes_from_the_citation_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(colab, "CITATION", tmp_path / "CITATION.cff")
    (tmp_path / "CITATION.cff").write_text(f"repository-code: {ADDRESS}\n")
    monkeypatch.setattr(colab, "write_copies", lambda address: [address])
    assert colab.main([]) == 0 and capsys.readouterr().out == f"{ADDRESS}\n"
    assert colab.main(["--address", "https://example.org/other"]) == 0
    assert capsys.readouterr().out == "https://example.org/other\n"


PIP = "import json, sys\nprint(json.dumps(sys.argv[1:]), file=open(sys.argv[0] + '.log', 'a'))\n"
STARTS = """
import json, os, sys, types
if {on_colab}:
    sys.modules["google.colab"] = types.ModuleType("google.colab")
for _ in range(2):  # whoever runs all cells again
    exec(compile(open({cell!r}).read(), "cell", "exec"), {{}})
import helpers
print(json.dumps([os.getcwd(), helpers.__file__]))
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with a repository, a `pip` that only notes what it is asked, and an empty home with a packed run."""
    lab = tmp_path / "origin"
    for name, text in {
        "requirements-lock.txt": "",
        "notebooks/00_any.ipynb": "{}",
        "helpers/__init__.py": "",
        "helpers/run/__init__.py": "",
        "helpers/run/packing.py": "import sys; print(*sys.argv[1:])",
    }.items():
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).write_text(text)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=lab, check=True)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # a package hides the real one
    (tmp_path / "pip" / "__main__.py").write_text(PIP)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "class.tar.gz").touch()
    return tmp_path


def start(machine, on_colab, **env):
    """What the cell leaves when it runs twice on such a machine: the lines printed, the last one as JSON."""
    cell = machine / "cell.py"
    cell.write_text(colab.colab_cell(f"file://{machine}/origin").source)
    script = STARTS.format(on_colab=on_colab, cell=str(cell))
    command = [sys.executable, "-c", script]
    nowhere = {"PIP_TARGET": str(machine / "target"), "PIP_NO_INDEX": "1"}  # were it the real one
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(machine), **nowhere, **env}
    done = subprocess.run(command, cwd=machine / "home", capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, *json.loads(last)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_on_colab_the_cell_clones_installs_unpacks_and_changes_into_the_clone(machine):
    lines, folder, package = start(machine, True)
    clone = machine / "home" / "lab"
    assert folder == str(clone / "notebooks") and package == str(clone / "helpers" / "__init__.py")
    asked = [json.loads(line) for line in (machine / "pip" / "__main__.py.log").read_text().splitlines()]
    assert asked == [
        ["install", "--quiet", "-r", str(clone / "requirements-lock.txt")],
        ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(clone)],
    ]
    assert lines == [f"unpack {machine / 'home' / 'class.tar.gz'}"]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_anywhere_else_the_cell_does_nothing(machine):
    here = f"{machine}:{machine / 'origin'}"  # where `helpers` is installed already
    lines, folder, package = start(machine, False, PYTHONPATH=here)
    assert (lines, folder) == ([], str(machine / "home"))
    assert package == str(machine / "origin" / "helpers" / "__init__.py")
    assert [path.name for path in (machine / "home").iterdir()] == ["class.tar.gz"]
    assert not (machine / "pip" / "__main__.py.log").exists()
