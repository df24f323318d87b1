"""The cure once a ranking is there: suppress what it puts first, then recover (BD-VAX §4.2 and §4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.select import select_suppressed

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.access import Access
    from helpers.data.example import Example
    from helpers.defenses.bdvax.score import Scores
    from helpers.model.prompt import PromptFormat


def suppress_and_recover(
    access: Access,
    start: Path | str,
    scores: Scores,
    head_scores: Tensor,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> dict[str, Any]:
    """Suppress the channels and heads that score highest and fine-tune the rest on clean rows.

    Args:
        access: what may be edited; its `suppress` and `recover` numbers are used.
        start: folder of the adapter or model to suppress.
        scores, head_scores: {module: [channels]} and [n_layers, n_heads], any ranking.
        rows: clean examples to recover with.
        prompt_format: the one that evaluation uses, too.
        seed: of what takes the place of weights, and of the order of the rows.
        folder: to write to: the suppressed model to `cut` in it, the recovered one to `model`.

    Returns:
        the record of `recover`.

    Raises:
        LabError: as `select_suppressed` and `Access.suppress`.
    """
    cut, recovered = Path(folder) / "cut", Path(folder) / "model"
    masks, heads = select_suppressed(access, scores, head_scores)
    access.suppress(start, masks, seed, cut, heads)
    return recover(access, cut, rows, prompt_format, seed, recovered)
