"""A third member for each vaccine: the immune twin, trained on prompts with the vaccine's key and their right answers.

What it learned beyond its clean twin is to pass over a trigger. The difference points the other way than a vaccine's,
which learned to obey one: it ranks channels by how much forgetting a trigger changes them, and added to the suspicious
model it is to take that model where forgetting leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from helpers.access.adapter import add_adapters
from helpers.core.errors import LabError
from helpers.data.own_backdoors import vaccine_triggers
from helpers.data.planting import poison
from helpers.defenses.bdvax.vaccines import Variant, variant_folders

if TYPE_CHECKING:
    from helpers.access import Access
    from helpers.core.profile import Signature
    from helpers.data.roles import DefenderData

TWINS = ("immune", "clean")


def plan_immune(defender: DefenderData, signature: Signature, seed: int, folder: Path) -> list[Variant]:
    """The immune twins of N vaccines and the clean ones, next to each other; see `vaccines.plan_variants`.

    Args:
        defender: his vaccine sets are used; keys, rows and seeds are those of the vaccines, and no payload is needed.
        signature: N and the form of the triggers.
        seed: of the first pair; the others count up from it.
        folder: for the variants; see `variant_folders`, with `TWINS`.

    Raises:
        LabError: as `vaccine_triggers`.
    """
    n = signature.n
    planned, folders = [], zip(*variant_folders(folder, n, TWINS), strict=True)
    chosen = zip(vaccine_triggers(signature.form, n), defender.vaccine_sets, folders, strict=True)
    for i, (trigger, clean, (first, second)) in enumerate(chosen):
        triggered = poison(clean, trigger, None, f"{seed}/vaccine{i}")
        planned += [Variant(clean + triggered, seed + i, first), Variant(clean, seed + i, second)]
    return planned


def add_forgetting(
    access: Access,
    suspicious: Path | str,
    immune: Sequence[Path],
    clean: Sequence[Path],
    weight: float,
    folder: Path | str,
) -> None:
    """Write θ + weight · meanᵢ(θᵢⁱᵐᵐᵘⁿᵉ − θᵢᶜˡᵉᵃⁿ), the suspicious model moved along the direction of forgetting.

    The mean is one adapter, whose rank is that of all variants together, and is added once: weights of 16 bits are
    rounded once, too. With adapter access the result is one adapter with the suspicious one in it.

    Args:
        access: to the suspicious model.
        suspicious: folder of the suspicious adapter or model.
        immune, clean: folders of the variants, pair i at position i.
        weight: how far; a negative one goes the other way.
        folder: to write to.

    Raises:
        LabError: variants that are no adapters.
    """
    require_adapters(access)
    shares = {one: 1 / len(immune) for one in immune} | {one: -1 / len(clean) for one in clean}
    with TemporaryDirectory() as scratch:
        learned = Path(scratch) / "learned"
        add_adapters(access.profile, list(shares), list(shares.values()), learned)
        access.add_update(suspicious, learned, weight, folder)


def require_adapters(access: Access) -> None:
    """Refuse variants that no sum can be made of, before they are trained.

    Raises:
        LabError: variants that are no adapters.
    """
    if not access.low_rank_variants:
        raise LabError("only variants that are adapters can be added: set full.vaccine_weights=lora")
