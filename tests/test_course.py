"""The course: solutions are right, wrong answers get their message, sheets are current and give nothing away."""

import ast
import re
import time
import tomllib

import nbformat
import pytest
from setuptools import find_namespace_packages
from test_house import flaws

from course import check
from course.build import SHEETS, SOLUTIONS, source_of
from course.checking import EXERCISES, LEVELS, judge, lessons, load_exercises
from course.comparing import difference
from course.sources import METADATA, make_sheet, make_solutions, read_cells, solution_statements, stubbed
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.run.execution import numbered

load_exercises(lessons())

MOST_SECONDS = 0.5
STALE = "it is not what its source makes: run `make course`"

every_lesson = pytest.mark.parametrize("lesson", lessons())
every_exercise = pytest.mark.parametrize("number", sorted(EXERCISES))
every_wrong_answer = pytest.mark.parametrize(
    ("number", "wrong"),
    [pytest.param(n, w, id=f"{n}-{w.answer.__name__}") for n, e in sorted(EXERCISES.items()) for w in e.wrong],
)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def run_cells(notebook, capsys):
    """What the cells of a notebook print, run in one namespace."""
    names = {}
    for cell in code_of(notebook):
        exec(compile(cell.source, cell.id, "exec"), names)
    return capsys.readouterr().out


def on_disk(folder, lesson):
    return nbformat.read(folder / f"{lesson}.ipynb", as_version=4)


# --- exercises ----------------------------------------------------------------------------------------------------


def test_there_are_exercises():
    assert len(EXERCISES) >= 2 * len(lessons()) > 0


def test_a_result_of_another_form_is_told_as_one():
    verdict = judge("01.1", lambda rows, *_: [prompt for prompt, _ in rows])
    assert not verdict.right and "a result of another form than asked for: got " in verdict.text


@every_exercise
def test_the_solution_passes_on_several_seeds_and_quickly(number):
    for seed in range(3):
        start = time.process_time()
        verdict = judge(number, EXERCISES[number].solution, seed)
        assert verdict.text == f"{number}: {verdict.total} of {verdict.total}, all right"
        assert seed == 0 or time.process_time() - start < MOST_SECONDS  # the first call pays for imports


@every_wrong_answer
def test_a_typical_wrong_answer_gets_its_message(number, wrong):
    verdict = judge(number, wrong.answer)
    assert not verdict.right and wrong.message in verdict.text


@every_exercise
def test_an_exercise_is_complete(number):
    task = EXERCISES[number]
    assert len(task.wrong) >= 3 and task.level in LEVELS and task.minutes % 5 == 0
    wanted = list(task.solution.__annotations__)
    assert "return" in wanted and all(f"{name}:" in task.solution.__doc__ for name in wanted if name != "return")
    assert "Returns:" in task.solution.__doc__


# --- what a student reads -------------------------------------------------------------------------------------------


def verdict_on(answer):
    return judge("04.3", answer).text


def test_a_missing_return_an_exception_and_a_changed_argument_are_told():
    def forgets(one, other):
        assert len(one) == len(other)

    def divides(one, other):
        return one[0] / 0

    def sorts(one, other):
        rho = EXERCISES["04.3"].solution(one, other)
        one[0] = 17.0
        return rho

    assert "it returned None: is there a `return` on every path?" in verdict_on(forgets)
    assert "ZeroDivisionError in `return one[0] / 0`: " in verdict_on(divides)
    assert "the result is right, but argument 1 was changed on the way: work on a copy" in verdict_on(sorts)
    assert "got      [1, 2] (list)" not in verdict_on(lambda one, other: 0.5)
    assert "A likely mistake" not in verdict_on(lambda one, other: 0.123)


def test_an_unknown_exercise_or_a_result_instead_of_a_function_is_refused_in_one_line():
    with pytest.raises(LabError, match=r"^there is no exercise '04\.9'; did you mean '04\.\d'\?$"):
        check("04.9", len)
    with pytest.raises(
        LabError, match=r'^check\("04\.3", …\) got 0\.5: hand over the function itself, not its result$'
    ):
        check("04.3", 0.5)


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ([1, 2], [1, 2], None),
        ((1.0, 2.0 + 1e-9), [1.0, 2.0], None),
        ({"a": 1}, {"a": 1.0}, None),
        ({"a": 1}, {"b": 1}, "keys that are missing: 'b'; keys that should not be there: 'a'"),
        ({"a": [1, 3]}, {"a": [1, 2]}, "at 'a': expected [1, 2]\n  got      [1, 3]"),
        ([[1.0, 2.0]], [[1.0, 2.0]], None),
        ([1, 2, 3], [1, 2], "expected shape [2], got [3]"),
        ("yes", True, "expected True\n  got      'yes'"),
        (1, True, "expected True\n  got      1"),
        ("Yes", "yes", "expected 'yes'\n  got      'Yes'"),
        ({1, 2}, {1, 2}, None),
        ([0, 1], [False, True], "expected a mask of True and False, got numbers"),
        (float("nan"), 1.0, "expected 1\n  got      nan"),
        (["a", 2], ["a", 3], "expected ['a', 3]\n  got      ['a', 2]"),
        (None, 3.0, "expected 3\n  got      None (NoneType)"),
    ],
)
def test_differences_are_told(found, expected, told):
    assert (difference(found, expected) or "").startswith(told or "") and bool(difference(found, expected)) == bool(
        told
    )


# --- notebooks ----------------------------------------------------------------------------------------------------


@every_lesson
def test_the_sheet_is_what_its_source_makes(lesson):
    made = nbformat.writes(make_sheet(lesson, source_of(lesson)))
    assert (SHEETS / f"{lesson}.ipynb").read_text(encoding="utf-8") == made + "\n", STALE


@every_lesson
def test_the_solutions_are_what_their_source_makes_and_were_executed(lesson, capsys):
    stored, made = on_disk(SOLUTIONS, lesson), make_solutions(lesson, source_of(lesson))
    assert stored.metadata == METADATA
    assert [c.source for c in stored.cells] == [c.source for c in made.cells], STALE
    assert [cell.execution_count for cell in code_of(stored)] == list(range(1, len(code_of(stored)) + 1)), STALE
    printed = "".join(output["text"] for cell in code_of(stored) for output in cell.outputs)
    assert printed == run_cells(made, capsys), STALE


@every_lesson
def test_an_untouched_sheet_says_not_done_yet(lesson, capsys):
    numbers = [number for number in sorted(EXERCISES) if number.startswith(lesson)]
    printed = run_cells(on_disk(SHEETS, lesson), capsys)
    assert printed.splitlines() == [f"{number}: not done yet" for number in numbers]


@every_lesson
def test_a_sheet_gives_nothing_away(lesson):
    sheet, source = on_disk(SHEETS, lesson), source_of(lesson)
    secret = set(solution_statements(source))
    shown = {
        ast.dump(node)
        for cell in code_of(sheet)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.stmt)
    }
    hidden = {
        node.name
        for cell in read_cells(source)
        if cell.tag == "hidden"
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    text = nbformat.writes(sheet)
    assert secret and not secret & shown
    assert hidden and not [name for name in hidden if f"'{name}'" in "".join(shown)]  # as a name, not as a word
    assert "SOLUTION" not in text and not any(cell.outputs for cell in code_of(sheet))


@every_lesson
def test_a_lesson_links_to_its_sheet_and_the_sheet_back(lesson):
    sheet, (notebook,) = on_disk(SHEETS, lesson), ROOT.glob(f"notebooks/{lesson}_*.ipynb")
    assert f"](../../notebooks/{notebook.name})" in prose_of(sheet) + prose_of(on_disk(SOLUTIONS, lesson))
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose_of(sheet) + prose_of(on_disk(SOLUTIONS, lesson)))
    assert links and all((SHEETS / link).exists() for link in links)
    assert f"](../course/sheets/{lesson}.ipynb)" in prose_of(nbformat.read(notebook, as_version=4))


@pytest.mark.parametrize("lesson", ["11", "12", "13"])
def test_other_studies_link_to_the_sheet_of_all_four(lesson):
    (notebook,) = ROOT.glob(f"notebooks/{lesson}_*.ipynb")
    assert "](../course/sheets/10.ipynb)" in prose_of(nbformat.read(notebook, as_version=4))


@pytest.mark.parametrize("path", numbered(), ids=lambda path: path.stem)
def test_a_prediction_has_a_cell_to_write_it_in_and_is_told_beside_the_result(path):
    """`guess = None` right below it, then a cell that asks whether there is a guess."""
    cells = nbformat.read(path, as_version=4).cells
    asked = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict:**" in cell.source]
    assert asked
    for i in asked:
        below, *later = [ast.parse(cell.source) for cell in cells[i + 1 :] if cell.cell_type == "code"]
        assert cells[i + 1].cell_type == "code" and guesses(below), cells[i].source
        for name in guesses(below):
            assert any(name in printed_if_there(cell) for cell in later), f"{name} is compared with nothing"


def guesses(cell):
    """The names that a cell leaves open: it assigns None, or a collection of it."""
    open_ones = [s for s in cell.body if isinstance(s, ast.Assign) and "None" in ast.unparse(s.value)]
    return {name.id for s in open_ones for name in ast.walk(s.targets[0]) if isinstance(name, ast.Name)}


def printed_if_there(cell):
    """The names in those statements of a cell that ask whether something is not None."""
    asking = [statement for statement in cell.body if "is not None" in ast.unparse(statement)]
    return {name.id for statement in asking for name in ast.walk(statement) if isinstance(name, ast.Name)}


def test_a_guess_that_is_forgotten_is_found():
    assert guesses(ast.parse("a, b = None, None  # yours\nc = {'x': None}")) == {"a", "b", "c"}
    assert guesses(ast.parse("d = 3\nprint(1)")) == set()
    cell = ast.parse("print(a)\nfor x in c.items():\n    if x is not None:\n        print(x, b)")
    assert {"b", "c"} <= printed_if_there(cell) and "a" not in printed_if_there(cell)


def test_solutions_are_cut_and_found():
    code = "def f(x):\n    'Doc.'\n    ### BEGIN SOLUTION\n    y = x + 1\n    return y\n    ### END SOLUTION"
    assert stubbed(code) == "def f(x):\n    'Doc.'\n    raise NotImplementedError  # your code, instead of this line"
    assert set(solution_statements(f"# %%\n{code}\n")) == {ast.dump(n) for n in ast.parse("y = x + 1").body} | {
        ast.dump(ast.parse("def f():\n    return y").body[0].body[0])
    }


def test_cells_are_read_with_their_kind_and_tag():
    text = '"""Doc."""\n\n# %% [markdown] tags=["hint"]\n# # Title\n#\n# text\n\n# %%\nx = 1\n# no mark\n'
    assert [(c.source, c.prose, c.tag) for c in read_cells(text)] == [
        ("# Title\n\ntext", True, "hint"),
        ("x = 1\n# no mark", False, ""),
    ]


# --- the package --------------------------------------------------------------------------------------------------


def test_an_editable_install_finds_the_course():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = find_namespace_packages(ROOT, include=settings["packages"]["find"]["include"])
    assert {"course", "course.exercises", "helpers"} <= set(found)


@pytest.mark.parametrize("path", sorted((ROOT / "course").glob("*.py")), ids=lambda path: path.stem)
def test_public_functions_of_the_course_have_types_and_docstrings(path):
    assert flaws(path.read_text(encoding="utf-8")) == []
