"""All adapters in one pass: K LoRA adapters over one frozen base, every optimizer step moving all of them.

BD-VAX trains 2N adapters on the same base (Algorithm 1). One after the other, each of them reads and dequantizes the
whole base at every step, for a batch that keeps few of its arithmetic units busy. Here the batches of all adapters are
stacked, so that the base is read once, and the low-rank parts are batched products. Each adapter keeps its own rows,
order, loss, gradient clipping, optimizer state and learning-rate schedule: it ends where PEFT and the Trainer would
have taken it alone, up to rounding and, where base or adapter have dropout, other draws (`tests/test_together.py`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_scheduler

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_step
from helpers.core.profile import Budget
from helpers.data.example import Example
from helpers.model.architecture import capped, require_positions
from helpers.model.attention import true_attention_gradients
from helpers.model.batches import count_labels, encode_rows, pad
from helpers.model.prompt import IGNORED, PromptFormat
from helpers.train.finetune import SCHEDULES, row_order, training_record
from helpers.train.room import tokens_that_fit


@dataclass(frozen=True)
class Job:
    """What one adapter is trained on: its rows, the seed of their order, and the LoRA tensors it starts from.

    `name` tells it from the others when its training goes wrong.
    """

    rows: list[Example]
    seed: int
    start: dict[str, Tensor]
    name: str = "adapter"


class Place(NamedTuple):
    """A stacked layer and the shapes of its LoRA matrices."""

    layer: "StackedLora"
    down: torch.Size  # lora_A [r, in]
    up: torch.Size  # lora_B [out, r]


class StackedLora(nn.Module):
    """A frozen layer with K low-rank updates; a batch holds equally many rows of each adapter, one after the other."""

    def __init__(self, lora: LoraLayer, adapter: str = "default"):
        super().__init__()
        self.base_layer = lora.base_layer
        self.dropout = lora.lora_dropout[adapter]
        self.scaling = lora.scaling[adapter]
        self.down = self.up = None  # [K, r, in] and [K, out, r], set before every pass

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs [K * rows, tokens, in] to [K * rows, tokens, out], each part with its own update."""
        plain = self.base_layer(inputs)
        adapters = len(self.down)
        own = self.dropout(inputs).reshape(adapters, -1, inputs.shape[-1])
        low = torch.bmm(own, self.down.mT.to(own.dtype))
        stacked = plain.reshape(adapters, -1, plain.shape[-1])
        # the scale goes to the smallest factor: as `alpha` it would cost a pass over the whole output and its gradient
        return torch.baddbmm(stacked, self.scaling * low, self.up.mT.to(own.dtype)).view_as(plain)


class AdapterStack:
    """K adapters of one base as the rows of one matrix, so that each optimizer sees a single vector.

    The PEFT model is taken over: its LoRA layers give way to stacked ones.

    Args:
        model: a PEFT model with one LoRA adapter; decides which layers are adapted, r, alpha and dropout.
        starts: for each adapter its tensors under the names of an adapter file.

    Raises:
        LabError: tensors of other names or shapes than the model's own.
    """

    def __init__(self, model: PeftModel, starts: list[dict[str, Tensor]]):
        own = get_peft_model_state_dict(model)
        for start in starts:
            odd = [name for name in own.keys() | start.keys() if _shape(own, name) != _shape(start, name)]
            if odd:
                raise LabError(f"the adapters of one stack must have the same tensors; {min(odd)} differs")
        layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        self.places = [_stacked(model, name) for name in layers]
        self.names = [f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")]
        self.sizes = [shape.numel() for place in self.places for shape in (place.down, place.up)]
        device = next(model.parameters()).device
        self.numbers = torch.stack([self._flat(start) for start in starts]).to(device).requires_grad_()
        self.base = model.base_model.model
        self.base.requires_grad_(False)

    def attach(self, adapters: int) -> None:
        """Let the layers compute with the first `adapters` adapters; call it before every forward pass."""
        parts = iter(self.numbers[:adapters].split(self.sizes, dim=1))
        for place in self.places:
            place.layer.down = next(parts).unflatten(1, place.down)
            place.layer.up = next(parts).unflatten(1, place.up)

    def tensors(self, adapter: int) -> dict[str, Tensor]:
        """One adapter under the names of an adapter file, on the CPU."""
        shapes = [shape for place in self.places for shape in (place.down, place.up)]
        parts = self.numbers[adapter].detach().cpu().split(self.sizes)
        return {name: part.view(shape).clone() for name, part, shape in zip(self.names, parts, shapes, strict=True)}

    def _flat(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().flatten().cpu() for name in self.names])


def train_multi_lora(
    model: PeftModel,
    jobs: Sequence[Job],
    prompt_format: PromptFormat,
    budget: Budget,
    max_tokens: int,
    tokens_at_once: int | None = None,
    description: str = "training",
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Train one adapter for each job, all at once.

    Args:
        model: a PEFT model with one LoRA adapter over a frozen base, 4-bit or not; it is taken over by the stack.
        jobs: they may differ in their number of rows.
        prompt_format: the one that evaluation uses, too.
        budget: of every job (epochs, lr, batch_size, schedule, warmup).
        max_tokens: longer conversations are cut.
        tokens_at_once: a step whose rows hold more tokens than this is computed in parts (gradient accumulation):
            the same result with less memory, for their activations are what a pass needs beside the base. None: as
            many as `tokens_that_fit` finds.
        description: name of the progress bar.

    Returns:
        for each job (tensors of its adapter under the names of an adapter file, record with the keys of `finetune`);
        `seconds` is a job's share of the whole, by its steps.

    Raises:
        LabError: an adapter whose loss or gradient is not finite, by name, or a row that the model has no positions
            for.
    """
    started = time.perf_counter()
    runs = [_Rows(job, prompt_format, budget, max_tokens) for job in jobs]
    require_positions(model.config, max(len(row["input_ids"]) for rows in runs for row in rows.encoded))
    order = sorted(range(len(jobs)), key=lambda i: -runs[i].steps)  # who is done early stands at the end
    stack = AdapterStack(model, [jobs[i].start for i in order])
    stack.base.train()
    lanes = [_Lane(jobs[i].name, runs[i], stack.numbers[place], budget) for place, i in enumerate(order)]
    with true_attention_gradients():
        if tokens_at_once is None:
            tokens_at_once = _tokens_that_fit(stack, runs)
        for step in tqdm(range(lanes[0].rows.steps), desc=description, leave=False, delay=2):
            _step(stack, [lane for lane in lanes if step < lane.rows.steps], tokens_at_once)
    stack.base.eval()
    seconds = (time.perf_counter() - started) / sum(run.steps for run in runs)
    places = [order.index(i) for i in range(len(jobs))]
    return [
        (stack.tensors(place), run.record(seconds * run.steps, lanes[place].loss))
        for place, run in zip(places, runs, strict=True)
    ]


class _Rows:
    """The encoded rows of one job and the batches in which they come."""

    def __init__(self, job, prompt_format, budget, max_tokens):
        self.encoded = encode_rows(job.rows, prompt_format, max_tokens)
        self.size = budget.batch_size
        self.order = row_order([len(row["input_ids"]) for row in self.encoded], self.size, job.seed)
        self.steps = budget.epochs * math.ceil(len(self.encoded) / self.size)

    def batches(self):
        """Yield lists of rows, epoch after epoch, for ever."""
        while True:
            indices = list(self.order)
            for start in range(0, len(indices), self.size):
                yield [self.encoded[i] for i in indices[start : start + self.size]]

    def record(self, seconds, loss):
        """What training this job came to, as `finetune` tells it."""
        return training_record(self.encoded, self.steps, loss / self.steps, seconds)


class _Lane:
    """One adapter on its way: its batches, optimizer and schedule."""

    def __init__(self, name, rows, numbers, budget):
        self.name, self.rows, self.batches = name, rows, rows.batches()
        self.loss, self.step_loss, self.steps = 0.0, 0.0, 0
        self.numbers = nn.Parameter(numbers.detach())  # shares its memory with the stack
        self.optimizer = torch.optim.AdamW([self.numbers], lr=budget.lr, weight_decay=0.0, fused=True)
        self.schedule = get_scheduler(
            SCHEDULES[budget.schedule], self.optimizer, math.ceil(budget.warmup * rows.steps), rows.steps
        )

    def move(self, gradient, dtype):
        """Clip this adapter's gradient by its own norm and make one step; `dtype` is what the base computes in."""
        self.numbers.grad = gradient
        norm = nn.utils.clip_grad_norm_([self.numbers], 1.0).item()
        self.steps += 1
        require_finite_step(self.step_loss, norm, self.steps, self.schedule.get_last_lr()[0], dtype, self.name)
        self.optimizer.step()
        self.schedule.step()


def _tokens_that_fit(stack, runs):
    """How many tokens a part may hold on this device, measured on the longest row of every job."""
    longest = [max(run.encoded, key=lambda row: len(row["input_ids"])) for run in runs]
    width = max(len(row["input_ids"]) for row in longest)
    return tokens_that_fit(
        lambda: _backward(stack, longest, [count_labels(row) for row in longest]),
        width * len(longest),
        stack.numbers.device,
    )


def _step(stack, lanes, tokens_at_once):
    """One optimizer step of all lanes that still have rows."""
    batches = [next(lane.batches) for lane in lanes]
    counts = [sum(map(count_labels, batch)) for batch in batches]
    stack.numbers.grad = None
    for lane in lanes:
        lane.step_loss = 0.0
    for part in _parts(batches, tokens_at_once):
        for lane, loss in zip(lanes, _backward(stack, part, counts), strict=True):
            lane.step_loss += loss
    for place, lane in enumerate(lanes):
        lane.loss += lane.step_loss
        lane.move(stack.numbers.grad[place], stack.base.dtype)


def _backward(stack, part, counts):
    """Add a part's gradients; returns its share of each lane's loss, a mean over the `counts` of answer tokens."""
    stack.attach(len(counts))
    losses = _losses(stack.base, part, len(counts)) / torch.tensor(counts, device=stack.numbers.device)
    losses.sum().backward()
    return losses.tolist()


def _parts(batches, tokens_at_once):
    """Cut the batches of all lanes into equally high parts whose padded tokens stay below the limit.

    Yields:
        lists of rows, lane after lane, equally many for each; a lane that lacks rows gets copies without labels.
    """
    height = max(map(len, batches))
    ordered = [sorted(batch, key=lambda row: -len(row["input_ids"])) for batch in batches]
    width = max(len(batch[0]["input_ids"]) for batch in ordered)
    rows = max(1, tokens_at_once // (width * len(batches)))
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        yield [batch[i] if i < len(batch) else _unlabelled(batch[-1]) for batch in ordered for i in range(start, stop)]


def _unlabelled(row):
    return row | {"labels": [IGNORED] * len(row["labels"])}


def _losses(model, rows, lanes):
    """Cross-entropy summed over the answer tokens of each lane [lanes]; logits exist at those tokens only."""
    batch = {name: tensor.to(model.device) for name, tensor in pad(rows).items()}
    targets = batch.pop("labels")[:, 1:]
    hidden = model.base_model(**batch, use_cache=False)[0][:, :-1]
    labelled = targets != IGNORED
    logits = capped(model.get_output_embeddings()(hidden[labelled]), model.config).float()
    losses = nn.functional.cross_entropy(logits, targets[labelled], reduction="none")
    lane = labelled.nonzero()[:, 0] // (len(rows) // lanes)
    return losses.new_zeros(lanes).index_add(0, lane, losses)


def _stacked(model, name) -> Place:
    """Put a stacked layer where a LoRA layer was."""
    parent, lora = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
    layer = StackedLora(lora)
    down, up = (part["default"].weight.shape for part in (lora.lora_A, lora.lora_B))
    setattr(parent, name.rpartition(".")[2], layer)
    return Place(layer, down, up)


def _shape(tensors, name):
    return tensors[name].shape if name in tensors else None
