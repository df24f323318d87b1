"""One model to purify, with all that is needed for it, and the run folder that keeps what was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.access import Access, access_to
from helpers.access.partial import PartialAdapterAccess
from helpers.core.definitions import definitions
from helpers.core.device import require_device
from helpers.core.errors import LabError, nearest
from helpers.core.paths import existing, fingerprint, runs_folder
from helpers.core.run_names import run_folder
from helpers.core.settings import AUTO, Settings
from helpers.core.store import Run
from helpers.data.roles import Trial
from helpers.model.architecture import mlp_slots, parameter_shapes
from helpers.model.checkpoint import load_config
from helpers.model.shards import find, stored
from helpers.model.tokenizer import load_format
from helpers.purify.rows import UserRows, deal_rows, more_epochs, read_triggered
from helpers.purify.suspect import Suspect, find_suspect, overrides_for
from helpers.run.limits import check_against_model

if TYPE_CHECKING:
    from helpers.core.profile import Profile
    from helpers.model.prompt import PromptFormat

METHODS = ("bdvax", "conflict", "bdvax_then_conflict")
NO_NAME = r"^\W|[^\w.+-]"  # what the name of a run's folder may not hold


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

    @cached_property
    def profile(self) -> Profile:
        """The numbers of this model; as many steps are made with few rows as with those that the profile asks for."""
        return more_epochs(self.settings.profile, self.settings.ACCESS, self.dealt.defender)

    @cached_property
    def access(self) -> Access:
        """What may be edited."""
        return self._access_with(self.profile)

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.settings.SEED

    @property
    def mixed(self) -> Access:
        """The access with vaccines of all families: nobody knows what the backdoor makes the model do."""
        signature = self.profile.signature.model_copy(update={"family": "mixed"})
        return self._access_with(self.profile.model_copy(update={"signature": signature}))

    @cached_property
    def scored(self) -> list[str]:
        """The MLP matrices whose channels are scored and suppressed."""
        return self.suspect.scored(load_config(self.settings.profile.model))

    @cached_property
    def dealt(self) -> UserRows:
        """The clean rows, split."""
        return deal_rows(self.rows, self.settings.profile, self.settings.ACCESS, self.seed)

    @property
    def merges_adapters(self) -> bool:
        """Whether a merge leaves an adapter, as it does by the linear method, and not a whole model."""
        return self.suspect.access == "adapter" and self.profile.conflict.method == "linear"

    def notes(self) -> list[str]:
        """What a reader has to know of the rows and of the suspicious model, a sentence each."""
        told = list(self.dealt.notes)
        if self.method == "conflict":
            return told
        config = load_config(self.settings.profile.model)
        everything = [slot.module for layer in mlp_slots(config) for slot in layer]
        if left_out := [module for module in everything if module not in self.scored]:
            kinds = ", ".join(sorted({module.rpartition(".")[2] for module in left_out}))
            told.append(
                f"the adapter leaves out {len(left_out)} of the {len(everything)} MLP matrices ({kinds}): they are the "
                "base's own, and nothing of them was scored or suppressed"
            )
        if not self.suspect.adapts_attention(config):
            told.append("the adapter changes no attention matrix: no attention head was suppressed")
        return told

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
        return load_format(self.profile.model)

    @cached_property
    def run(self) -> Run:
        """The run folder; what it holds depends on files and settings alone."""
        return Run(run_folder(self.settings.NAME), self.config())

    def _access_with(self, profile: Profile) -> Access:
        return PartialAdapterAccess(profile) if self.suspect.access == "adapter" else access_to(profile, "full")

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
    told = {**overrides_for(found), **(overrides or {})}
    if method != "conflict":
        told |= _no_heads(found, told)
    settings = Settings.checked(
        {
            "PROFILE": found.profile,
            "ACCESS": found.access,
            "SEED": seed,
            "NAME": name or f"purify-{re.sub(NO_NAME, '-', found.folder.name)}",
            "TAU": tau if method != "conflict" else "",
            "OVERRIDES": told,
        }
    )
    _require_own_folder(settings.NAME)
    case = Case(found, settings, method, *(existing(path) if path else "" for path in (rows, triggered, markers)))
    require_device(case.profile.model)
    config = load_config(case.profile.model)
    check_against_model(settings, config)
    if found.access == "full":
        names = {name for name, _ in stored(found.folder)}
        for name in parameter_shapes(config):
            find(name, names, found.folder)  # what is written must have a place there
    _ = case.dealt, case.known, case.prompt_format  # raise here, before anything is trained
    return case


def _no_heads(suspect: Suspect, told: Mapping[str, Any]) -> dict[str, Any]:
    """No head is suppressed where an adapter changes no attention; one that changes no MLP matrix is refused."""
    config = load_config(Settings(PROFILE=suspect.profile, OVERRIDES=dict(told)).profile.model)
    if not suspect.scored(config):
        kinds = ", ".join(sorted({module.rpartition(".")[2] for module in suspect.adapted}))
        raise LabError(
            f"the adapter in {suspect.folder} changes no MLP matrix (only {kinds}), so there are no channels to score: "
            "use METHOD=conflict, or merge it into its base and bring the whole model"
        )
    return {} if suspect.adapts_attention(config) else {"adapter.suppress.heads": 0}


def _require_own_folder(name: str) -> None:
    """Refuse the run of a chain of notebooks, some of whose stages have the same names."""
    if (runs_folder() / name / "inject").exists():
        raise LabError(f"NAME = '{name}' is a run of the notebooks: choose another name")
