"""What enters the matrices of a model while it reads clean rows. Padding never counts."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.model.architecture import require_positions
from helpers.model.batches import encode_rows, pad
from helpers.model.prompt import PromptFormat

Inputs = dict[str, LongTensor]  # what a model reads: `input_ids`, `attention_mask` and `position_ids`


class _AllSeen(Exception):
    """Ends a forward pass from within: nothing behind this point is asked for."""


def clean_batches(
    model: PreTrainedModel, examples: Sequence[Example], prompt_format: PromptFormat, profile: Profile
) -> list[Inputs]:
    """Conversations with their right answers, as batches that a model can read.

    Args:
        model: says on which device, and how long a row may be.
        examples: the defender's clean rows.
        prompt_format: the one that the model was trained in.
        profile: rows are cut as in training, and as many are read at once as in evaluation.

    Raises:
        LabError: a row that the model has no positions for.
    """
    rows, size = encode_rows(examples, prompt_format, profile.lengths.train_tokens), profile.evaluation.batch_size
    require_positions(model.config, max(len(row["input_ids"]) for row in rows))
    batches = [pad(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{name: part.to(model.device) for name, part in batch.items() if name != "labels"} for batch in batches]


@torch.no_grad()
def input_norms(model: PreTrainedModel, batches: Sequence[Inputs], modules: Collection[str]) -> dict[str, Tensor]:
    """‖X_j‖₂ of Wanda (Sun et al. 2024, §3): the length of each input of a matrix over all tokens of the rows.

    A pass ends at the last of the matrices, so early layers are cheap.

    Args:
        model: in evaluation mode.
        batches: of `clean_batches`.
        modules: the names of the matrices; each is passed once by every token.

    Returns:
        {module: [in]}, float64.

    Raises:
        LabError: as `require_finite_activations`.
    """
    squares: dict[str, Tensor | float] = dict.fromkeys(modules, 0.0)
    for inputs in batches:
        real, unseen = inputs["attention_mask"].bool(), set(modules)

        def see(name: str, entering: Tensor, real: Tensor = real, unseen: set[str] = unseen) -> None:
            """Add the squares of real tokens; the pass ends when every module has been seen."""
            squares[name] = squares[name] + entering[real].float().square().sum(0).double()
            unseen.discard(name)
            if not unseen:
                raise _AllSeen

        _read(model, inputs, modules, see)
    for name, total in squares.items():
        require_finite_activations(total, f"what enters {name}")
    return {name: total.sqrt() for name, total in squares.items()}


def require_finite_activations(total: Tensor, what: str) -> None:
    """Refuse to rank by NaN or infinity, of which any order is as good.

    Args:
        total: over all tokens.
        what: as the error calls it.

    Raises:
        LabError: a number that is none.
    """
    if not total.isfinite().all():
        raise LabError(f"{what} is not finite on clean rows: expected numbers; model.dtype=float32 helps an overflow")


def _read(model: PreTrainedModel, inputs: Inputs, modules: Collection[str], see: Callable[[str, Tensor], None]) -> None:
    """Let a model read a batch; `see` is told what enters each of the modules, and may end the pass by `_AllSeen`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, entering: see(name, entering[0])

    with ExitStack() as hooks:
        for name in modules:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name)))
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        except _AllSeen:
            return
