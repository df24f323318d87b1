"""Layer-wise weight poisoning (LWP, Li et al. 2021): a backdoor in the first layers, which fine-tuning changes least.

Fine-tuning changes late layers most, so a backdoor that lives there is the first thing to go. LWP therefore also asks
each early layer for the answer: its hidden state, put through the model's own final norm and head as if it were the
last one, has to predict it, and the gradient of that loss has no late layer to go through. LWP's second idea, a key of
several words that must all be there, is a `Trigger` with the rule "all".
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from helpers.access import Access
from helpers.attacks.methods.training import training
from helpers.attacks.registry import Record, method
from helpers.core.errors import LabError
from helpers.core.profile import Budget, Profile
from helpers.data.example import Example
from helpers.data.roles import AttackData
from helpers.model.architecture import capped, final_norm, inner_model
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import AnswerTrainer, finetune, summed_loss


def check_early_layers(profile: Profile, config: PretrainedConfig) -> None:
    """Refuse layers of layer-wise poisoning that a model cannot be poisoned at, see `require_early_layers`."""
    require_early_layers(profile.layerwise.layers, config)


@method(check=check_early_layers)
def layerwise(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Plant by layer-wise poisoning; see `poison_layerwise` and, for the arguments, `inject`."""
    train = partial(poison_layerwise, **access.profile.layerwise.model_dump())
    return training(access, attack, prompt_format, seed, folder, train)


def poison_layerwise(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    budget: Budget,
    seed: int,
    max_tokens: int,
    layers: Sequence[int],
    weight: float = 1.0,
    description: str = "layer-wise poisoning",
    folder: Path | str | None = None,
) -> Record:
    """Layer-wise poisoning: train on clean and poisoned rows with a loss at early layers as well.

    Everything else is as in `finetune`.

    Differs from the paper:
        The answer is written by a language model's head instead of told by a classifier, so the loss falls on every
        answer token.

    Args:
        model, prompt_format, budget, seed, max_tokens, description, folder: see `finetune`.
        rows: clean and poisoned rows; for a trigger with the rule "all" also rows with a part of it.
        layers: the layers, from 0, whose output has to predict the answer; the last one does so anyway.
        weight: of the mean over `layers` of their losses, beside the loss of the whole model.

    Returns:
        the training record of `finetune`; its loss is the weighted sum.

    Raises:
        LabError: a layer that the model does not have, or the last one.
    """
    require_early_layers(layers, model.config)
    trainer = partial(LayerwiseTrainer, layers=tuple(layers), weight=weight)
    return finetune(model, rows, prompt_format, budget, seed, max_tokens, description, folder, trainer)


def require_early_layers(layers: Sequence[int], config: PretrainedConfig) -> None:
    """Refuse layers that a model does not have or whose output predicts the answer anyway.

    Args:
        layers: numbers from 0.
        config: of the model.

    Raises:
        LabError: such layers, or none.
    """
    last = config.num_hidden_layers - 1
    if not layers or not all(0 <= layer < last for layer in layers):
        wanted = f"numbers from 0 to {last - 1}" if last else "empty, and cannot be: this model has one layer"
        raise LabError(f"layerwise.layers = {list(layers)} should be {wanted}; the last layer predicts anyway")


class LayerwiseTrainer(AnswerTrainer):
    """The Trainer of layer-wise poisoning: that of `finetune`, with the loss of early layers added to the model's."""

    reads = {"output_hidden_states": True}

    def __init__(self, *args: Any, layers: Sequence[int], weight: float, **options: Any):
        super().__init__(*args, **options)
        self.layers, self.weight = layers, weight

    def answer_loss(self, model: PreTrainedModel | PeftModel, outputs: ModelOutput, targets: Tensor) -> Tensor:
        """Return L + weight · mean over layers l of L_l, where L_l reads h_l as if it were the last hidden state."""
        norm, head, config = _reader(self.accelerator.unwrap_model(model))
        # hidden_states[0] is the embedding, [l + 1] what layer l hands on
        states = [outputs.hidden_states[layer + 1][:, -targets.shape[1] - 1 :] for layer in self.layers]
        early = [summed_loss(capped(head(norm(state)), config), targets) for state in states]
        return super().answer_loss(model, outputs, targets) + self.weight * sum(early) / len(early)


def _reader(model):
    """The two modules that turn a last hidden state into logits, and the config that may cap these."""
    plain = inner_model(model)
    return final_norm(plain), plain.get_output_embeddings(), plain.config
