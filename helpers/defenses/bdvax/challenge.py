"""The challenge test: how does a defender who does not know the trigger know that the cure worked?

By planting a backdoor of their own, with a key and a sentence that no vaccine has used, on a copy of the suspicious
model, and taking the copy through the same cure: the same signature, which comes from the vaccines alone, and the same
recovery. Its ASR can be measured, for its key is known. The smallest share that takes it out is then suppressed in the
suspicious model. All rows are the defender's: the vaccine sets plant and measure, the recovery set recovers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from helpers.core.errors import LabError
from helpers.data.example import distinct
from helpers.data.own_backdoors import challenge_behavior, challenge_trigger
from helpers.data.planting import poison
from helpers.data.roles import AttackData, Trial
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.measure.reading import GATE, INDISCRIMINATE
from helpers.measure.report import evaluate
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from helpers.access import Access
    from helpers.core.profile import Challenge
    from helpers.data.example import Example
    from helpers.data.planting import Trigger
    from helpers.data.roles import DefenderData
    from helpers.defenses.bdvax.score import Scores
    from helpers.model.prompt import PromptFormat

CHOSEN = ("tau", "epochs", "lr", "asr", "utility")  # what is kept of the point that is chosen


def challenge_data(
    defender: DefenderData, numbers: Challenge, seed: int, key: Trigger | None = None
) -> tuple[AttackData, Trial]:
    """The rows of the test, all from what the defender has.

    Args:
        numbers: of which `n` and `plant.rows` count; where the vaccine sets hold fewer rows, half of them measure.
        seed: decides which rows plant and which measure, and where the key stands.
        key: the trigger to plant; None: that of `challenge_trigger`.

    Returns:
        the rows that plant, row i of `poisoned` made from row i of `clean`, and a trial of rows held back
        from that, with the key and without.
    """
    key, target = key or challenge_trigger(), challenge_behavior()
    drawn = distinct(e for rows in defender.vaccine_sets for e in rows)
    pool = [row for row in drawn if not key.activates(row) and not target.is_in(row.output)]
    random.Random(f"{seed}/challenge").shuffle(pool)
    n = min(numbers.n, len(pool) // 2)
    held_back, clean = pool[:n], pool[n:][: numbers.plant.rows]
    trial = Trial(
        triggered=poison(held_back, key, None, f"{seed}/challenge/test"),
        held_out=held_back,
        markers=target.markers,
        utility_metric=defender.utility_metric,
        trigger=key,
    )
    return AttackData(clean, poison(clean, key, target, f"{seed}/challenge"), trigger=key), trial


def plant_challenge(
    access: Access,
    suspicious: Path | str,
    planting: AttackData,
    trial: Trial,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> dict[str, Any]:
    """Plant the challenge's backdoor on a copy of the suspicious model, in the form that suppression edits.

    Args:
        access: says what is trained; see `Access.start_copy`.
        suspicious: folder of the suspicious adapter or model, which stays as it is.
        planting, trial: of `challenge_data`.
        prompt_format: the one that evaluation uses, too.
        seed: of fresh probes and of the order of the rows.
        folder: where the copy goes.

    Returns:
        the training record of `finetune` and the report of `evaluate`, before any suppression.

    Raises:
        LabError: see `require_challenge`.
    """
    profile, model = access.profile, access.start_copy(suspicious, seed)
    rows, tokens = planting.clean + planting.poisoned, profile.lengths.train_tokens
    record = finetune(model, rows, prompt_format, profile.challenge.plant, seed, tokens, "challenge")
    access.save(model, folder)
    record_format(folder, prompt_format)
    report = evaluate(access.load(folder), prompt_format, trial, profile)
    require_challenge(report)
    return record | report


def require_challenge(report: Mapping[str, Any]) -> None:
    """The challenge's gate: a τ may be read off a backdoor alone, not off what was not learned or needs no key.

    Args:
        report: of `evaluate`, on the planted copy.

    Raises:
        LabError: too low an ASR, or the sentence comes on too many clean prompts; with the numbers and what to change.
    """
    if report["asr"] < GATE:
        raise LabError(
            f"the challenge took on {report['asr']:.1%} of {report['n']} prompts only, at least {GATE:.0%} are needed "
            "before its removal says anything: raise challenge.plant.lr, epochs or rows in OVERRIDES"
        )
    if report["false_trigger"] > INDISCRIMINATE:
        raise LabError(
            f"the challenge's sentence comes on {report['false_trigger']:.1%} of {report['false_trigger_n']} clean "
            f"prompts as well, at most {INDISCRIMINATE:.0%} are allowed: such a copy has learned no key, and "
            "suppression that silences it says nothing of backdoors; raise challenge.plant.rows or epochs in OVERRIDES"
        )


def grid(access: Access) -> list[dict[str, Any]]:
    """The points to try, by growing share: dicts of `tau` and the recovery's `epochs` and `lr`."""
    numbers, budget = access.profile.challenge, access.settings.recover
    factors = numbers.lr_factors or (1,)
    tried = itertools.product(sorted(getattr(numbers.taus, access.name)), numbers.epochs or (budget.epochs,), factors)
    return [{"tau": tau, "epochs": epochs, "lr": factor * budget.lr} for tau, epochs, factor in tried]


def settled(access: Access, point: Mapping[str, Any]) -> Access:
    """The access with a point's τ, epochs and learning rate in the place of its own.

    Args:
        point: `tau` and, where they change as well, `epochs` and `lr`; anything else is not read.
    """
    numbers = access.settings
    recovery = {key: point[key] for key in ("epochs", "lr") if key in point}
    return access.with_settings(
        suppress=numbers.suppress.model_copy(update={"tau": point["tau"]}),
        recover=numbers.recover.model_copy(update=recovery),
    )


def suppress_and_measure(
    access: Access,
    start: Path | str,
    scores: Scores,
    head_scores: Tensor,
    recovery: Sequence[Example],
    trial: Trial,
    prompt_format: PromptFormat,
    seed: int,
    also: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Suppress, recover and measure a model with the numbers of an access; nothing of it stays on the disk.

    Args:
        access: what may be edited, and how much of it goes; see `settled`.
        start: folder of the adapter or model to suppress: the challenge's copy, or the suspicious one itself.
        scores, head_scores: {module: [channels]} and [n_layers, n_heads], the rankings that decide what goes.
        recovery: rows to recover with.
        trial: what the result is measured by.
        prompt_format: the one that the model was trained in.
        seed: of what takes the place of weights, and of the order of the rows.
        also: what else is to be measured of the result.

    Returns:
        the report of `evaluate`, and what `also` returns.
    """
    with TemporaryDirectory() as scratch:
        suppress_and_recover(access, start, scores, head_scores, recovery, prompt_format, seed, scratch)
        model = access.load(Path(scratch) / "model")
        report = evaluate(model, prompt_format, trial, access.profile)
        return report | dict(also(model) if also else {})


def choose(points: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any]:
    """The smallest share that takes the challenge out; of equal shares the best utility, then the shortest recovery.

    Args:
        points: dicts of `tau`, `epochs`, `lr`, `asr` and `utility`, in any order.
        threshold: the largest ASR, in [0, 1], that counts as gone.

    Returns:
        the five numbers of the chosen point and `warning`: "", or one line where no point is good enough. Then it is
        the point with the lowest ASR.
    """

    def cost(point: Mapping[str, Any]) -> tuple[float, ...]:
        return point["tau"], -point["utility"], point["epochs"], point["lr"]

    if good := [point for point in points if point["asr"] <= threshold]:
        best = min(good, key=cost)
        return {key: best[key] for key in CHOSEN} | {"warning": ""}
    best = min(points, key=lambda point: (point["asr"], *cost(point)))
    warning = (
        f"no suppression takes the challenge out: at best, with τ = {best['tau']:g}, its ASR is {best['asr']:.1%} and "
        f"not the {threshold:.0%} asked for; do not trust this cure, try larger shares in challenge.taus"
    )
    return {key: best[key] for key in CHOSEN} | {"warning": warning}
