"""The notebooks as files: parameters, stored outputs, pictures, links; and what a wrong start of one says.

Most readers see a notebook's stored output and nothing else. It must therefore come from one run of all its cells in
their order, describe its pictures, and hold no trace of the machine it was made on. No notebook is named here: the
tests look at every numbered one.
"""

import ast
import functools
import json
import re
import statistics
from html.parser import HTMLParser

import nbformat
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from helpers.core.paths import ROOT
from helpers.core.settings import Settings

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
PARAMETER_FILES = sorted(FOLDER.glob("parameters/*.yaml"))
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
REFRESH = "its outputs are missing or stale: run `make execute`"
LARGEST = 600_000  # bytes; beyond that a notebook is slow to load on the web
LONGEST_MEDIAN = 12  # lines of a code cell
ABSOLUTE = re.compile(r"(?<![\w:/.])/(?:home|root|work|tmp|Users|mnt|opt|var|private)/[\w.-]+|\b[A-Z]:\\\w+")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)[^)]*\)")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@functools.cache
def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path):
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def derived_cell(path):
    """The code cell right behind the parameters."""
    cells = code_cells(path)
    return cells[[is_parameters(cell) for cell in cells].index(True) + 1]


def test_there_are_notebooks_and_parameter_files():
    assert NOTEBOOKS and PARAMETER_FILES  # else the tests below would pass on nothing
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(len(NOTEBOOKS))]


# --- parameters ---------------------------------------------------------------------------------------------------


@every_notebook
def test_one_cell_holds_the_parameters_as_literals_with_their_defaults(path):
    (cell,) = filter(is_parameters, read(path).cells)
    declared, types = {}, {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign), f"not `NAME: type = value`: {ast.unparse(node)}"
        declared[node.target.id] = ast.literal_eval(node.value)
        types[node.target.id] = node.annotation.id
    assert declared == DEFAULTS and list(declared) == list(DEFAULTS)
    assert types == {name: type(value).__name__ for name, value in DEFAULTS.items()}
    assert all("  # " in line for line in cell.source.splitlines()), "a parameter lacks its comment"


@every_notebook
def test_the_next_code_cell_checks_them_first(path):
    first = ast.parse(derived_cell(path).source).body[0]
    assert ast.unparse(first) == "settings = Settings.from_notebook(globals())"


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_a_parameter_file_holds_valid_parameters_and_says_what_for(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert text.startswith("# ") and values
    if "DATA" in values:  # the reader's own folder
        values["DATA"] = str(tmp_path)
    assert Settings.checked(values).name


# --- stored outputs -----------------------------------------------------------------------------------------------


@every_notebook
def test_every_cell_has_run_once_and_in_order(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), REFRESH


@every_notebook
def test_what_a_cell_prints_is_stored(path):
    for cell in code_cells(path):
        calls = [node.value for node in ast.parse(cell.source).body if isinstance(node, ast.Expr)]
        prints = any(ast.unparse(call).startswith("print(") for call in calls)
        stored = any(output.get("name") == "stdout" for output in cell.outputs)
        assert stored or not prints, f"{REFRESH}; first line: {cell.source.splitlines()[0]}"


@every_notebook
def test_nothing_failed_or_wrote_to_stderr(path):
    assert outputs(path), REFRESH
    for output in outputs(path):
        assert output.output_type != "error", f"{output.get('ename')}: {output.get('evalue')}"
        assert output.get("name") != "stderr", output.get("text")


class Pictures(HTMLParser):
    """The alternative texts of the images in a piece of HTML, and the captions of its figures."""

    def __init__(self, html):
        super().__init__()
        self.alts, self.captions, self.in_caption = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.alts.append(dict(attributes).get("alt") or "")
        if tag == "figcaption":
            self.captions.append("")
            self.in_caption = True

    def handle_endtag(self, tag):
        self.in_caption = self.in_caption and tag != "figcaption"

    def handle_data(self, text):
        if self.in_caption:
            self.captions[-1] += text


def undescribed(output):
    """What an output lacks for readers who cannot see its pictures, or who see nothing else: a line for each lack."""
    data = output.get("data", {})
    lacks = [f"{kind} has no place for a description" for kind in data if kind.startswith("image/")]
    shown = Pictures(data.get("text/html", ""))
    lacks += [f"an image without a description: {alt!r}" for alt in shown.alts if len(alt.split()) < 4]
    lacks += [f"a short caption: {caption!r}" for caption in shown.captions if len(caption.split()) < 5]
    return lacks + ["an image without a caption"] * (len(shown.alts) - len(shown.captions))


@every_notebook
def test_every_picture_has_an_alternative_text(path):
    assert [lack for output in outputs(path) for lack in undescribed(output)] == []


def test_undescribed_pictures_are_found():
    image, caption = '<img src="x" alt="{}">', "<figcaption>{}</figcaption>"
    good = image.format("bars of four models") + caption.format("Lower is better, and utility higher.")

    def lacks(html):
        return undescribed({"data": {"text/html": html}})

    assert lacks(good) == lacks("<table></table>") == undescribed({"name": "stdout", "text": "<img>"}) == []
    assert undescribed({"data": {"image/png": "", "text/html": good}}) == ["image/png has no place for a description"]
    assert lacks(good.replace(" models", "")) == ["an image without a description: 'bars of four'"]
    assert lacks(good.replace(' alt="bars of four models"', "")) == ["an image without a description: ''"]
    assert lacks(image.format("bars of four models") + caption.format("CAPTION")) == ["a short caption: 'CAPTION'"]
    assert lacks(good + image.format("one more of them")) == ["an image without a caption"]


@every_notebook
def test_stored_form_is_the_same_on_every_machine(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not {"widgets", "papermill"} & notebook.metadata.keys()
    assert not {key for cell in notebook.cells for key in cell.metadata} & {"papermill", "execution"}
    kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]


@every_notebook
def test_no_absolute_path_stands_in_text_or_output(path):
    texts = [cell.source for cell in read(path).cells]
    for output in outputs(path):
        shown = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
        texts.append(json.dumps([output.get("text", ""), shown, output.get("traceback", "")]))
    assert [found[0] for text in texts for found in ABSOLUTE.finditer(text)] == []


@every_notebook
def test_it_is_small(path):
    assert path.stat().st_size <= LARGEST
    own = [cell for cell in code_cells(path) if cell.id != "colab"]  # folded, and the same everywhere
    lengths = [len(cell.source.splitlines()) for cell in own]
    assert statistics.median(lengths) <= LONGEST_MEDIAN


# --- prose --------------------------------------------------------------------------------------------------------


@every_notebook
def test_it_asks_for_predictions_and_sets_exercises(path):
    words = prose(path).lower()
    assert "**predict" in words and "## exercise" in words


@every_notebook
def test_links_lead_somewhere_and_on_to_the_next_notebook(path):
    links = set(LINK.findall(prose(path)))
    assert [link for link in links if not (path.parent / link).exists()] == []
    later = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :]
    assert not later or later[0].name in links


# --- a wrong start ------------------------------------------------------------------------------------------------


def refusal(number, parameters, tmp_path, monkeypatch):
    """How a notebook, run by plain papermill with an empty runs folder, refuses to go on."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    with pytest.raises(PapermillExecutionError) as refused:
        papermill.execute_notebook(
            path,
            tmp_path / "executed.ipynb",
            parameters,
            kernel_name="python3",
            cwd=FOLDER,
            progress_bar=False,
            execution_timeout=300,
            extra_arguments=["--log-level=50"],
        )
    assert refused.value.ename == "LabError"
    assert refused.value.source == derived_cell(path).source, "it was refused too late"
    return refused.value.evalue


def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path, monkeypatch):
    assert refusal("00", {"SEDE": 3}, tmp_path, monkeypatch) == "unknown parameter 'SEDE'; did you mean 'SEED'?"
    assert not (tmp_path / "runs").exists()


def test_a_missing_stage_names_the_notebook_that_makes_it(tmp_path, monkeypatch):
    message = refusal("02", {"NAME": "mine"}, tmp_path, monkeypatch)
    assert message == "runs/mine/inject is missing: run notebook 01_inject_backdoor.ipynb or `make run` first"
