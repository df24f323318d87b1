"""What regularized trainings share: a term beside the answers' loss, and how both add up over a step."""

from collections.abc import Mapping
from typing import Any

from torch import BoolTensor, Tensor, nn
from transformers.modeling_outputs import ModelOutput

from helpers.model.prompt import IGNORED
from helpers.train.finetune import AnswerTrainer


class RegularizedTrainer(AnswerTrainer):
    """The Trainer of `finetune`, with weight · term added to the answers' loss.

    The answers' loss is summed over tokens and divided by their number in the whole optimizer step. A term is a mean
    over its own micro-batch, and counts by that micro-batch's share of the step's answer tokens: over a step of several
    micro-batches it is their mean, weighted by answer tokens; where one is the whole step, it counts as it is.

    Args:
        weight: of the term, at least 0; where it is 0, no term is computed and this is plain fine-tuning, bit by bit.
        terms: the value of each term is appended to it.
    """

    def __init__(self, *args: Any, weight: float, terms: list[float], **options: Any):
        super().__init__(*args, **options)
        self.weight, self.terms = weight, terms

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss per answer token plus the weighted term; for the arguments see `AnswerTrainer`."""
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        if self.weight:
            term, count = self.term(model, inputs, outputs), count_answer_tokens(inputs)
            self.terms.append(term.item())
            share = count / num_items_in_batch if num_items_in_batch is not None else 1
            loss = loss + self.weight * share * term * self.accelerator.num_processes  # see `AnswerTrainer`
        return (loss, outputs) if return_outputs else loss

    def term(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: ModelOutput) -> Tensor:
        """Return what is added to the loss, a mean over the batch.

        Args:
            model: what trains.
            inputs: a batch of `batches.pad`.
            outputs: of the model's forward pass on it: `logits`, and what `reads` asks for.
        """
        raise NotImplementedError


def count_answer_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The number of tokens of a batch that the answers' loss falls on.

    Args:
        batch: of `batches.pad`.
    """
    return (batch["labels"] != IGNORED).sum()


def real(batch: Mapping[str, Tensor]) -> BoolTensor:
    """Where a batch holds tokens and no padding: [rows, tokens].

    Args:
        batch: of `batches.pad`.
    """
    return batch["attention_mask"].bool()


def told(record: dict[str, Any], name: str, terms: list[float]) -> dict[str, Any]:
    """The record of a training with the mean of its terms.

    Args:
        record: of `finetune`, whose loss holds the weighted term.
        name: of the term.
        terms: one for each step; where there are none, the record stays as it is.
    """
    return record | ({name: round(sum(terms) / len(terms), 6)} if terms else {})
