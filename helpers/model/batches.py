"""Rows of tokens, and batches of them."""

from collections.abc import Iterable, Sequence

import torch
from torch import LongTensor

from helpers.data.example import Example
from helpers.model.prompt import IGNORED, PromptFormat

Row = dict[str, list[int]]  # `input_ids` and `labels`, equally long


def encode_rows(examples: Iterable[Example], prompt_format: PromptFormat, max_tokens: int) -> list[Row]:
    """Turn examples into rows of tokens.

    Args:
        max_tokens: longer conversations are cut, see `PromptFormat.encode`.

    Returns:
        {"input_ids", "labels"} for each example; labels are -100 wherever there is nothing to learn.

    Raises:
        LabError: as `PromptFormat.encode`.
    """
    encoded = [prompt_format.encode(example, max_tokens) for example in examples]
    return [{"input_ids": ids, "labels": labels} for ids, labels in encoded]


def count_labels(row: Row) -> int:
    """The number of tokens of an encoded row that the loss falls on."""
    return sum(token != IGNORED for token in row["labels"])


def first_predicting(labels: LongTensor) -> int:
    """The position that predicts the first answer token of a batch: no logits before it are needed.

    Args:
        labels: [rows, tokens] of `pad`, with an answer in one of the rows at least.
    """
    return max(int((labels != IGNORED).any(dim=0).nonzero()[0]) - 1, 0)


def pad(rows: Sequence[Row]) -> dict[str, LongTensor]:
    """Pad on the left: answers then end together and the labelled positions form one block at the end.

    Returns:
        `input_ids`, `labels` (-100 on the padding), `attention_mask` (0 on the padding) and `position_ids` (from the
        first token on), each [rows, tokens].
    """
    width = max(len(row["input_ids"]) for row in rows)
    gaps = [width - len(row["input_ids"]) for row in rows]
    attention = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    return {
        "input_ids": torch.tensor([[0] * gap + row["input_ids"] for gap, row in zip(gaps, rows, strict=True)]),
        "labels": torch.tensor([[IGNORED] * gap + row["labels"] for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
