"""Attention maps and their distillation (NAD, Li et al. 2021): a student looks where its teacher looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from helpers.defenses.regularizers.base import RegularizedTrainer, real


def attention_map(states: Tensor, mask: BoolTensor) -> Tensor:
    """A(F) = Σ over features of |h|², of length 1 over the real tokens of a row (NAD §3.2, A_sum with p = 2).

    Args:
        states: F, what a layer hands on: [rows, tokens, d].
        mask: [rows, tokens], True at real tokens.

    Returns:
        [rows, tokens], 0 on padding.
    """
    return normalize(states.float().square().sum(-1).masked_fill(~mask, 0), dim=1)


def map_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: BoolTensor) -> Tensor:
    """Σ over layers l of MSE(A(F_s), A(F_t)): for each row the mean over its real tokens, then the mean over rows.

    Args:
        student, teacher: F of the same layers, [rows, tokens, d] each.
        mask: as in `attention_map`.
    """
    pairs = zip(student, teacher, strict=True)
    gaps = torch.stack([attention_map(ours, mask) - attention_map(theirs, mask) for ours, theirs in pairs])
    return (gaps.square().sum(-1) / mask.sum(1)).mean(1).sum()


class DistillingTrainer(RegularizedTrainer):
    """The Trainer of NAD: the answers' loss + β · `map_distance` to a teacher.

    The layers are all whose output is a hidden state of its own: not the embedding, nor the last one, which has gone
    through the final norm.

    Args:
        teacher: a model of the same architecture, which does not train.
    """

    reads = {"output_hidden_states": True}

    def __init__(self, *args: Any, teacher: PreTrainedModel, **options: Any):
        super().__init__(*args, **options)
        self.teacher = teacher.eval().requires_grad_(False)

    def term(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: ModelOutput) -> Tensor:
        """Return the distance of the student's attention maps from the teacher's."""
        read = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad():
            taught = self.teacher(**read, use_cache=False, logits_to_keep=1, **self.reads)
        return map_distance(outputs.hidden_states[1:-1], taught.hidden_states[1:-1], real(inputs))
