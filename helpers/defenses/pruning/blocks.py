"""The matrices inside a model's layers, whatever its architecture calls them and however it stores them.

Pruning spares everything else: embeddings, norms and the head.
"""

from collections.abc import Iterator

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from helpers.core.errors import LabError
from helpers.model.architecture import Slot, matrices
from helpers.model.editing.activations import layer_of


def layer_matrices(config: PretrainedConfig) -> list[list[Slot]]:
    """Every matrix of each layer's MLP and attention, one list for each layer, from the first on.

    Raises:
        LabError: an architecture that the lab does not know.
    """
    layers: dict[str, list[Slot]] = {}
    for slot in matrices(config).values():
        layers.setdefault(layer_of(slot), []).append(slot)
    return list(layers.values())


def oriented(model: PreTrainedModel, slot: Slot) -> Tensor:
    """A matrix of a loaded model as [out, in]: a view, so that writing to it changes the model."""
    weight = model.get_parameter(f"{slot.module}.weight").data
    return weight.T if slot.transposed else weight


def every_matrix(model: PreTrainedModel) -> Iterator[Tensor]:
    """`oriented` for each of `layer_matrices`."""
    return (oriented(model, slot) for layer in layer_matrices(model.config) for slot in layer)


def share_of_zeros(model: PreTrainedModel) -> float:
    """How much of the matrices inside the layers is exactly 0, from 0 to 1."""
    zeros, numbers = 0, 0
    for weight in every_matrix(model):
        zeros, numbers = zeros + int((weight == 0).sum()), numbers + weight.numel()
    return zeros / numbers


def require_share(share: float) -> None:
    """Refuse to prune nothing or everything.

    Raises:
        LabError: a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise LabError(f"share = {share} is not a share of what is pruned: expected 0 < share < 1, such as 0.35")
