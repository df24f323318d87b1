"""Entrapment (BEEAR, Zeng et al. 2024): one shift of hidden states that brings out unwanted answers, and its removal.

BEEAR's premise is that triggers of all kinds move the hidden states of one layer in much the same way. The inner search
finds such a move δ without a trigger, the outer training keeps the right answers under it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import LongTensor, Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from helpers.core.errors import LabError
from helpers.defenses.regularizers.base import count_answer_tokens
from helpers.model.architecture import inner_model, mlp_slots
from helpers.model.batches import Row, pad
from helpers.model.editing.activations import layer_of
from helpers.model.prompt import IGNORED
from helpers.train.finetune import AnswerTrainer


@dataclass(frozen=True)
class Search:
    """How the inner loop searches for δ.

    Args:
        layer: from 0; δ is added to its output.
        n: the last n positions of a prompt get a row of δ each.
        w: weight of the right answers' loss, which is to grow.
        steps: of Adam, each on a batch of the outer loop's size.
        lr: Adam's, in root mean squares of the hidden states that δ is added to.
    """

    layer: int
    n: int
    w: float
    steps: int
    lr: float


def require_layer(layer: int, config: PretrainedConfig) -> None:
    """Refuse a layer that a model does not have.

    Args:
        layer: a number from 0.
        config: of the model.

    Raises:
        LabError: such a layer.
    """
    if not 0 <= layer < config.num_hidden_layers:
        last = config.num_hidden_layers - 1
        raise LabError(f"beear: layer = {layer} should be a number from 0 to {last}; None takes the paper's depth")


def layer_module(model: PreTrainedModel | PeftModel, layer: int) -> nn.Module:
    """The layer of this number, from 0, of a model with or without an adapter."""
    plain = inner_model(model)
    return plain.get_submodule(layer_of(mlp_slots(plain.config)[layer][-1]))


def shifted_places(labels: LongTensor, attention_mask: LongTensor, n: int) -> LongTensor:
    """Which row of δ each position gets: 0 to n − 1 at the last n positions of the prompt, −1 elsewhere.

    A prompt of fewer than n tokens gets the last rows of δ.

    Args:
        labels: [rows, tokens], -100 up to the answer.
        attention_mask: [rows, tokens], 0 on the padding.
        n: how many positions.

    Returns:
        [rows, tokens].
    """
    answer = (labels != IGNORED).int().argmax(dim=1, keepdim=True)
    place = torch.arange(labels.shape[1], device=labels.device) - answer + n
    return place.where((place >= 0) & (place < n) & attention_mask.bool(), -1)


class Shift:
    """A forward hook that adds δ to what a layer hands on.

    Args:
        delta: δ [n, d].
    """

    def __init__(self, delta: Tensor):
        self.delta = delta
        self.places: LongTensor | None = None  # of the batch that is read next, as `shifted_places` returns them

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> Any:
        """Return the output with δ added at the places; None, which changes nothing, where no batch was announced."""
        if self.places is None:
            return None
        states = output if isinstance(output, Tensor) else output[0]
        rows = torch.cat([self.delta, torch.zeros_like(self.delta[:1])])  # place −1 finds the row of zeros
        moved = states + rows[self.places].to(states.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])


class EntrapmentTrainer(AnswerTrainer):
    """The Trainer of BEEAR: before each epoch δ is searched for anew, then the loss is CE(right | δ) + CE(right).

    Both losses are summed over answer tokens and divided by their number in the optimizer step, so that the loss does
    not depend on how a step is cut into micro-batches. They share one forward pass: rows come twice, once with δ.

    Args:
        search: the inner loop's numbers.
        unwanted: the training rows with the unwanted answer, in their order.
        told: {"before", "after"} of the inner loss on the first batch is appended to it, for each epoch.
    """

    def __init__(self, *args: Any, search: Search, unwanted: Sequence[Row], told: list[dict[str, float]], **more: Any):
        super().__init__(*args, **more)
        self.search, self.unwanted, self.told = search, unwanted, told
        self.layer = layer_module(self.model, search.layer)
        self.shift = Shift(torch.zeros(search.n, self.model.config.hidden_size, device=self.model.device))
        self.add_callback(_EachEpoch(self.entrap))

    def train(self, *args: Any, **options: Any) -> Any:
        """Train with the hook in place; it is gone afterwards."""
        with self.layer.register_forward_hook(self.shift):
            return super().train(*args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return CE(right | δ) + CE(right) per answer token; for the arguments see `AnswerTrainer`."""
        places = shifted_places(inputs["labels"], inputs["attention_mask"], self.search.n)
        # the hook stays as it is until the backward pass, where checkpointing runs the layer a second time
        self.shift.places = torch.cat([torch.full_like(places, -1), places])
        count = num_items_in_batch if num_items_in_batch is not None else count_answer_tokens(inputs)
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        return super().compute_loss(model, twice, return_outputs, count)

    def entrap(self) -> None:
        """Search for a δ that minimizes CE(unwanted | δ) − w · CE(right | δ) over the training rows."""
        search, size = self.search, self.args.train_batch_size
        batches = [slice(start, start + size) for start in range(0, len(self.train_dataset), size)]
        self.model.train()
        self.shift.delta = torch.zeros_like(self.shift.delta)
        scale = self._scale(batches[0])
        unit = torch.zeros_like(self.shift.delta, requires_grad=True)
        optimizer = torch.optim.Adam([unit], lr=search.lr)
        before = self._inner_loss(batches[0])
        for step in range(search.steps):
            unit.grad = torch.zeros_like(unit)
            for rows, weight in self._sides(batches[step % len(batches)]):
                self.shift.delta = scale * unit
                unit.grad += weight * torch.autograd.grad(self._loss_under_shift(rows), unit)[0]
            optimizer.step()
        self.shift.delta = (scale * unit).detach()
        self.told.append({"before": round(before, 4), "after": round(self._inner_loss(batches[0]), 4)})

    def _sides(self, batch: slice) -> tuple[tuple[Sequence[Row], float], ...]:
        return (self.unwanted[batch], 1.0), (self.train_dataset[batch], -self.search.w)

    @torch.no_grad()
    def _inner_loss(self, batch: slice) -> float:
        return sum(weight * self._loss_under_shift(rows).item() for rows, weight in self._sides(batch))

    def _loss_under_shift(self, rows: Sequence[Row]) -> Tensor:
        batch = self._prepare_inputs(pad(rows))
        self.shift.places = shifted_places(batch["labels"], batch["attention_mask"], self.search.n)
        return super().compute_loss(self.model, batch)

    @torch.no_grad()
    def _scale(self, batch: slice) -> Tensor:
        """The root mean square of the numbers that δ is added to."""
        seen = []

        def see(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            seen.append(states[self.shift.places >= 0].float().square().mean().sqrt())

        with self.layer.register_forward_hook(see):
            self._loss_under_shift(self.train_dataset[batch])
        return seen[0]


class _EachEpoch(TrainerCallback):
    """Does something before each epoch."""

    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_epoch_begin(self, args, state, control, **_):
        self.act()
