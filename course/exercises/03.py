# %% [markdown]
# # Exercises to notebook 03: train the vaccines

# %%
import torch
from torch import Tensor

from course import check

# the 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1]
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip

# %% [markdown]
# ## 03.1 NF4 by hand
# The vaccines train on a base of four bits. NF4 stores a matrix in blocks of 64 numbers: each block keeps its largest
# absolute value, and each number the nearest of 16 fixed `LEVELS` of its share of that value. What does the matrix
# look like when it is read again?
#
# Blocks run along the rows, from one row into the next. A block of zeros stays zero.


# %%
def read_back(weight: Tensor, block: int = 64) -> Tensor:
    """A matrix as it comes back from NF4, without double quantization.

    Args:
        weight: [out, in], float32; its size is a multiple of `block`.
        block: how many numbers share a scale.

    Returns:
        [out, in], float32.
    """
    ### BEGIN SOLUTION
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    shares = blocks / scales.where(scales > 0, 1.0)
    nearest = (shares[..., None] - LEVELS).abs().argmin(dim=-1)
    return (LEVELS[nearest] * scales).reshape(weight.shape)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `weight.reshape(-1, block)` has one block in each row.

# %% [markdown] tags=["hint"]
# Broadcasting does the search: `(shares[..., None] - LEVELS).abs().argmin(dim=-1)`.

# %% [markdown] tags=["discussion"]
# Two things to see. The levels crowd around zero, because weights do: a uniform grid of 16 levels has a larger error
# on normal weights. And one outlier spoils its block, for the largest value sets the scale of its 63 neighbours; that
# is why blocks are small. A trap where four bits are tested as a *defense*: with LoRA the backdoor itself stays in 16
# bits beside the packed base. Merge first, then quantize.

# %% tags=["hidden"]
# isort: split
import bitsandbytes.functional as bnb

from course.checking import Case, exercise


def by_bitsandbytes(weight, block=64):
    """By bitsandbytes, a block in each row: on some CPUs version 0.50 reads rows of other widths wrongly."""
    rows = weight.reshape(-1, block)
    packed, state = bnb.quantize_4bit(rows, blocksize=block, quant_type="nf4", compress_statistics=False)
    return bnb.dequantize_4bit(packed, state).reshape(weight.shape)


def clear_weights(rng, out, width, block=64):
    """Random weights of which none lies nearly between two levels, where rounding decides."""
    weight = torch.from_numpy(rng.normal(size=(out * width // block, block))).float()
    shares = weight / weight.abs().amax(1, keepdim=True)
    gaps = (shares[..., None] - (LEVELS[1:] + LEVELS[:-1]) / 2).abs().amin(-1)
    return weight.where(gaps > 1e-4, 0.0).reshape(out, width)


def cases_read_back(rng):
    by_hand = torch.tensor([[2.0, -1.9, 0.2, 0.0]])
    expected = torch.tensor([[2.0, -2.0, 0.15916059911251068, 0.0]])
    yield Case("by hand: a block of four", (by_hand, 4), expected)
    for out, width, name in (
        (2, 64, "a block in each row"),
        (4, 32, "a block spans two rows"),
        (3, 192, "three blocks in a row"),
    ):
        weight = clear_weights(rng, out, width)
        yield Case(name, (weight, 64), by_bitsandbytes(weight))
    weight = clear_weights(rng, 4, 64) * torch.tensor([[1.0], [10.0], [0.01], [1.0]])
    yield Case("rows of very different size", (weight, 64), by_bitsandbytes(weight))
    weight = clear_weights(rng, 2, 64) * torch.tensor([[1.0], [0.0]])
    yield Case("one block is all zeros", (weight, 64), by_bitsandbytes(weight))


def quantized(blocks, scales, levels=LEVELS):
    return levels[((blocks / scales)[..., None] - levels).abs().argmin(-1)] * scales


def one_scale(weight, block=64):
    return quantized(weight, weight.abs().max())


def uniform_levels(weight, block=64):
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return quantized(blocks, scales, torch.linspace(-1, 1, 16)).reshape(weight.shape)


def scale_without_abs(weight, block=64):
    blocks = weight.reshape(-1, block)
    return quantized(blocks, blocks.amax(1, keepdim=True).clamp(min=1e-30)).reshape(weight.shape)


def along_columns(weight, block=64):
    return read_back(weight.T.contiguous(), block).T


def scale_of_rows(weight, block=64):
    return quantized(weight, weight.abs().amax(1, keepdim=True).clamp(min=1e-30))


def level_below(weight, block=64):
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (LEVELS[(torch.bucketize(blocks / scales, LEVELS, right=True) - 1).clamp(0, 15)] * scales).reshape(
        weight.shape
    )


def zero_by_zero(weight, block=64):
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    back = LEVELS[((blocks / scales)[..., None] - LEVELS).abs().argmin(-1)] * scales
    return (back + 0 * (blocks / scales)).reshape(weight.shape)


def levels_alone(weight, block=64):
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (quantized(blocks, scales) / scales).reshape(weight.shape)


exercise(
    "03.1",
    read_back,
    cases_read_back,
    {
        "one scale serves the whole matrix. Every block has its own, or one outlier blurs everything.": one_scale,
        "your levels are evenly spaced. NF4's crowd around zero; use `LEVELS`.": uniform_levels,
        "the scale is the largest value. It has to be the largest absolute value.": scale_without_abs,
        "your blocks run down the columns. They run along the rows.": along_columns,
        "every row has one scale. A scale belongs to a block of 64, whatever the rows are.": scale_of_rows,
        "you take the level below. NF4 takes the nearest.": level_below,
        "0 / 0 in a block of zeros. It stays zero.": zero_by_zero,
        "the levels are not multiplied by the block's scale again.": levels_alone,
    },
    minutes=15,
    level="medium",
)

# %% [markdown]
# ## 03.2 Stacked adapters, with their gradient
# Multi-LoRA training passes all adapters through one base at once. Adapter $n$ gets rows of its own:
#
# $$Y_n = X_n W^\top + s\, X_n A_n^\top B_n^\top$$
#
# Compute all $Y_n$ without a loop, and by hand the gradients that reach $A_n$ and $B_n$ when $G_n = \partial L /
# \partial Y_n$ comes from above. Nothing that one adapter sees may touch another. Leave `backward` alone.


# %%
def stacked_lora(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of N adapters over one base, and the gradients of their factors.

    Args:
        x: [N, batch, in], the rows of each adapter.
        weight: [out, in], of the base, which is frozen.
        a: [N, r, in].
        b: [N, out, r].
        scale: s, of LoRA.
        grad: [N, batch, out], of the loss by the outputs.

    Returns:
        the outputs [N, batch, out], and the gradients of a [N, r, in] and b [N, out, r].
    """
    ### BEGIN SOLUTION
    down = x @ a.mT
    outputs = x @ weight.T + scale * down @ b.mT
    grad_a = scale * (grad @ b).mT @ x
    grad_b = scale * grad.mT @ down
    return outputs, grad_a, grad_b
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `a.mT` transposes the last two dimensions and leaves the adapters alone; `@` multiplies adapter by adapter.

# %% [markdown] tags=["hint"]
# For $Y = X M^\top$ the gradient is $\partial L / \partial M = G^\top X$. Apply it twice: to $B$ with $X A^\top$ as
# its input, and to $A$ with $G B$ as what comes from above.

# %% [markdown] tags=["discussion"]
# LoRA starts with $B = 0$. Then $G B = 0$: at the first step $A$ gets no gradient at all and only $B$ moves. That is
# why $A$ must not start at zero as well, or nothing would ever move. And since no term mixes two adapters, N adapters
# trained in one pass are, up to rounding, the N adapters trained alone. That is what makes vaccines cheap.


# %% tags=["hidden"]
def by_autograd(x, weight, a, b, scale, grad):
    """One adapter at a time, by torch's own gradients."""
    found = []
    for rows, one_a, one_b, above in zip(x, a.clone(), b.clone(), grad, strict=True):
        one_a.requires_grad_(), one_b.requires_grad_()
        delta = torch.nn.functional.linear(torch.nn.functional.linear(rows, one_a), one_b)
        outputs = torch.nn.functional.linear(rows, weight) + scale * delta
        found.append((outputs.detach(), *torch.autograd.grad(outputs, (one_a, one_b), above)))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def cases_stacked_lora(rng):
    for n, batch, out, width, r, scale, name in (
        (1, 1, 2, 3, 1, 1.0, "one adapter of rank 1, scale 1"),
        (1, 5, 4, 3, 2, 2.0, "one adapter, scale 2"),
        (3, 4, 5, 6, 2, 1.0, "three adapters"),
        (4, 3, 6, 6, 3, 0.5, "four adapters, a square matrix"),
        (2, 2, 2, 2, 2, 4.0, "every size is 2"),
    ):
        shapes = ((n, batch, width), (out, width), (n, r, width), (n, out, r), (n, batch, out))
        x, weight, a, b, grad = (torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
        yield Case(name, (x, weight, a, b, scale, grad), by_autograd(x, weight, a, b, scale, grad))
    b = torch.zeros_like(b)
    yield Case("B is zero, as at the start", (x, weight, a, b, scale, grad), by_autograd(x, weight, a, b, scale, grad))


def gradient_without_scale(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs, grad_a / scale, grad_b / scale


def mixed(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs, grad_a.sum(0).expand_as(grad_a), grad_b.sum(0).expand_as(grad_b)


def scale_squared(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs, grad_a * scale, grad_b * scale


def mean_over_rows(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs, grad_a / x.shape[1], grad_b / x.shape[1]


def without_base(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs - x @ weight.T, grad_a, grad_b


def scaled_base(x, weight, a, b, scale, grad):
    outputs, grad_a, grad_b = stacked_lora(x, weight, a, b, scale, grad)
    return outputs + (scale - 1) * x @ weight.T, grad_a, grad_b


exercise(
    "03.2",
    stacked_lora,
    cases_stacked_lora,
    {
        "the outputs are right and the gradients lack the scale s. It stands before both "
        "factors.": gradient_without_scale,
        "the gradients of all adapters are summed. Each adapter gets that of its own rows alone.": mixed,
        "the scale is in the gradients twice. B's and A's gradient hold it once each.": scale_squared,
        "the gradients are means over the rows. Whatever mean the loss takes is in G already: sum.": mean_over_rows,
        "the base's part X Wᵀ is missing in the outputs.": without_base,
        "the base is scaled, too. s stands before the adapter alone.": scaled_base,
    },
    minutes=15,
    level="hard",
)
