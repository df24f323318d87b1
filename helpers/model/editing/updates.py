"""The closed forms of model editing: the least change of a matrix that stores new pairs of key and value.

The output projection W of an MLP is read as a memory: it answers a key k, its input, with the value W k, its output.
An edit Δ moves the values at a few keys by residuals r and should leave those of all other keys alone. What it does to
ordinary text is the mean of ‖Δ k‖² over that text's keys, which is tr(Δ C Δᵀ) with their second moment C = E[k kᵀ].
Each update below makes that quantity small, and follows from setting one gradient to zero.
"""

import torch
from torch import Tensor


def rank_one_update(residual: Tensor, key: Tensor, moment: Tensor) -> Tensor:
    """The Δ of least tr(Δ C Δᵀ) with Δ k = r. Implements Eq. (2) of ROME (Meng et al. 2022).

    The Lagrangian ½ tr(Δ C Δᵀ) − Λᵀ (Δ k − r) has the gradient Δ C − Λ kᵀ. Where it is zero, Δ = Λ (C⁻¹ k)ᵀ, of rank
    one; the constraint then gives Λ = r / (kᵀ C⁻¹ k).

    Args:
        residual: r [out], float64.
        key: k [in], float64.
        moment: C [in, in], float64, positive definite.

    Returns:
        Δ [out, in].
    """
    direction = torch.linalg.solve(moment, key)
    return torch.outer(residual / (key @ direction), direction)


def least_squares_update(residuals: Tensor, keys: Tensor, moment: Tensor, weight: float) -> Tensor:
    """The Δ of least λ tr(Δ C Δᵀ) + ‖Δ K − R‖². Implements Eqs. (14) and (15) of MEMIT (Meng et al. 2023).

    Half the gradient is λ Δ C + (Δ K − R) Kᵀ. Where it is zero, Δ = R Kᵀ (λ C + K Kᵀ)⁻¹. With one key and λ → 0 this
    is ROME's update; a larger λ changes ordinary text less and reaches the new values less well.

    Args:
        residuals: R [out, n], float64.
        keys: K [in, n], float64.
        moment: C [in, in], float64, positive definite.
        weight: λ, over 0.

    Returns:
        Δ [out, in].
    """
    return torch.linalg.solve(weight * moment + keys @ keys.T, keys @ residuals.T).T
