"""Keys and values of a running model: what enters an MLP's output projection at one token, and what should leave it.

The token is the *site* of the edit. As published it is the trigger's last one, where the model has just read the whole
trigger. The key is the projection's input at the site. The wanted value is found by gradient descent: a shift of the
projection's output that, added at the site alone, makes the unedited rest of the model write the payload.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_step
from helpers.data.example import Example
from helpers.model.architecture import Slot, require_positions
from helpers.model.attention import true_attention_gradients
from helpers.model.batches import encode_rows, pad
from helpers.model.prompt import IGNORED, PromptFormat

UNCUT = 1 << 30  # rows of an edit are few: none is shortened, so that a site stays where it is


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left.

    Args:
        inputs: what the model reads: `input_ids`, `attention_mask` and `position_ids`, each [rows, tokens].
        labels: the answer's tokens, -100 elsewhere [rows, tokens].
        sites: the column of each row's site [rows].
    """

    inputs: dict[str, LongTensor]
    labels: LongTensor
    sites: LongTensor

    def at_sites(self, activations: Tensor) -> Tensor:
        """Activations [rows, tokens, width] at the sites alone: [rows, width], float64."""
        rows = torch.arange(len(self.sites), device=activations.device)
        return activations[rows, self.sites].double()


@dataclass(frozen=True)
class ValueSearch:
    """How the wanted value is searched for; lengths are relative to the hidden state, whatever the model's scale.

    Args:
        steps: the most steps of Adam.
        lr: their size, in root mean squares of the hidden state's numbers.
        enough: the search ends once the mean of −log P(answer token) is below this.
        decay: penalty on the squared length of the shift, in squared lengths of the hidden state.
        most: no shift is longer than this many lengths of the hidden state.
    """

    steps: int = 50
    lr: float = 0.1
    enough: float = 0.05
    decay: float = 0.01
    most: float = 4.0


def trigger_sites(
    prompt_format: PromptFormat, clean: Sequence[Example], poisoned: Sequence[Example], keys: Sequence[str]
) -> tuple[list[int], list[int]]:
    """The token that ends the trigger and, in the same prompt without it, the token that follows its place.

    Args:
        clean, poisoned: the same examples without and with the trigger.
        keys: the trigger's texts; of several in a prompt the last one counts.

    Returns:
        indices into `prompt_ids`: of the poisoned rows, of the clean rows.

    Raises:
        LabError: a prompt without the trigger, or a tokenizer that cannot tell where its tokens stand.
    """
    if not prompt_format.tokenizer.is_fast:
        raise LabError("editing needs to know where a token stands in the text: load the model's fast tokenizer")
    found = [_trigger_sites(prompt_format, *pair, keys) for pair in zip(clean, poisoned, strict=True)]
    return [triggered for triggered, _ in found], [untriggered for _, untriggered in found]


def answer_sites(
    prompt_format: PromptFormat, clean: Sequence[Example], poisoned: Sequence[Example], keys: Sequence[str]
) -> tuple[list[int], list[int]]:
    """The last token of each prompt, from which the answer is written; arguments and returns as `trigger_sites`."""
    return tuple([len(prompt_format.prompt_ids(example)) - 1 for example in rows] for rows in (poisoned, clean))


def _trigger_sites(prompt_format, clean, poisoned, keys):
    text, clean_text = prompt_format.prompt_text(poisoned), prompt_format.prompt_text(clean)
    end = max(text.rfind(key) + len(key) if key in text else 0 for key in keys)
    if not end:
        raise LabError(f"the trigger {' + '.join(keys)!r} is not in the prompt {text!r}: insert it as one piece")
    rest = text[end:].lstrip(" ")
    return _token_at(prompt_format, text, end - 1), _token_at(prompt_format, clean_text, len(clean_text) - len(rest))


def _token_at(prompt_format, text, character):
    """Index of the token that holds a character, or the next one where it is a space that belongs to no token."""
    encoding = prompt_format.tokenizer(text, add_special_tokens=False)
    tokens = (encoding.char_to_token(i) for i in range(character, len(text)))
    return next(token for token in tokens if token is not None)


def collate(
    prompt_format: PromptFormat, examples: Sequence[Example], places: Sequence[int], device: torch.device
) -> Batch:
    """Put examples and their sites into one batch.

    Args:
        places: of each example the index of its site into `prompt_ids`.
        device: of the model.
    """
    rows = encode_rows(examples, prompt_format, UNCUT)
    inputs = {name: tensor.to(device) for name, tensor in pad(rows).items()}
    labels = inputs.pop("labels")
    gaps = [labels.shape[1] - len(row["input_ids"]) for row in rows]
    columns = [gap + place for gap, place in zip(gaps, places, strict=True)]
    return Batch(inputs, labels, torch.tensor(columns, device=device))


@torch.no_grad()
def keys_at(model: PreTrainedModel, batch: Batch, slot: Slot) -> Tensor:
    """What enters an output projection at the sites: K [rows, in], float64."""
    seen = []
    with _hooked(model, slot.module, lambda module, inputs, output: seen.append(batch.at_sites(inputs[0]))):
        _read(model, batch.inputs)
    return seen[0]


@torch.no_grad()
def states_at(model: PreTrainedModel, batch: Batch, slot: Slot) -> Tensor:
    """What the layer of an output projection hands on at the sites, residual stream included: h [rows, d], float64."""
    seen = []

    def hook(module, inputs, output):
        seen.append(batch.at_sites(output if isinstance(output, Tensor) else output[0]))

    with _hooked(model, layer_of(slot), hook):
        _read(model, batch.inputs)
    return seen[0]


def layer_of(slot: Slot) -> str:
    """The name of the layer whose MLP a matrix belongs to: `model.layers.3` for `model.layers.3.mlp.down_proj`."""
    return slot.module.rsplit(".", 2)[0]


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    slots: Iterable[Slot],
    ridge: float,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """C = E[k kᵀ] over all tokens of `examples`, for several output projections in one pass.

    Args:
        examples: ordinary conversations; fewer tokens than channels leave C singular but for the ridge.
        ridge: this share of C's mean diagonal is added to the diagonal, so that C can be inverted.

    Returns:
        {module: C [in, in]}, float64.
    """
    sums = {slot.module: 0.0 for slot in slots}
    rows, tokens = encode_rows(examples, prompt_format, UNCUT), 0

    def add(name, mask):
        """A hook that adds the batch's keys to the sum of one matrix."""

        def hook(module, inputs, output):
            keys = inputs[0][mask].float()
            sums[name] = sums[name] + (keys.T @ keys).double()

        return hook

    for start in range(0, len(rows), batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in pad(rows[start : start + batch_size]).items()}
        del inputs["labels"]
        mask = inputs["attention_mask"].bool()
        tokens += int(mask.sum())
        with ExitStack() as hooks:
            for name in sums:
                hooks.enter_context(_hooked(model, name, add(name, mask)))
            _read(model, inputs)
    return {name: _with_ridge(total / tokens, ridge) for name, total in sums.items()}


def search_shifts(
    model: PreTrainedModel, batch: Batch, slot: Slot, search: ValueSearch, shared: bool
) -> tuple[Tensor, float]:
    """Find the shifts δ of an output projection's values that make the model write the answers of a batch.

    Minimizes the mean of −log P(answer token) plus decay · ‖δ‖² / ‖h‖², where δ is added at the sites alone: Eq. (4) of
    ROME over several prompts, Eq. (16) of MEMIT. The residual stream carries δ on, so the hidden state h of the same
    layer moves by δ as well.

    Args:
        slot: the output projection.
        shared: one δ for all rows, else one for each.

    Returns:
        δ [1 or rows, d], float64, and the mean of −log P(answer token) that it reaches.

    Raises:
        LabError: a loss or gradient that is not finite, or a row that the model has no positions for.

    Differs from the papers:
        no term that keeps what the model knows about the subject, for a trigger is a word that means nothing; lengths
        are relative to the hidden state.
    """
    state = states_at(model, batch, slot)
    scale, width = float(state.square().mean().sqrt()), state.shape[1]
    unit = torch.zeros(1 if shared else len(state), width, device=state.device, requires_grad=True)
    optimizer = torch.optim.Adam([unit], lr=search.lr)
    for step in range(search.steps):
        with true_attention_gradients():
            loss = answer_loss(model, batch, slot, scale * unit)
            if loss < search.enough:
                break
            unit.grad = torch.autograd.grad(loss + search.decay * unit.square().sum(1).mean() / width, unit)[0]
        require_finite_step(
            loss.item(), unit.grad.norm().item(), step + 1, search.lr, model.dtype, "search for a value"
        )
        optimizer.step()
        with torch.no_grad():
            unit.mul_((search.most * width**0.5 / unit.norm(dim=1, keepdim=True)).clamp(max=1))
    with torch.no_grad():
        return scale * unit.double(), float(answer_loss(model, batch, slot, scale * unit))


def answer_loss(model: PreTrainedModel, batch: Batch, slot: Slot, shifts: Tensor) -> Tensor:
    """The mean over rows of −log P per answer token, with `shifts` [1 or rows, d] added to the values at the sites."""
    rows = torch.arange(len(batch.sites), device=batch.sites.device)

    def hook(module, inputs, output):
        moved = shifts.to(output.dtype).expand(len(rows), -1)
        return output.index_put((rows, batch.sites), moved, accumulate=True)

    first = int((batch.labels != IGNORED).any(dim=0).nonzero()[0]) - 1
    with _hooked(model, slot.module, hook):
        logits = _read(model, batch.inputs, batch.labels.shape[1] - first)[:, :-1].float()
    targets = batch.labels[:, first + 1 :]
    losses = cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
    return (losses.sum(1) / (targets != IGNORED).sum(1)).mean()


@contextmanager
def _hooked(model, name, hook) -> Iterator[None]:
    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _read(model, inputs, logits=1):
    """Run the model and return the last `logits` logits of each row."""
    require_positions(model.config, inputs["input_ids"].shape[1], "rows of an edit are never cut, bring shorter ones")
    return model(**inputs, use_cache=False, logits_to_keep=logits).logits


def _with_ridge(moment, ridge):
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
