"""The lab on other people's machines: the container's settings are sound, and the cell for Colab does what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import colab
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


@pytest.mark.parametrize("path", colab.notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_lesson_and_sheet_has_the_folded_cell_behind_its_title(path):
    found = nbformat.read(path, as_version=4).cells[1]
    cell = colab.colab_cell(colab.known_address())
    assert (found.source, found.metadata) == (cell.source, cell.metadata), "write it anew: `make colab`"
    assert found.metadata == {"cellView": "form", "jupyter": {"source_hidden": True}} and not found.outputs


def test_lessons_and_sheets_are_all_there():
    names = [path.name for path in colab.notebooks()]
    assert {path.name for path in numbered()} | {"00.ipynb", "09.ipynb"} <= set(names)


def test_the_cell_binds_no_name_that_a_notebook_uses():
    """A stage is known by the statements that made the names it reads; and no constant is taken for a parameter."""
    names = {}
    exec(compile(colab.colab_cell(ADDRESS).source, "colab", "exec"), names)
    assert set(names) - {"__builtins__"} == {"fetch_lab", "repository"} and names["repository"] == ADDRESS
    for path in colab.notebooks():
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert not re.search(r"\b(fetch_lab|repository)\b", "\n".join(cells[1:])), path


def test_a_new_cell_takes_the_first_number_of_an_executed_notebook_and_replaces_an_older_one():
    executed = [new_code_cell(str(i), execution_count=i) for i in (1, 2)]
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), executed[0], new_markdown_cell("x"), executed[1]])
    for address in ("", ADDRESS, ADDRESS):
        colab.put_cell(notebook, address)
        kinds = [(cell.cell_type, cell.get("execution_count")) for cell in notebook.cells]
        assert kinds == [("markdown", None), ("code", 1), ("code", 2), ("markdown", None), ("code", 3)]
    assert [cell.source.count(ADDRESS) for cell in notebook.cells] == [0, 1, 0, 0, 0]
    sheet = new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1")])
    colab.put_cell(sheet, ADDRESS)
    assert [cell.get("execution_count") for cell in sheet.cells] == [None] * 3
    nbformat.validate(notebook)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A citation file without an address, and one notebook."""
    citation, path = tmp_path / "CITATION.cff", tmp_path / "00_any.ipynb"
    citation.write_text("cff-version: 1.2.0\ntitle: x\n")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1")]), path)
    monkeypatch.setattr(colab, "CITATION", citation)
    monkeypatch.setattr(colab, "notebooks", lambda: [path])
    return citation, path


def test_an_address_is_entered_once_and_goes_into_every_notebook(files, capsys):
    citation, path = files
    assert colab.main([]) == 0 and "an address to be typed in" in capsys.readouterr().out
    assert 'repository = ""  # @param {type: "string"}' in path.read_text().replace("\\", "")
    for address in (ADDRESS, "https://example.org/other"):
        assert colab.main(["--address", address]) == 0
        assert citation.read_text() == f"cff-version: 1.2.0\nrepository-code: {address}\ntitle: x\n"
        assert path.read_text().count(address) == 1 and address in capsys.readouterr().out


@pytest.mark.parametrize("address", ["--upload-pack=touch", "http://example.org/a", "https://example.org/a; rm"])
def test_what_is_no_address_is_refused_and_nothing_changes(address, files, capsys):
    before = [path.read_bytes() for path in files]
    assert colab.main([f"--address={address}"]) == 2
    assert "should be an address that git clones" in capsys.readouterr().err
    assert [path.read_bytes() for path in files] == before


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
        "course/on_colab.py": (ROOT / "course" / "on_colab.py").read_text(encoding="utf-8"),
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


def start(machine, on_colab, address=None, **env):
    """What the cell leaves when it runs twice on such a machine: the lines printed, the last one as JSON."""
    cell = machine / "cell.py"
    cell.write_text(colab.colab_cell(f"file://{machine}/origin" if address is None else address).source)
    script = STARTS.format(on_colab=on_colab, cell=str(cell))
    command = [sys.executable, "-c", script]
    nowhere = {"PIP_TARGET": str(machine / "target"), "PIP_NO_INDEX": "1"}  # were it the real one
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(machine), **nowhere, **env}
    done = subprocess.run(command, cwd=machine / "home", capture_output=True, text=True, env=env)
    if done.returncode:
        raise ChildProcessError(done.stderr)
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
def test_on_colab_a_missing_address_is_asked_for(machine):
    with pytest.raises(ChildProcessError, match="type the address of the lab's repository into the field above"):
        start(machine, True, address="")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_anywhere_else_the_cell_does_nothing(machine):
    here = f"{machine}:{machine / 'origin'}"  # where `helpers` is installed already
    lines, folder, package = start(machine, False, PYTHONPATH=here)
    assert (lines, folder) == ([], str(machine / "home"))
    assert package == str(machine / "origin" / "helpers" / "__init__.py")
    assert [path.name for path in (machine / "home").iterdir()] == ["class.tar.gz"]
    assert not (machine / "pip" / "__main__.py.log").exists()
