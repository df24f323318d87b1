"""What keeps a gradient true: attention whose backward pass is right, and weights that can hold a small step.

A bfloat16 number near 0.02 has neighbours at a distance of 1.2e-4, so an optimizer's step of 1e-5 is rounded away.
Weights that train are therefore held in 32 bits (the master weights of Micikevicius et al. 2018, "Mixed Precision
Training") and cast for each product only. What a model is stored in afterwards is decided by what that costs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STORING_LOSS = 0.1  # share of a change that storing in 16 bits may cost; above it the model is stored in 32
HALVES = (torch.bfloat16, torch.float16)


class MasterWeights:
    """The 32-bit copies of a model's trainable 16-bit weights, in their place while it trains.

    Args:
        model: changed in place; models whose trainable weights have 32 bits, such as LoRA adapters, stay as they are.
        compare: keep the weights as they were (on the CPU, in 16 bits), so that `settle` can tell what storing costs.
    """

    def __init__(self, model: nn.Module, compare: bool = True):
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALVES}
        self.dtypes = {name: parameter.dtype for name, parameter in self.trained.items()}
        self.before = {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()} if compare else None
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()

    def settle(self) -> dict[str, str | float | None]:
        """Go back to 16 bits where that keeps the change, and tell what was decided.

        Returns:
            {} where there were no 16-bit weights; else `stored`, the dtype that the weights have now, and
            `storing_loss`, ‖round(W) − W‖ / ‖W − W₀‖ over all of them (None where nothing was kept to compare with).
        """
        if not self.trained:
            return {}
        loss = self._storing_loss() if self.before is not None else None
        if loss is None or loss > STORING_LOSS:
            return {"stored": "float32", "storing_loss": loss}
        for name, parameter in self.trained.items():
            parameter.data = parameter.data.to(self.dtypes[name])
        return {"stored": str(next(iter(self.dtypes.values()))).removeprefix("torch."), "storing_loss": loss}

    @torch.no_grad()
    def _storing_loss(self) -> float:
        rounding = change = 0.0
        for name, parameter in self.trained.items():
            now = parameter.detach()
            rounding += _squares(now.to(self.dtypes[name]).float() - now)
            change += _squares(now - self.before[name].to(now))
        return (rounding / change) ** 0.5 if change else 0.0


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's trainable weights as it was loaded; in 32 bits where none of them has fewer."""
    return next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALVES), torch.float32)


def _squares(difference: Tensor) -> float:
    return float(difference.square().sum(dtype=torch.float64))
