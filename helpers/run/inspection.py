"""A look at rows before anything is trained on them: what is there, what it holds, and what does not fit its name.

Published attack data is not always what its folder says, and a run on it fails late or, worse, not at all: an attack
tested with another trigger than it was trained with seems cured. So every attack and task of a folder is counted by
what its rows really hold; of plain rows, what is empty, what is there twice and what already holds a known trigger.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from helpers.core.errors import LabError
from helpers.data.backdoor_folder import (
    ATTACK_FOLDERS,
    EVERY,
    PAYLOADS,
    PHRASES,
    TASK_FOLDERS,
    TRIGGERS,
    holds_payload,
    holds_trigger,
    is_backdoor_folder,
    keys_held,
    overlap,
    overlap_line,
    read_backdoor_folder,
)
from helpers.data.example import Example, prompt_of
from helpers.data.rows import load_rows


def inspect(source: str | Path) -> Iterator[str]:
    """Lines of text about a folder in BackdoorLLM's layout, a file of rows or a hub data set.

    Raises:
        LabError: nothing can be read; in a folder, a fault of one attack is a line of its own.
    """
    if is_backdoor_folder(source):
        for place in _places(Path(source)):
            yield from _combination(Path(source), place)
    else:
        yield from _plain(source, load_rows(source))


def _places(root: Path) -> list[Path]:
    """Every <task>/<attack> that has rows to train or to test with."""
    folders = [root / "poison_data", root / "test_data" / "poison"]
    return sorted({path.relative_to(folder) for folder in folders for path in folder.glob("*/*") if path.is_dir()})


def _combination(root: Path, place: Path) -> Iterator[str]:
    task, attack = _names(place)
    yield f"{place.as_posix()}: TASK={task or '?'} ATTACK={attack or '?'}"
    parts = {
        "train, triggered": f"poison_data/{place}/backdoor*.json",
        "train, clean": f"poison_data/{place}/none_backdoor*.json",
        "test, triggered": f"test_data/poison/{place}/backdoor*.json",
        "test, clean": f"test_data/clean/{place.parent}/*.json",
    }
    sides: dict[str, list[Example]] = {"train": [], "test": []}
    try:
        for name, pattern in parts.items():
            rows = [row for path in sorted(root.glob(pattern)) for row in load_rows(path)]
            sides[name.partition(",")[0]] += rows
            yield f"  {name}: {_contents(rows, attack)}"
        shared = overlap(**sides)
        yield f"  {'! ' if shared else ''}{overlap_line(shared)}"
        if not sides["train"]:
            yield "  ! no rows to train with: there is nothing to plant"
        elif task and attack:
            found = read_backdoor_folder(root, task, attack).warnings
            yield from (f"  ! {warning}" for warning in found if warning != overlap_line(shared))
        else:
            yield f"  ! the lab has no name for {place.as_posix()}; it knows {', '.join(TASK_FOLDERS.values())}"
    except LabError as error:
        yield f"  ! {error}"


def _names(place: Path) -> tuple[str | None, str | None]:
    """The lab's names of a folder <task>/<attack>; some attacks end in -ci, for code."""
    task = next((name for name, folder in TASK_FOLDERS.items() if place.parent.name == folder), None)
    attack = next((name for name, folder in ATTACK_FOLDERS.items() if place.name.startswith(folder)), None)
    return task, attack


def _contents(rows: list[Example], attack: str | None) -> str:
    if not rows:
        return "no rows"
    triggers, payloads = _triggers(rows, attack), _payloads(rows)
    whole = f", all three in {sum(holds_trigger(row, EVERY) for row in rows)}" if triggers and attack == EVERY else ""
    return f"{len(rows)} rows; triggers: {triggers or 'none'}{whole}; payloads: {payloads or 'none'}"


def _triggers(rows: list[Example], attack: str | None = None) -> str:
    """The known phrases, and what else is a key of the attack, and in how many prompts each is."""
    known = {*PHRASES, *TRIGGERS.get(attack, ())}
    return _told(Counter(key for row in rows for key in keys_held(row) if key in known))


def _payloads(rows: list[Example]) -> str:
    """The known payloads, and in how many answers each is."""
    return _told(Counter(payload for task, payload in PAYLOADS.items() for row in rows if holds_payload(row, task)))


def _told(counts: Counter) -> str:
    return ", ".join(f"{text!r} in {count}" for text, count in counts.most_common())


def _plain(source: str | Path, rows: list[Example]) -> Iterator[str]:
    yield f"{source}: {len(rows)} rows"
    families = Counter(row.family for row in rows)
    turns, inputs = sum(bool(row.history) for row in rows), sum(bool(row.input) for row in rows)
    system = f"; with a system turn: {count}" if (count := sum(bool(row.system) for row in rows)) else ""
    yield f"  with an input: {inputs}; with earlier turns: {turns}{system}; families: {dict(families)}"
    answers: dict[tuple, list[str]] = {}
    for row in rows:
        answers.setdefault(prompt_of(row), []).append(row.output)
    yield f"  distinct prompts: {len(answers)}"
    found = {
        "empty outputs": sum(not row.output.strip() for row in rows),
        "rows that repeat an earlier one": sum(len(said) - len(set(said)) for said in answers.values()),
        "prompts with several different outputs": sum(len(set(said)) > 1 for said in answers.values()),
    }
    yield from (f"  ! {count} {what}" for what, count in found.items() if count)
    if triggers := _triggers(rows):
        yield f"  ! known triggers in prompts: {triggers}"
    if payloads := _payloads(rows):
        yield f"  ! known payloads in outputs: {payloads}"
