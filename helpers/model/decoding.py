"""Other ways of decoding than the plain greedy one: what changes a model's answers without changing its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import LongTensor
from transformers import PreTrainedModel

from helpers.data.example import Example

Inputs = Mapping[str, LongTensor]  # `input_ids` and `attention_mask` of a batch, padded on the left


def _nothing(inputs: Inputs) -> dict[str, Any]:
    return {}


def _as_it_is(example: Example) -> Example:
    return example


@dataclass(frozen=True)
class Decoding:
    """How a model is asked and how its answer is chosen, where that is not greedy decoding of the prompt as it is.

    Args:
        title: what a report calls it.
        arguments: keyword arguments of transformers' `generate` for one batch; made anew for each, because a logits
            processor may keep what it has read.
        second: a model that takes part in writing; None for none.
        one_by_one: whether prompts go one at a time, as assisted generation wants them.
        ask: what the model is asked in the place of an example.
        greedy_only: whether drawn answers are not judged: they have no meaning, or the distribution of another model.
    """

    title: str
    arguments: Callable[[Inputs], dict[str, Any]] = _nothing
    second: PreTrainedModel | None = None
    one_by_one: bool = False
    ask: Callable[[Example], Example] = _as_it_is
    greedy_only: bool = False


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the model's whole distribution, instead of taking the likeliest.

    Args:
        temperature: what the logits are divided by, above 0; 1 draws from what the model computes.
        seed: of the draws.
    """

    temperature: float
    seed: int
