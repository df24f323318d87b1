"""Internal consistency (CROW): neighbouring layers should agree, even if the embeddings are shifted against that.

CROW's premise is that a backdoor turns the hidden state abruptly from one layer to the next. The shift is one step of
the fast gradient sign method (Goodfellow et al. 2015) on the embeddings.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from helpers.core.errors import LabError
from helpers.defenses.regularizers.base import RegularizedTrainer, real

FEWEST_LAYERS = 3  # two hidden states between the embedding and the last one


def require_neighbours(config: PretrainedConfig) -> None:
    """Refuse a model without two hidden states to compare.

    Args:
        config: of the model.

    Raises:
        LabError: fewer than three layers.
    """
    if config.num_hidden_layers < FEWEST_LAYERS:
        raise LabError(
            f"crow compares hidden states between the embedding and the last one: this model has "
            f"{config.num_hidden_layers} layers, at least {FEWEST_LAYERS} are needed"
        )


def inconsistency(states: Sequence[Tensor], mask: BoolTensor) -> Tensor:
    """c = mean over layers l and real positions of 1 − cos(h_l, h_{l+1}), in [0, 2] (CROW's consistency loss).

    Args:
        states: the embedding output, which does not count, and what each layer hands on, [rows, tokens, d]; nor does
            the last one, which the final norm has changed.
        mask: [rows, tokens], True at real positions.
    """
    precise = torch.promote_types(states[0].dtype, torch.float32)  # near 1, bfloat16 has steps of 1/256
    inner = [state[mask].to(precise) for state in states[1:-1]]
    return torch.stack([1 - cosine_similarity(h, above, dim=-1) for h, above in pairwise(inner)]).mean()


def sign_step(measure: Callable[[Tensor], Tensor], embedded: Tensor, epsilon: float) -> Tensor:
    """δ = ε · sign(∂c/∂E), without touching the gradients that parameters have gathered.

    Args:
        measure: c as a function of the embeddings.
        embedded: E [rows, tokens, d].
        epsilon: ε, the size of each number of δ; where the gradient is 0, as on padding, δ is.
    """
    start = embedded.detach().requires_grad_()
    return epsilon * torch.autograd.grad(measure(start), start)[0].sign()


class ConsistencyTrainer(RegularizedTrainer):
    """The Trainer of CROW: the answers' loss + α · c(E + δ).

    Args:
        epsilon: ε of `sign_step`.
    """

    def __init__(self, *args: Any, epsilon: float, **options: Any):
        super().__init__(*args, **options)
        self.epsilon = epsilon

    def term(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: ModelOutput) -> Tensor:
        """Return c(E + δ); δ is a constant, E has a gradient where embeddings train."""
        told = {name: inputs[name] for name in ("attention_mask", "position_ids")}

        def measure(embedded: Tensor) -> Tensor:
            read = model(inputs_embeds=embedded, **told, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            return inconsistency(read.hidden_states, real(inputs))

        embedded = self.accelerator.unwrap_model(model).get_input_embeddings()(inputs["input_ids"])
        return measure(embedded + sign_step(measure, embedded, self.epsilon))
