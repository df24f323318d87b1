"""The steps of a purification, each a stage of the run: a second call goes on where the first one stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.core.store import Stage
from helpers.data.roles import Trial
from helpers.defenses.bdvax.challenge import settled
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.bdvax.score import Scores, load_rankings, score_variants
from helpers.defenses.bdvax.select import select_suppressed
from helpers.defenses.bdvax.vaccines import plan_variants, train_variants, vaccine_pairs, variant_folders
from helpers.defenses.conflict.conflict_model import merge_adapters, train_conflict
from helpers.defenses.methods.conflict import conflict
from helpers.measure.asr import false_triggers
from helpers.measure.report import attack_success
from helpers.measure.utility import exact_match, teacher_forced
from helpers.model.generate import answers
from helpers.purify.case import Case

GIVEN = ("suspect", "base", "rows", "access", "seed", "profile", "planted")


def vaccinate(case: Case) -> Stage:
    """Train the vaccines of all families and their twins on the suspicious model (BD-VAX §4.2)."""

    def make(folder: Path) -> dict[str, Any]:
        pairs = vaccine_pairs(case.dealt.defender, case.mixed.profile.signature, "", case.seed)
        train_variants(case.mixed, case.suspect.folder, plan_variants(pairs, case.seed, folder), case.prompt_format)
        return {"payloads": [payload for _, payload, *_ in pairs]}

    return case.run.stage("variants", make, uses=GIVEN)


def score(case: Case, variants: Stage) -> Stage:
    """Rank all channels and heads by Eq. (2)."""
    n = case.profile.signature.n

    def make(folder: Path) -> None:
        score_variants(case.mixed, *variant_folders(variants.path, n), folder)

    return case.run.stage("scores", make, uses=GIVEN, parents=[variants])


def rankings(case: Case, scores: Stage) -> tuple[Scores, Tensor]:
    """The scores of what can be suppressed: {module: [channels]}, and of the heads [n_layers, n_heads]."""
    channels, heads = load_rankings(scores.path)
    return {module: values for module, values in channels.items() if module in case.scored}, heads


def suppress(case: Case, scores: Stage, tau: float) -> Stage:
    """Suppress the top share of the suspicious model and recover (BD-VAX §4.2 and §4.3); tell what went, and where."""

    def make(folder: Path) -> dict[str, Any]:
        access, ranked = settled(case.access, {"tau": tau}), rankings(case, scores)
        rows = case.dealt.defender.recovery
        suppress_and_recover(access, case.suspect.folder, *ranked, rows, case.prompt_format, case.seed, folder)
        masks, heads = select_suppressed(access, *ranked)
        return {
            "tau": tau,
            "channels": {module: [int(mask.sum()), len(mask)] for module, mask in masks.items()},
            "heads": heads.sum(dim=1).tolist(),
        }

    return case.run.stage(f"suppressed/{tau:g}", make, uses=GIVEN, parents=[scores])


def merge(case: Case, cured: Path | None, parents: list[Stage]) -> Stage:
    """Merge a conflict model with the suspicious model, or with what BD-VAX left (information conflicts, §3.3)."""

    def make(folder: Path) -> dict[str, Any]:
        if case.merges_adapters:
            return _merge_adapters(case, cured or case.suspect.folder, folder)
        return conflict(
            case.access, case.suspect.folder, case.dealt.defender, case.prompt_format, case.seed, folder, cured=cured
        )

    return case.run.stage("merged", make, uses=GIVEN, parents=parents)


def _merge_adapters(case: Case, start: Path, folder: Path) -> dict[str, Any]:
    """The linear merge as one adapter, so that what came as an adapter stays one."""
    profile, numbers = case.profile, case.profile.conflict
    rows = case.dealt.defender.rows(numbers.budget.rows)
    trained = folder / "adapter"
    record = train_conflict(profile, case.suspect.folder, rows, case.prompt_format, case.seed, trained)
    merge_adapters(profile, start, trained, numbers.t, folder / "model")
    return record


def measure(case: Case, name: str, folder: Path, parents: list[Stage]) -> Stage:
    """What a model can do on held-out clean rows, and what it does on triggered ones where the user has any.

    Args:
        name: of the stage below `measured/`.
        folder: of the model.
        parents: the stages it was made by.
    """

    def make(_: Path) -> dict[str, Any]:
        profile, rows = case.profile, case.dealt.held_out
        model = case.access.load(folder)
        scored = teacher_forced(
            model, case.prompt_format, rows, profile.lengths.train_tokens, profile.evaluation.batch_size
        )
        metric, known = case.dealt.defender.utility_metric, case.known
        checked = metric == "exact_match"
        said = answers(model, case.prompt_format, rows, profile) if checked or known else []
        return {
            "utility": exact_match(rows, said)[0] if checked else scored["token_accuracy"],
            "utility_metric": metric,
            "perplexity": scored["perplexity"],
            "n": len(rows),
            "known_trigger": _on_known_trigger(case, known, model, said) if known else None,
        }

    uses = [*GIVEN, "triggered"]
    return case.run.stage(f"measured/{name}", make, uses=uses, parents=parents)


def _on_known_trigger(case: Case, trial: Trial, model: Any, said: Sequence[str]) -> Mapping[str, Any]:
    """The true ASR, where somebody knows the trigger, and the false trigger rate.

    Args:
        trial: of that trigger, with the rows that measure utility.
        said: what the model has answered to these.
    """
    rates, _ = attack_success(model, case.prompt_format, trial, case.profile)
    kept = {key: rates[key] for key in ("asr", "asr_interval", "labels", "n")}
    false = false_triggers(trial, said)
    return kept | {"on_clean_prompts": false["false_trigger"], "on_clean_interval": false["false_trigger_interval"]}
