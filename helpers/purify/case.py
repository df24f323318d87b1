"""One model to purify, with all that is needed for it, and the run folder that keeps what was made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.access import Access, access_to
from helpers.core.definitions import definitions
from helpers.core.errors import LabError, nearest
from helpers.core.paths import existing, fingerprint
from helpers.core.profile import require_device
from helpers.core.run_names import run_folder
from helpers.core.settings import AUTO, Settings
from helpers.core.store import Run
from helpers.data.roles import Trial
from helpers.model.checkpoint import load_config
from helpers.model.tokenizer import load_format, recorded_format
from helpers.purify.rows import UserRows, deal_rows, read_triggered
from helpers.purify.suspect import Suspect, find_suspect, overrides_for
from helpers.run.limits import check_against_model

if TYPE_CHECKING:
    from helpers.core.profile import Profile
    from helpers.model.prompt import PromptFormat

METHODS = ("bdvax", "conflict", "bdvax_then_conflict")


@dataclass(frozen=True)
class Case:
    """What is to be purified, by which method, and with which rows.

    Args:
        suspect: what was brought.
        settings: profile, access, seed, τ and changes of the profile.
        method: one of `METHODS`.
        rows: path of the clean rows; "" for generated ones.
        triggered: path of rows with the trigger; "" where nobody has any.
        markers: path of a file of markers; "" where the answers of `triggered` are the markers.
    """

    suspect: Suspect
    settings: Settings
    method: str
    rows: str
    triggered: str
    markers: str

    @property
    def profile(self) -> Profile:
        """The numbers of this model."""
        return self.settings.profile

    @cached_property
    def access(self) -> Access:
        """What may be edited."""
        return access_to(self.profile, self.settings.ACCESS)

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.settings.SEED

    @property
    def mixed(self) -> Access:
        """The access with vaccines of all families: nobody knows what the backdoor makes the model do."""
        signature = self.profile.signature.model_copy(update={"family": "mixed"})
        return access_to(self.profile.model_copy(update={"signature": signature}), self.settings.ACCESS)

    @cached_property
    def dealt(self) -> UserRows:
        """The clean rows, split."""
        return deal_rows(self.rows, self.profile, self.settings.ACCESS, self.seed)

    @cached_property
    def known(self) -> Trial | None:
        """The trial of the trigger, where the user happens to have one; it enters no decision."""
        if not self.triggered:
            return None
        metric = self.dealt.defender.utility_metric
        return read_triggered(self.triggered, self.markers, self.dealt.held_out, metric)

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """The format that the model was trained in, as far as anybody knows."""
        spec = self.profile.model
        if not self.settings.OVERRIDES.get("model.prompt_format") and (
            recorded := recorded_format(self.suspect.folder)
        ):
            spec = spec.model_copy(update={"prompt_format": recorded["name"]})
        return load_format(spec)

    @cached_property
    def run(self) -> Run:
        """The run folder; what it holds depends on files and settings alone."""
        return Run(run_folder(self.settings.NAME), self.config())

    def config(self) -> dict[str, Any]:
        """All that a stage may depend on."""
        planted = definitions()
        return {
            "suspect": {"path": str(self.suspect.folder), "files": fingerprint(self.suspect.folder)},
            "base": {"path": self.suspect.base, "files": fingerprint(Path(self.suspect.base))},
            "rows": {"path": self.rows, "files": fingerprint(Path(self.rows)) if self.rows else ""},
            "triggered": [fingerprint(Path(path)) if path else "" for path in (self.triggered, self.markers)],
            "access": self.settings.ACCESS,
            "seed": self.seed,
            "profile": self.profile.model_dump(mode="json"),
            "planted": {side: planted[side] for side in ("vaccines", "challenge", "challenge_kinds")},
        }


def open_case(
    suspect: str,
    base: str = "",
    rows: str = "",
    triggered: str = "",
    markers: str = "",
    method: str = "bdvax",
    name: str = "",
    profile: str = "",
    seed: int = 0,
    tau: str = AUTO,
    overrides: dict[str, Any] | None = None,
) -> Case:
    """Look at everything that was brought, before anything is trained.

    Args:
        suspect, base, profile: see `find_suspect`.
        rows: a file of clean rows; empty: generated ones.
        triggered, markers: see `read_triggered`.
        method: one of `METHODS`.
        name: run folder below `runs/`; empty: that of the suspect's folder, with `purify-` before it.
        seed: of every random choice.
        tau: share of channels to suppress, or "auto".
        overrides: dotted keys of the profile to new values.

    Raises:
        LabError: whatever cannot be used, in one line.
    """
    if method not in METHODS:
        raise LabError(f"unknown METHOD = '{method}'{nearest(method, METHODS)}")
    found = find_suspect(suspect, base, profile)
    if method != "bdvax" and not found.knows_base:
        raise LabError(f"METHOD = '{method}' needs the clean base of {found.folder}: give its folder or hub id in BASE")
    settings = Settings.checked(
        {
            "PROFILE": found.profile,
            "ACCESS": found.access,
            "SEED": seed,
            "NAME": name or f"purify-{found.folder.name}",
            "TAU": tau if method != "conflict" else "",
            "OVERRIDES": {**overrides_for(found), **(overrides or {})},
        }
    )
    case = Case(found, settings, method, *(existing(path) if path else "" for path in (rows, triggered, markers)))
    require_device(case.profile.model)
    check_against_model(settings, load_config(case.profile.model))
    _ = case.dealt, case.known, case.prompt_format  # raise here, before anything is trained
    return case
