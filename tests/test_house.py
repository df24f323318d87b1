"""The rooms of the house: who may know whom, read off the imports."""

import ast

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
    ["adaptive"],
    ["run"],
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


def test_only_whoever_deals_the_rows_names_the_examiners():
    namers = {path.relative_to(HOUSE).as_posix() for path in MODULES if ("data.roles", "TestData") in imports(path)}
    assert namers and all(name.startswith("run/deal/") for name in namers)
