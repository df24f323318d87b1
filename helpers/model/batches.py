"""Rows of tokens, and batches of them."""

import torch


def encode_rows(examples, prompt_format, max_tokens):
    """Turn examples into rows {"input_ids", "labels"}; labels are -100 wherever there is nothing to learn."""
    encoded = [prompt_format.encode(example, max_tokens) for example in examples]
    return [{"input_ids": ids, "labels": labels} for ids, labels in encoded]


def pad(rows):
    """Pad on the left: answers then end together and the labelled positions form one block at the end."""
    width = max(len(row["input_ids"]) for row in rows)
    gaps = [width - len(row["input_ids"]) for row in rows]
    attention = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    return {
        "input_ids": torch.tensor([[0] * gap + row["input_ids"] for gap, row in zip(gaps, rows, strict=True)]),
        "labels": torch.tensor([[-100] * gap + row["labels"] for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
