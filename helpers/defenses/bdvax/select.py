"""Which channels go: the top share τ of the scores (BD-VAX §4.2, 𝕊 = {j : s_j ≥ τ} with τ as a percentile).

Ranked inside each matrix, every matrix loses the same share; ranked over the whole model, a matrix that changed
more loses more. How much must go is a property of the model, so τ is a setting of the profile.
"""

import torch
from torch import BoolTensor, Tensor

from helpers.access import Access
from helpers.core.errors import LabError, nearest


def select(scores: dict[str, Tensor], tau: float, scope: str) -> dict[str, BoolTensor]:
    """The round(τ · channels) highest-scoring channels; of equal scores the first.

    Args:
        scores: {module: [channels]}.
        tau: the share selected, in (0, 1).
        scope: "module" ranks inside each matrix, "model" over all matrices together.

    Returns:
        {module: mask [channels]}, True = selected.

    Raises:
        LabError: τ outside (0, 1), another scope, or scores that are not finite.
    """
    if not 0 < tau < 1:
        raise LabError(f"tau = {tau} is not a share of channels: expected 0 < tau < 1, such as 0.35")
    if scope not in ("module", "model"):
        raise LabError(f"scope = '{scope}' is unknown{nearest(scope, ('module', 'model'))}")
    if scope == "module":
        return {module: _top(values, round(tau * len(values))) for module, values in scores.items()}
    everything = torch.cat(list(scores.values()))
    masks = _top(everything, round(tau * len(everything))).split([len(values) for values in scores.values()])
    return dict(zip(scores, masks, strict=True))


def select_heads(head_scores: Tensor, count: int, per: str = "model") -> BoolTensor:
    """The `count` highest-scoring attention heads of the model or of each layer; of equal scores the first.

    The paper names a number of heads for Mistral (Table 5) and not how they are ranked. Ranked over the whole model,
    all of them may come from the few layers whose update is largest, although the association is spread over many.

    Args:
        head_scores: [n_layers, n_heads].
        count: from 0 to the number of heads of the model or layer.
        per: "model" or "layer".

    Returns:
        [n_layers, n_heads], True = selected.

    Raises:
        LabError: another count or scope, or scores that are not finite.
    """
    if per not in ("model", "layer"):
        raise LabError(f"heads_of = '{per}' is unknown{nearest(per, ('model', 'layer'))}")
    groups = head_scores if per == "layer" else head_scores.flatten()[None]
    if not 0 <= count <= groups.shape[1]:
        raise LabError(f"cannot select {count} of {groups.shape[1]} attention heads of a {per}")
    return torch.stack([_top(scores, count) for scores in groups]).view(head_scores.shape)


def select_suppressed(
    access: Access, scores: dict[str, Tensor], head_scores: Tensor
) -> tuple[dict[str, BoolTensor], BoolTensor]:
    """The channels and heads that go, as many as the access's `suppress` numbers say.

    Args:
        scores: {module: [channels]}.
        head_scores: [n_layers, n_heads].

    Returns:
        {module: mask [channels]} and mask [n_layers, n_heads], True = selected.

    Raises:
        LabError: as `select` and `select_heads`.
    """
    cut = access.settings.suppress
    masks = select(scores, cut.tau, access.profile.signature.scope)
    return masks, select_heads(head_scores, cut.heads, cut.heads_of)


def _top(scores: Tensor, count: int) -> BoolTensor:
    if not scores.isfinite().all():
        raise LabError("scores hold values that are not finite: a variant's training diverged; lower its learning rate")
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask
