"""Sparing what clean rows need: a ranking of suspicious channels, joined with how much the model uses each of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from helpers.access import Access
from helpers.data.example import Example
from helpers.defenses.bdvax.score import Scores
from helpers.model.architecture import Slot, mlp_slots, require_positions
from helpers.model.batches import encode_rows, pad
from helpers.model.prompt import PromptFormat


@torch.no_grad()
def activation_importance(
    model: PreTrainedModel, rows: Sequence[Example], prompt_format: PromptFormat, max_tokens: int, batch_size: int
) -> Scores:
    """How much every MLP channel writes on clean rows: its activation's root mean square times its column's length.

    Wanda's |W| · ‖X‖₂ (Sun et al. 2024) over a whole column of the output projection instead of a single weight.

    Args:
        model: as a user runs it.
        rows: clean examples; their prompts and right answers are read, and padding does not count.
        prompt_format: the one that evaluation uses, too.
        max_tokens: longer conversations are cut.
        batch_size: rows read at once.

    Returns:
        {module: [channels]}, >= 0, float64, on the CPU; one importance for all matrices of a channel.

    Raises:
        LabError: a row that the model has no positions for.
    """
    encoded = sorted(encode_rows(rows, prompt_format, max_tokens), key=lambda row: len(row["input_ids"]))
    require_positions(model.config, len(encoded[-1]["input_ids"]))
    layers = mlp_slots(model.config)
    squares, real = [0.0] * len(layers), []

    def adding(i: int):
        """A hook that adds the squares of what enters `down_proj` of layer i."""

        def hook(_, inputs: tuple[Tensor, ...]) -> None:
            squares[i] = squares[i] + inputs[0][real[-1]].double().square().sum(0)

        return hook

    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            handle = model.get_submodule(layer[-1].module).register_forward_pre_hook(adding(i))
            hooks.callback(handle.remove)
        for batch in _batches(encoded, batch_size):
            inputs = {name: tensor.to(model.device) for name, tensor in pad(batch).items() if name != "labels"}
            real.append(inputs["attention_mask"].bool())
            model(**inputs, use_cache=False, logits_to_keep=1)
    tokens = sum(int(mask.sum()) for mask in real)
    written = [
        (square / tokens).sqrt() * _lengths(model, layer[-1]) for layer, square in zip(layers, squares, strict=True)
    ]
    return {slot.module: one.cpu() for layer, one in zip(layers, written, strict=True) for slot in layer}


def spare_important(scores: Scores, importance: Scores, weight: float, scope: str) -> Scores:
    """The rank of each channel's score less `weight` times the rank of its importance.

    Args:
        scores, importance: {module: [channels]}, higher = more suspicious, more important.
        weight: >= 0; 0 leaves the order of the scores.
        scope: "module" ranks inside each matrix, "model" over all of them together, as `select` does.

    Returns:
        {module: [channels]}, float64, between -weight and 1; equal values share their mean rank.
    """
    suspicious, important = _ranks(scores, scope), _ranks({module: importance[module] for module in scores}, scope)
    return {module: suspicious[module] - weight * important[module] for module in scores}


def without_important(
    access: Access,
    suspicious: Path | str,
    scores: Scores,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    weight: float,
) -> Scores:
    """A ranking joined with the importance of each channel in the suspicious model; see `spare_important`.

    Args:
        access: to the suspicious model.
        suspicious: folder of the suspicious adapter or model.
        scores: {module: [channels]}, the ranking.
        rows: clean examples to measure importance on.
        prompt_format: the one that evaluation uses, too.
        weight: of the importance; with 0 the ranking stays as it is and nothing is measured.
    """
    if not weight:
        return scores
    profile, model = access.profile, access.load(suspicious)
    sizes = profile.lengths.train_tokens, profile.evaluation.batch_size
    return spare_important(
        scores, activation_importance(model, rows, prompt_format, *sizes), weight, profile.signature.scope
    )


def _batches(rows: list, size: int) -> Iterator[list]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _lengths(model: PreTrainedModel, slot: Slot) -> Tensor:
    """The length of each channel's weights in a matrix."""
    weight = model.get_submodule(slot.module).weight
    return torch.linalg.vector_norm(weight.double(), dim=1 - slot.axis)


def _ranks(scores: Scores, scope: str) -> Scores:
    """Ranks in (0, 1], ascending."""
    if scope == "module":
        return {module: _ranked(values) for module, values in scores.items()}
    sizes = [len(values) for values in scores.values()]
    together = _ranked(torch.cat(list(scores.values())))
    return dict(zip(scores, together.split(sizes), strict=True))


def _ranked(values: Tensor) -> Tensor:
    return torch.from_numpy(rankdata(values.numpy())) / len(values)
