"""The rooms of the house: who may know whom, read off the imports."""

import ast
import re

import pytest

from helpers.core.paths import ROOT

HOUSE = ROOT / "helpers"
# from the ground up; rooms on one floor do not know each other
FLOORS = [
    ["core"],
    ["plots", "data"],
    ["model"],
    ["access"],
    ["train"],
    ["measure"],
    ["attacks", "defenses"],
    ["adaptive", "oracles"],
    ["run"],
    ["purify"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def imports(path):
    """What a module imports of the house, as ("data.roles", "TestData") for each name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("helpers") for alias in node.names), f"{path}: from helpers… import …"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            found += [(".".join(node.module.split(".")[1:]), alias.name) for alias in node.names]
    return found


def room_of(path):
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(HOUSE.rglob("*.py")) if path != HOUSE / "__init__.py"]


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_a_room_knows_itself_and_the_floors_below(path):
    room = room_of(path)
    known = {(module or name).split(".")[0] for module, name in imports(path)}
    assert [other for other in known if other != room and FLOOR[other] >= FLOOR[room]] == []


def test_a_defense_sees_neither_the_attack_nor_its_test():
    """The rows that planted the backdoor and those that measure it have a type each, which no defense can name."""
    seen = {name for path in (HOUSE / "defenses").rglob("*.py") for _, name in imports(path)}
    assert "DefenderData" in seen and not seen & {"TestData", "RunData", "deal"}


def test_only_whoever_deals_the_rows_and_oracles_name_the_examiners():
    namers = {path.relative_to(HOUSE).as_posix() for path in MODULES if ("data.roles", "TestData") in imports(path)}
    assert namers and all(name.startswith(("run/deal/", "oracles/")) for name in namers)


MOST_LINES = 350
HEADS = r"(?:Args|Returns|Raises|Yields)(?:(?:,| and) [\w ,]+)?|Differs from [^:\n]*"
CROWDED = re.compile(rf"(?<=\S)\n({HEADS}):$", re.MULTILINE)
HEADING = re.compile(rf"^\s*({HEADS}):[ \t]*\S", re.MULTILINE)


def functions(body, owner=""):
    """The public functions of a module and the methods of its public classes, as (name, node)."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") or node.name.endswith("__"):
                yield owner + node.name, node


def unannotated(node, method):
    """The arguments of a function, and "return", that have no type."""
    parts = node.args
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    named = [*parts.posonlyargs, *parts.args][1 if method and not static else 0 :] + parts.kwonlyargs
    rest = [] if method else filter(None, (parts.vararg, parts.kwarg))  # a method may hand a library's on
    missing = [argument.arg for argument in (*named, *rest) if argument.annotation is None]
    return missing + ["return"] * (node.returns is None and node.name != "__init__")


def flaws(source):
    """What a module's public functions lack, and headings of docstrings that do not stand alone, a line for each."""
    tree, found = ast.parse(source), []
    for name, node in functions(tree.body):
        found += [f"{name}: no type for {argument}" for argument in unannotated(node, "." in name)]
        if not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"{name}: no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            headings = HEADING.findall(ast.get_docstring(node) or "")
            found += [f"{getattr(node, 'name', 'module')}: text behind '{heading}:'" for heading in headings]
            crowded = CROWDED.findall(ast.get_docstring(node) or "")
            found += [f"{getattr(node, 'name', 'module')}: no empty line before '{heading}:'" for heading in crowded]
    return found


FLAWED = '''
def bare(x, *rest, key=1, **options): "Says what."
class Thing:
    def __init__(self, size, *args): ...
    def mute(self) -> int: ...
    @staticmethod
    def free(x) -> int: "Says what."
    def _private(self, x):
        """Args and Raises: x.

        Returns nothing: a sentence may have a colon.
        Differs from the paper: in all.
        """
class _Private:
    def hidden(self, x): ...
def good(x: int) -> int:
    """Says what.

    Args:
        x: a number.

    Returns:
        another one.
    """
    def inner(x): ...
def crowded() -> int:
    """Says what.
    Returns:
        one.
    """
'''


def test_flaws_are_found():
    assert flaws(FLAWED) == [
        *(f"bare: no type for {argument}" for argument in ("x", "key", "rest", "options", "return")),
        "Thing.__init__: no type for size",
        "Thing.mute: no docstring",
        "Thing.free: no type for x",
        "crowded: no empty line before 'Returns:'",
        "_private: text behind 'Args and Raises:'",
        "_private: text behind 'Differs from the paper:'",
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_public_functions_have_types_and_docstrings_whose_headings_stand_alone(path):
    assert flaws(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_no_module_grows_too_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    too_long = lines > MOST_LINES
    assert not too_long, f"{path.relative_to(ROOT)} has {lines} lines, at most {MOST_LINES}: split it"
