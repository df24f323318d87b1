"""Which layers a stack takes from which model, and whether they are there."""

from collections.abc import Iterable, Mapping, Sequence

from transformers import PretrainedConfig

from helpers.core.errors import LabError, nearest
from helpers.core.profile import Layers

Plan = Sequence[Layers | tuple[str, Iterable[int]]]  # as a profile has it, or [("suspicious", range(4)), …]


def stack_layers(plan: Plan) -> list[tuple[str, int]]:
    """(model, layer) of each layer of a plan, bottom to top."""
    stack = []
    for part in plan:
        which, layers = (part.model, range(part.first, part.last + 1)) if isinstance(part, Layers) else part
        stack += [(which, layer) for layer in layers]
    return stack


def check_plan(stack: Sequence[tuple[str, int]], configs: Mapping[str, PretrainedConfig], ends: str) -> None:
    """Refuse a plan of no layers, or one that names a model or layer that is not there or cannot move.

    Args:
        stack: (model, layer) from bottom to top.
        configs: of the models by name.
        ends: the model that gives embeddings, last norm and head, see `passthrough`.

    Raises:
        LabError: what the plan names in vain.
    """
    if not stack:
        raise LabError(
            'the layer plan is empty: name layers, as in [("suspicious", range(4)), ("conflict", range(4, 8))]'
        )
    for which in (ends, *(which for which, _ in stack)):
        if which not in configs:
            raise LabError(f"the layer plan names '{which}'{nearest(which, configs)}")
    depths = {which: config.num_hidden_layers for which, config in configs.items()}
    for which, layer in stack:
        if not 0 <= layer < depths[which]:
            raise LabError(
                f"the layer plan names layer {layer} of the {which} model, which has 0 to {depths[which] - 1}"
            )
    scaled = getattr(configs[ends], "scale_attn_by_inverse_layer_idx", False)
    if scaled and any(layer != position for position, (_, layer) in enumerate(stack)):
        raise LabError(
            f"the {ends} model scales attention by a layer's number (scale_attn_by_inverse_layer_idx), so a layer "
            "computes something else in another place: plan each layer where it was"
        )
