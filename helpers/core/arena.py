"""The rows of the arena (`data/arena.yaml`): defenses with their numbers, all tried on one suspicious model.

DEFENSE names those of a run: rows of that file, installed defenses, or a file of one's own, with a defense in Python or
with further rows in YAML. Nothing is imported here, so a misspelled name is told before anything that computes is
loaded.
"""

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from helpers.core.choices import DEFENSES
from helpers.core.errors import LabError, nearest
from helpers.core.names import ACCESSES
from helpers.core.paths import ROOT, existing, fingerprint
from helpers.core.yaml_files import read_yaml

ARENA = ROOT / "data" / "arena.yaml"
ALL, QUICK = "all", "quick"  # as DEFENSE: every row, or the few that cost next to nothing
GROUP = "backdoor_lab.defenses"  # the entry points of packages that bring a defense along
PYTHON, YAML = ".py", (".yaml", ".yml")
REFUSED = "refused"  # in the result of a row's stage: why its defense does not apply
MISSING = "missing"  # beside it: whether that is for want of something which this machine may have another time


@dataclass(frozen=True)
class ArenaRow:
    """One row: a defense, and what it is called with beside the model and the rows.

    Args:
        name: of its stage, `arena/<name>`.
        by: the defense: a name that `find_defense` knows, or a file of the reader's own.
        title: as tables show it.
        numbers: its keyword parameters that are not to have their default; a mapping {access: value} gives each access
            its own.
    """

    name: str
    by: str
    title: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def definition(self) -> dict[str, Any]:
        """What its result depends on, JSON-able; the title is not of it."""
        own = {"file": fingerprint(Path(self.by))} if self.by.endswith(PYTHON) else {}
        return {"by": self.by, "numbers": dict(self.numbers), **own}

    def numbers_with(self, access: str) -> dict[str, Any]:
        """The numbers as they are with an access, "adapter" or "full"."""
        return {name: value[access] if isinstance(value, Mapping) else value for name, value in self.numbers.items()}


def chosen_rows(wanted: str) -> list[ArenaRow]:
    """The rows that DEFENSE stands for, each once, those of the file in its order.

    Args:
        wanted: names of rows, installed defenses and files with commas between them, "all" or "quick"; empty means
            "quick". A YAML file stands for all its rows.

    Raises:
        LabError: an unknown name, a file that is not there, or as `known_rows`.
    """
    known, quick = known_rows()
    names: dict[str, ArenaRow] = {}
    for word in (part.strip() for part in (wanted or QUICK).split(",")):
        if word in (ALL, QUICK):
            names |= {name: known[name] for name in (known if word == ALL else quick)}
        elif word.endswith(PYTHON):
            row = _own_row(word)
            if row.name in known:
                raise LabError(f"DEFENSE = '{word}' has the name of a row of {ARENA.name}: rename the file")
            names |= _first_of_its_name(names, {row.name: row})
        elif word.endswith(YAML):
            own = _own_rows(word)
            if twice := known.keys() & own.keys():
                raise LabError(f"DEFENSE = '{word}': '{min(twice)}' is the name of a row of {ARENA.name}: rename it")
            names |= _first_of_its_name(names, own)
        elif word in known:
            names[word] = known[word]
        else:
            raise LabError(f"unknown DEFENSE = '{word}'{nearest(word, [ALL, QUICK, *known])}")
    return sorted(names.values(), key=lambda row: [*known, *names].index(row.name))


def _first_of_its_name(names: Mapping[str, ArenaRow], own: dict[str, ArenaRow]) -> dict[str, ArenaRow]:
    """Rows of the reader's own, none of which has the name of another one before it."""
    for name, row in own.items():
        if names.get(name, row) != row:
            raise LabError(f"DEFENSE has two rows of the name '{name}', by {names[name].by} and {row.by}: rename one")
    return own


def located(wanted: str) -> str:
    """DEFENSE with the absolute paths of its files: notebooks run elsewhere than the shell that named them."""
    words = [part.strip() for part in wanted.split(",")]
    return ",".join(existing(word) if word.endswith((PYTHON, *YAML)) else word for word in words)


def title_of(name: str) -> str:
    """What tables call a row; a file of the reader's own goes by its name."""
    row = known_rows()[0].get(name)
    return row.title if row else _plain(name)


def known_rows() -> tuple[dict[str, ArenaRow], list[str]]:
    """Every row of `data/arena.yaml` and every installed defense.

    Returns:
        ({name: row} in the order of the table, installed defenses first; the names of the quick ones).

    Raises:
        LabError: a file that is no YAML, a row that is no mapping, names no defense or an unknown one, or a quick row
            that is not there.
    """
    values = read_yaml(ARENA, "`quick:` and `rows:`")
    rows = _rows_of(ARENA, values)
    if not isinstance(values.get(QUICK), list):
        raise LabError(f"{ARENA.name}: expected `quick:` with a list of names")
    if unknown := [name for name in values[QUICK] if name not in rows]:
        raise LabError(f"{ARENA.name}: quick names '{unknown[0]}', which is no row{nearest(str(unknown[0]), rows)}")
    installed = {name: ArenaRow(name, name, _plain(name)) for name in installed_defenses()}
    return installed | rows, values[QUICK]


@functools.cache
def installed_defenses() -> dict[str, EntryPoint]:
    """The defenses that installed packages bring along, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _rows_of(path: Path, values: Mapping[str, Any]) -> dict[str, ArenaRow]:
    """What a file holds as `rows`, by name."""
    if not isinstance(values.get("rows"), dict):
        raise LabError(f"{path.name}: expected `rows:` with an entry for each name")
    defenses = {*DEFENSES.modules(), *installed_defenses()}
    return {name: _row(path, name, fields, defenses) for name, fields in values["rows"].items()}


def _row(path: Path, name: Any, fields: Any, defenses: Collection[str]) -> ArenaRow:
    """One entry of a file, checked as far as it can be without importing the defense."""
    where = f"{path.name}: '{name}'"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in (ALL, QUICK):
        raise LabError(f"{where} should be a name of letters, digits and underscores other than '{ALL}' and '{QUICK}'")
    keys = ("by", "title") if path == ARENA else ("by",)  # rows of one's own go by their names
    if not isinstance(fields, dict) or not all(isinstance(fields.get(key), str) for key in keys):
        titled = "`title: a text` and " if "title" in keys else "and perhaps "
        raise LabError(f"{where} should hold `by: a defense`, {titled}numbers of the defense")
    if fields["by"] not in defenses:
        raise LabError(f"{where}: by = '{fields['by']}' is unknown{nearest(fields['by'], defenses)}")
    numbers = {key: value for key, value in fields.items() if key not in keys}
    for key, value in numbers.items():
        if isinstance(value, dict) and value.keys() != set(ACCESSES):
            raise LabError(f"{where}: {key} should be one value, or {{adapter: …, full: …}} with one for each access")
    return ArenaRow(name, fields["by"], fields["title"] if "title" in keys else _plain(name), numbers)


def _own_rows(file: str) -> dict[str, ArenaRow]:
    path = Path(existing(file))
    if not path.is_file():
        raise LabError(f"DEFENSE = '{file}' does not exist (a YAML file with `rows:` like those of {ARENA.name})")
    return _rows_of(path, read_yaml(path, "`rows:` with an entry for each name"))


def _own_row(file: str) -> ArenaRow:
    path = Path(existing(file))
    if not path.is_file():
        raise LabError(f"DEFENSE = '{file}' does not exist (a Python file with one function marked by @defense)")
    if not re.fullmatch(r"[A-Za-z]\w*", path.stem):
        raise LabError(f"DEFENSE = '{file}': the file's name should be one that a function can have")
    return ArenaRow(path.stem, str(path), _plain(path.stem))


def _plain(name: str) -> str:
    return name.replace("_", " ")
