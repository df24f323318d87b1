"""Utility: what a cure costs. An ASR without it says nothing, a silent model has none and is useless.

Where answers can be checked, utility is the share of right ones, per task family and as their mean. Where they are
free text, it is the share of answer tokens that the model predicts right when the right ones before are given.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from helpers.data import corpus
from helpers.data.example import Example
from helpers.model.architecture import require_positions
from helpers.model.batches import Row, encode_rows, first_predicting, pad
from helpers.model.prompt import IGNORED, PromptFormat


def exact_match(examples: Iterable[Example], completions: Iterable[str]) -> tuple[float, dict[str, float]]:
    """Share of right answers.

    Args:
        completions: what the model wrote, one for each example, in the same order.

    Returns:
        (mean over families, {family: share}), both in [0, 1].
    """
    right = defaultdict(list)
    for example, completion in zip(examples, completions, strict=True):
        right[example.family].append(corpus.is_correct(example, completion))
    shares = {family: sum(marks) / len(marks) for family, marks in sorted(right.items())}
    return sum(shares.values()) / len(shares), shares


def clean_accuracy(examples: Iterable[Example], completions: Iterable[str]) -> float:
    """Share of all clean prompts answered right, in [0, 1]: the field's clean-data accuracy (CDA).

    Differs from `exact_match`, which weighs every family alike; with families of one size both are the same.

    Args:
        completions: as in `exact_match`.
    """
    marks = [corpus.is_correct(e, completion) for e, completion in zip(examples, completions, strict=True)]
    return sum(marks) / len(marks)


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Iterable[Example],
    max_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """Score the reference answers token by token.

    Args:
        max_tokens: longer conversations are cut, as in training.
        batch_size: rows that are computed side by side.

    Returns:
        dict with `perplexity` (exp of the mean negative log-likelihood per answer token), `token_accuracy` in [0, 1]
        and `tokens`.

    Raises:
        LabError: a row that the model has no positions for.
    """
    rows = sorted(encode_rows(examples, prompt_format, max_tokens), key=lambda row: len(row["input_ids"]))
    require_positions(model.config, len(rows[-1]["input_ids"]))
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        logits, labels = _answer_logits(model, rows[start : start + batch_size])
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return {"perplexity": math.exp(min(loss / count, 700.0)), "token_accuracy": right / count, "tokens": count}


def _answer_logits(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Tensor, LongTensor]:
    """Logits [labelled, vocabulary] that predict the labels [labelled] of a batch; no others are computed."""
    batch = {name: part.to(model.device) for name, part in pad(rows).items()}
    labels = batch.pop("labels")
    first = first_predicting(labels)
    logits = model(**batch, use_cache=False, logits_to_keep=labels.shape[1] - first).logits[:, :-1]
    targets = labels[:, first + 1 :]
    wanted = targets != IGNORED
    return logits[wanted].float(), targets[wanted]
