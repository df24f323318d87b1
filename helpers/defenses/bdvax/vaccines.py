"""Vaccines: N paired variants of the suspicious model (BD-VAX §4.2, Algorithm 1).

Variant i is trained twice from the same start: θᵢᵇᵈ on clean rows plus the same rows with a synthetic key and behavior,
θᵢᶜˡᵉᵃⁿ on the clean rows only. What both share cancels in their difference; what is left is the work of the poison.
The base is frozen and held in 4 bits, so that the 2N runs fit where one model fits, and all of them train in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from helpers.data.example import Example
from helpers.data.own_backdoors import vaccine_behaviors, vaccine_triggers
from helpers.data.planting import Trigger, poison
from helpers.model.lora import save_adapter
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune
from helpers.train.multi_lora import Job, train_multi_lora

if TYPE_CHECKING:
    from helpers.access import Access
    from helpers.core.profile import Signature
    from helpers.data.payloads import Planted
    from helpers.data.roles import DefenderData
    from helpers.model.prompt import PromptFormat

Pair = tuple[Trigger, str, list[Example], list[Example]]  # trigger, payload, clean set, poisoned set


MEMBERS = ("backdoored", "clean")  # of a pair


@dataclass(frozen=True)
class Variant:
    """One variant to train: its rows, the seed of their order and of fresh probes, and the folder it goes to."""

    rows: list[Example]
    seed: int
    folder: Path


def vaccine_pairs(defender: DefenderData, signature: Signature, kind: str, seed: int) -> list[Pair]:
    """Return for each variant i its trigger k_i, payload b_i, clean and poisoned set (BD-VAX §4.2, Algorithm 1).

    Args:
        defender: his vaccine sets are used.
        signature: N, the family of payloads and the form of the triggers.
        kind: what is assumed of the attack where the family is "task": the family of its kind; not read otherwise.
        seed: decides where the keys stand.

    Raises:
        LabError: an unknown family or form, or as `vaccine_triggers`.
    """
    triggers, planted = vaccine_triggers(signature.form, signature.n), vaccine_behaviors(signature.family, kind)
    return paired(triggers, planted, defender.vaccine_sets, f"{seed}/vaccine")


def paired(
    triggers: Sequence[Trigger], planted: Sequence[Planted], sets: Sequence[list[Example]], seed: str
) -> list[Pair]:
    """Trigger, payload, clean and poisoned set of each variant.

    Args:
        triggers, sets: one for each variant.
        planted: what the variants say, in turn.
        seed: decides where the keys stand.
    """
    chosen = [planted[i % len(planted)] for i in range(len(triggers))]
    return [
        (trigger, one.payload, clean, poison(clean, trigger, one, f"{seed}{i}"))
        for i, (trigger, one, clean) in enumerate(zip(triggers, chosen, sets, strict=True))
    ]


def variant_folders(folder: Path, n: int, members: tuple[str, str] = MEMBERS) -> tuple[list[Path], list[Path]]:
    """The folders of `n` pairs inside of another one: those of the backdoored members and those of their clean twins.

    Args:
        folder: that holds all of them.
        n: how many pairs there are.
        members: the names of both, where the first is not the backdoored one.
    """
    first, clean = ([folder / f"{i}-{member}" for i in range(n)] for member in members)
    return first, clean


def plan_variants(pairs: Sequence[Pair], seed: int, folder: Path) -> list[Variant]:
    """The 2N variants of N pairs, twins next to each other (BD-VAX §4.2, Algorithm 1).

    Args:
        pairs: of `vaccine_pairs`.
        seed: of the first pair; the others count up from it.
        folder: for the variants; see `variant_folders`.
    """
    planned, twins = [], zip(*variant_folders(folder, len(pairs)), strict=True)
    for i, ((_, _, clean, poisoned), (first, second)) in enumerate(zip(pairs, twins, strict=True)):
        planned += [Variant(clean + poisoned, seed + i, first), Variant(clean, seed + i, second)]
    return planned


def train_variant(
    access: Access,
    suspicious: Path | str,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> dict[str, Any]:
    """Train one variant on `rows` from the suspicious model and write it to `folder`; see `Access.save_variant`.

    Both members of a pair are called with the same seed: equal initial probes, so that Δᵢ holds nothing but training.

    Args:
        access: says what trains; its `vaccine` budget is used.
        suspicious: folder of the suspicious adapter or model.
        rows: what the variant is trained on.
        prompt_format: the one that evaluation uses, too.
        seed: of fresh probes and of the order of the rows.
        folder: to write the variant to.

    Returns:
        the training record of `finetune`.
    """
    model, max_tokens = access.start_variant(suspicious, seed), access.profile.lengths.train_tokens
    record = finetune(model, rows, prompt_format, access.settings.vaccine, seed, max_tokens)
    access.save_variant(model, suspicious, folder)
    record_format(folder, prompt_format)
    return record


def train_variants(
    access: Access, suspicious: Path | str, variants: Sequence[Variant], prompt_format: PromptFormat
) -> list[dict[str, Any]]:
    """Train several variants and write each to its folder, all in one pass where only LoRA numbers train.

    Each ends where `train_variant` would have taken it, up to rounding. Peak memory: the base once, K adapters with
    their optimizer states, and the activations of `lengths.at_once` tokens.

    Args:
        access, suspicious, prompt_format: as in `train_variant`.
        variants: what to train; twins share their seed.

    Returns:
        the training record of each.
    """
    if access.low_rank_variants:
        return _train_in_one_pass(access, suspicious, variants, prompt_format)
    return [
        train_variant(access, suspicious, v.rows, prompt_format, v.seed, v.folder)
        for v in tqdm(variants, desc="variants")
    ]


def _train_in_one_pass(
    access: Access, suspicious: Path | str, variants: Sequence[Variant], prompt_format: PromptFormat
) -> list[dict[str, Any]]:
    model, starts = access.variant_starts(suspicious, [v.seed for v in variants])
    config, budget, lengths = model.peft_config["default"], access.settings.vaccine, access.profile.lengths
    jobs = [
        Job(v.rows, v.seed, start, f"variant {Path(v.folder).name}") for v, start in zip(variants, starts, strict=True)
    ]
    trained = train_multi_lora(model, jobs, prompt_format, budget, lengths.train_tokens, lengths.at_once, "variants")
    for variant, (tensors, _) in zip(variants, trained, strict=True):
        save_adapter(config, tensors, variant.folder)
        record_format(variant.folder, prompt_format)
    return [record for _, record in trained]
