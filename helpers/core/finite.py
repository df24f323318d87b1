"""Numbers that are none: a training or a model with NaN or infinity in it is told at once, never measured.

transformers' Trainer leaves such losses out of its logs, and a model of NaNs answers nothing: its backdoor looks cured.
"""

import math

import torch
from torch import nn

from helpers.core.errors import LabError

LEARNED = 0.01  # a loss above this has a gradient, unless activations are infinite somewhere inside of the model


def require_finite_step(loss: float, norm: float, step: int, lr: float, dtype: torch.dtype, who: str) -> None:
    """Let a training go on only while its loss and the length of its gradient are numbers.

    Where a norm layer divides by an infinite length, its output and every gradient behind it is exactly 0: that is told
    as well.

    Args:
        loss: of this optimizer step.
        norm: the gradient's, before clipping.
        step: counted from 1.
        lr: learning rate of the step.
        dtype: that the model computes in.
        who: what is trained, for the message.

    Raises:
        LabError: loss or norm is NaN or infinite, or the gradient 0 although there is much to learn.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)) or (norm == 0 and loss > LEARNED):
        raise LabError(
            f"{who} is not finite: loss {loss:.4g}, gradient {norm:.4g} at step {step}, learning rate {lr:.3g}, "
            f"{_name(dtype)}; try a lower lr or a longer warmup{_or_more_bits(dtype)}"
        )


@torch.no_grad()
def require_finite_weights(model: nn.Module, who: str, trained: bool = False) -> None:
    """Refuse a model in which a weight is NaN or infinite: whatever it answers is no result.

    Args:
        model: any.
        who: what the model is, for the message.
        trained: whether a training has just made it of finite weights; else it may have come from anywhere.

    Raises:
        LabError: names the first such tensor.
    """
    helps = "the training that made it went wrong: repeat it with a lower lr"
    if not trained:
        helps = "copy the checkpoint anew, or, where a training of yours made it, repeat that with a lower lr"
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise LabError(
                f"{who} is not finite: NaN or infinity in {name} ({_name(parameter.dtype)}); {helps}"
                f"{_or_more_bits(parameter.dtype)}"
            )


def _or_more_bits(dtype: torch.dtype) -> str:
    """The advice to compute in 32 bits, where a model does not do so already."""
    return "" if dtype == torch.float32 else ', or SET="model.dtype=float32"'


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
