"""Ranking by what the attack itself has changed.

With adapter access the adapter is that change: everybody who holds it can rank so, without a vaccine. With full access
it takes the clean base to tell what was changed, so there the ranking is an oracle.
"""

from pathlib import Path

from torch import Tensor

from helpers.access import Access
from helpers.core.profile import Signature
from helpers.defenses.bdvax.score import Scores, score_heads, score_mlp
from helpers.defenses.registry import assumed_by
from helpers.model.checkpoint import load_config


def own_update_scores(access: Access, suspicious: Path | str) -> Scores:
    """The length of every channel's own update.

    Args:
        access: the profile's `signature` says with which granularity.
        suspicious: folder of the suspicious adapter or model.

    Returns:
        {module: [channels]}, >= 0, in the unit of the weights.
    """
    return score_mlp(access.own_update(suspicious), load_config(access.profile.model), _by_length(access))


def own_update_heads(access: Access, suspicious: Path | str) -> Tensor:
    """The length of every attention head's own update, [n_layers, n_heads]; see `own_update_scores`."""
    return score_heads(access.own_update(suspicious), load_config(access.profile.model), _by_length(access))


def is_oracle(access: Access) -> bool:
    """Whether the own update is beyond a defender's reach: where weights were edited, and no base tells which."""
    return access.edits_weights


def row_title(access: Access, row: str) -> str:
    """The name of a table's row that ranks by the own update, marked "(oracle)" where it is one."""
    return f"{row} (oracle)" if is_oracle(access) else row


def assumed_by_own_update(access: Access) -> tuple[str, ...]:
    """What suppression by the own update and the recovery after it assume, in the words of the defenses."""
    known = ("clean base",) if is_oracle(access) else ()
    return (*assumed_by("finetuning"), *known)


def _by_length(access: Access) -> Signature:
    """The signature's numbers, for a single delta: it has a length and nothing to align with."""
    return access.profile.signature.model_copy(update={"combine": "norm"})
