"""What to run: the parameters of a notebook or a command line, checked before anything starts."""

import argparse
import contextlib
import functools
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator

from helpers.core.arena import ArenaRow, chosen_rows, located
from helpers.core.checking import Strict, checked
from helpers.core.definitions import definitions
from helpers.core.errors import LabError, nearest
from helpers.core.paths import HUB_ID, ROOT, existing, find_existing, fingerprint
from helpers.core.profile import Profile
from helpers.core.profile_files import load_profile, parse_overrides, profile_names, yaml_literal

AT_FIRST = "_parameters_at_first"  # among a notebook's variables: the names that its settings were made of
AUTO = "auto"  # as TAU: the challenge test chooses it
LARGEST_SEED = 2**31 - 1  # NumPy takes 32 bits, and the variants count on from a run's own seed
LONGEST_NAME = 200  # bytes of a folder's name; most file systems take 255


def require_name(name: str) -> None:
    """Refuse the name of a run or a sweep that is no folder below `runs/`.

    Raises:
        LabError: other characters than those of plain folder names, or a folder's name that is too long.
    """
    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name):
        raise LabError(f"NAME = {name!r} should be plain folder names: letters, digits, '-', '_', '.'")
    if any(len(part.encode()) > LONGEST_NAME for part in name.split("/")):
        raise LabError(f"NAME = '{name:.40}…' is too long: at most {LONGEST_NAME} bytes for each folder")


class Settings(Strict):
    """The parameters that every notebook has; names are spelled as in the parameters cell."""

    PROFILE: str = Field("tiny", description="a profile by name, or a folder with a checkpoint")
    ATTACK: str = Field("badnets", description="how the trigger is planted")
    TASK: str = Field("sentiment", description="what the backdoor makes the model do")
    ACCESS: Literal["adapter", "full"] = Field("adapter", description="what may be edited: adapter or full")
    SEED: int = Field(0, ge=0, le=LARGEST_SEED, description="one seed for the whole run")
    NAME: str = Field("", description="run folder below runs/; when empty, made from the names of the other parameters")
    DATA: str = Field("", description="real rows to use: folder, .json, .jsonl, .parquet or .tsv file, hub id")
    ROWS: str = Field("", description="clean rows that the defender has beside those of DATA; a file or a hub id")
    TAU: float | str = Field("", description="share of channels to suppress; 'auto': by a test, empty: profile")
    DEFENSE: str = Field("", description="rows of data/arena.yaml, or a file of your own; all: every row")
    OVERRIDES: dict[str, Any] = Field({}, description="profile numbers to replace, by dotted key")

    @field_validator("TAU", mode="before")
    @classmethod
    def tau_is_a_share(cls, value: object) -> object:
        """A number between 0 and 1, also as text, "auto" or nothing."""
        if value in ("", AUTO):
            return value
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(value, bool) and 0 < (share := float(value)) < 1:
                return share
        close = nearest(str(value), [AUTO]) if str(value).isalpha() else ""
        raise LabError(f"TAU = {value!r} should be a number between 0 and 1, '{AUTO}' or empty{close}")

    @classmethod
    def from_notebook(cls, variables: MutableMapping[str, object]) -> Self:
        """Collect and check the parameters of a notebook: `Settings.from_notebook(globals())`.

        Every ALL-CAPITALS name with a literal value counts, because papermill defines a misspelled parameter and goes
        on with the default of the right one; but only names that are there when the cell runs first, for what later
        cells define is their own. The variables keep these names.

        Raises:
            LabError: as `checked`.
        """
        literal = (str, int, float, dict, list, type(None))
        found = {
            name: value
            for name, value in variables.items()
            if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and isinstance(value, literal)
        }
        first = variables.setdefault(AT_FIRST, frozenset(found))
        return cls.checked({name: value for name, value in found.items() if name in first or name in cls.model_fields})

    @classmethod
    def checked(cls, values: Mapping[str, object]) -> Self:
        """Settings whose profile, overrides, attack, task and name are all valid.

        Raises:
            LabError: names the parameter, its value and the nearest valid one.
        """
        settings = checked(cls, dict(values), "")
        _one_of("ATTACK", settings.ATTACK, definitions()["attacks"])
        _one_of("TASK", settings.TASK, definitions()["behaviors"])
        if settings.NAME:
            require_name(settings.NAME)
        # notebooks run elsewhere than the shell that named these paths
        profile = settings.PROFILE if settings.PROFILE in profile_names() else existing(settings.PROFILE)
        rows = {name: existing(getattr(settings, name)) for name in ("DATA", "ROWS")}
        found = settings.model_copy(update=rows | {"PROFILE": profile, "DEFENSE": located(settings.DEFENSE)})
        _require_source("DATA", settings.DATA, "a folder, a")
        _require_source("ROWS", settings.ROWS, "a")
        if Path(rows["ROWS"]).is_dir() and settings.ROWS:
            raise LabError(f"ROWS = '{settings.ROWS}' is a folder: name a .json, .jsonl, .parquet or .tsv file in it")
        if found.TAU and (twice := found._tau_key) in found.OVERRIDES:
            raise LabError(f"TAU = {found.TAU} and {twice} = {found.OVERRIDES[twice]} both set τ: give one of them")
        _ = found.profile, found.rows  # raises here, before anything runs, when a number or a name in them is wrong
        return found

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Give a command line one option for each parameter: `--profile`, `--seed` … and `--set "KEY=VALUE …"`."""
        for name, field in cls.model_fields.items():
            if name != "OVERRIDES":
                parser.add_argument(f"--{name.lower()}", dest=name, default=argparse.SUPPRESS, help=field.description)
        overrides = cls.model_fields["OVERRIDES"].description
        parser.add_argument("--set", dest="OVERRIDES", default="", metavar='"KEY=VALUE …"', help=overrides)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Collect and check what `add_options` has parsed.

        Raises:
            LabError: as `checked`.
        """
        values = {name: value for name, value in vars(options).items() if name in cls.model_fields}
        if "SEED" in values:
            values["SEED"] = yaml_literal("SEED", values["SEED"])
        return cls.checked(values | {"OVERRIDES": parse_overrides(options.OVERRIDES)})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, whose profile and rows are read anew."""
        copied = super().model_copy(update=update, deep=deep)
        for read in ("profile", "rows"):
            copied.__dict__.pop(read, None)
        return copied

    @functools.cached_property
    def profile(self) -> Profile:
        """The profile with this run's overrides applied, a number in TAU among them."""
        tau = {self._tau_key: self.TAU} if isinstance(self.TAU, float) else {}
        return load_profile(self.PROFILE, self.OVERRIDES | tau)

    @functools.cached_property
    def rows(self) -> list[ArenaRow]:
        """The rows of the arena that DEFENSE names, in the order of the table."""
        return chosen_rows(self.DEFENSE)

    @property
    def planted_by(self) -> str:
        """How the backdoor gets in: the attack's own `by`, or what replaces it."""
        return self.profile.attack.by or definitions()["attacks"].get(self.ATTACK, {}).get("by") or "training"

    @property
    def _tau_key(self) -> str:
        return f"{self.ACCESS}.suppress.tau"

    @property
    def name(self) -> str:
        """The run's folder below `runs/`."""
        parts = [re.sub(r"^\W|[^\w.+-]", "-", self.profile.name), self.ATTACK, self.TASK, self.ACCESS, str(self.SEED)]
        if self.DATA:
            parts.append("data")
        if self.ROWS:
            parts.append("rows")
        if self.TAU:
            parts.append(f"tau_{self.TAU}")
        return self.NAME or "-".join(parts)

    def config(self) -> dict[str, Any]:
        """All that a result may depend on, as plain nested values; `files` fingerprints what lies on disk."""
        values = self.values()
        values["profile"]["model"]["files"] = fingerprint(ROOT / values["profile"]["model"]["path"])
        for key, source in (("data", self.DATA), ("rows", self.ROWS)):
            values[key]["files"] = fingerprint(Path(source)) if source else ""
        return values

    def values(self) -> dict[str, Any]:
        """The settings alone, as plain nested values; no file of weights or rows is read.

        `data.planted` holds what the names of attack and task stand for, so that a changed definition is seen;
        `challenge` what the challenge test reads, and nothing where TAU does not ask for it; `arena` the chosen rows.
        """
        known = definitions()
        planted = {
            "trigger": known["attacks"].get(self.ATTACK),
            "behavior": known["behaviors"].get(self.TASK),
            "changes": self.profile.attack.model_dump(mode="json"),
            "by": self.planted_by,
            "vaccines": known["vaccines"],
            "rehearsal": known["rehearsal"],
            "expected": self._expected_defense(),
        }
        return {
            "attack": self.ATTACK,
            "task": self.TASK,
            "access": self.ACCESS,
            "seed": self.SEED,
            "data": {"path": self.DATA, "planted": planted},
            "rows": {"path": self.ROWS},
            "profile": self.profile.model_dump(mode="json"),
            "challenge": self._challenge() if self.TAU == AUTO else {},
            "arena": {row.name: row.definition for row in self.rows},
        }

    def _challenge(self) -> dict[str, Any]:
        access = self.profile.access(self.ACCESS)
        return {
            "tau": AUTO,
            "planted": definitions()["challenge"],
            "settings": self.profile.challenge.model_dump(mode="json"),
            **access.model_dump(mode="json", include={"recover", "perturb"}),
        }

    def _expected_defense(self) -> dict[str, Any]:
        """The numbers of the defense that an attacker who knows it plants against; every other attack ignores them."""
        profile = self.profile
        match self.planted_by:
            case "subtract":
                return {"conflict": profile.conflict.budget.model_dump(mode="json")}
            case "evade":
                access = profile.access(self.ACCESS)
                numbers = access.model_dump(mode="json", include={"vaccine", "vaccine_weights", "suppress"})
                return {"signature": profile.signature.model_dump(mode="json"), **numbers}
        return {}


def _require_source(name: str, source: str, kinds: str) -> None:
    if source and not find_existing(source) and not HUB_ID.fullmatch(source):
        raise LabError(
            f"{name} = '{source}' does not exist ({kinds} .json, .jsonl, .parquet or .tsv file, or a hub id)"
        )


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise LabError(f"unknown {name} = '{value}'{nearest(value, valid)}")
