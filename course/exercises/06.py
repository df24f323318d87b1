# %% [markdown]
# # Exercises to notebook 06: recover fluency

# %%
from statistics import NormalDist

import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 06.1 Freeze rows under AdamW
# Recovery fine-tuning may move suppressed rows away from zero and bring the backdoor back. Train a matrix with AdamW
# and keep some rows *exactly* where they are. A zero gradient does not suffice: AdamW also decays weights and carries
# momentum, and both move a row whose gradient is zero. The other rows must train as if nothing were frozen.


# %%
def train_frozen(weight: Tensor, grads: list[Tensor], frozen: Tensor, lr: float, decay: float) -> Tensor:
    """Train a matrix for some steps, some of its rows frozen.

    Args:
        weight: [rows, columns], the start.
        grads: the gradient [rows, columns] of each step.
        frozen: [rows], True for rows that stay.
        lr: AdamW's rate; its other numbers are torch's defaults.
        decay: AdamW's weight decay.

    Returns:
        [rows, columns], the matrix after the last step.
    """
    ### BEGIN SOLUTION
    trained = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([trained], lr=lr, weight_decay=decay)
    for grad in grads:
        trained.grad = grad.clone()
        optimizer.step()
        with torch.no_grad():
            trained[frozen] = weight[frozen]
    return trained.detach()
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Whatever AdamW does to a frozen row, you can undo it after each step.

# %% [markdown] tags=["hint"]
# Set `parameter.grad` by hand, call `optimizer.step()`, and write the frozen rows back under `torch.no_grad()`.

# %% [markdown] tags=["discussion"]
# A gradient hook that zeroes rows looks right and passes a test with plain SGD. Under AdamW a row of zeros stays at
# zero (nothing to decay), so even a look at suppressed rows finds nothing wrong; only rows with a value drift, by
# $\text{lr} \cdot \text{decay}$ of themselves each step. And rows that have momentum from earlier training go on for
# some ten steps. Two parameters, one frozen, would be as right and cost less memory.

# %% tags=["hidden"]
# isort: split
import numpy as np

from course.checking import Case, exercise


def train_row_by_row(weight, grads, frozen, lr, decay):
    """AdamW written out in numpy (Loshchilov and Hutter, Algorithm 2), for the rows that train."""
    found = weight.numpy().copy()
    for row in np.flatnonzero(~frozen.numpy()):
        first = second = np.zeros(weight.shape[1])
        for step, grad in enumerate((g.numpy()[row] for g in grads), 1):
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            found[row] *= 1 - lr * decay
            found[row] -= lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return torch.from_numpy(found)


def cases_train_frozen(rng):
    for rows, steps, lr, decay, chosen, name in (
        (3, 1, 0.1, 0.0, [1], "one step, no decay"),
        (4, 5, 0.1, 0.0, [0, 3], "five steps, no decay"),
        (4, 5, 0.1, 0.5, [2], "five steps with decay"),
        (5, 20, 0.01, 0.1, [], "nothing is frozen"),
        (3, 4, 0.05, 0.2, [0, 1, 2], "everything is frozen"),
    ):
        weight = torch.from_numpy(rng.normal(size=(rows, 3)))
        grads = [torch.from_numpy(rng.normal(size=(rows, 3))) for _ in range(steps)]
        frozen = torch.zeros(rows, dtype=torch.bool)
        frozen[chosen] = True
        yield Case(name, (weight, grads, frozen, lr, decay), train_row_by_row(weight, grads, frozen, lr, decay))


def trained_by(optimizer_of, weight, grads, edit_grad=lambda g: g, edit=lambda w: None):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_of([parameter])
    for grad in grads:
        parameter.grad = edit_grad(grad.clone())
        optimizer.step()
        edit(parameter.data)
    return parameter.detach()


def zero_gradient(weight, grads, frozen, lr, decay):
    return trained_by(
        lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay), weight, grads, lambda g: g * ~frozen[:, None]
    )


def zeroed_rows(weight, grads, frozen, lr, decay):
    return train_frozen(weight, grads, frozen, lr, decay).masked_fill(frozen[:, None], 0.0)


def adam_with_l2(weight, grads, frozen, lr, decay):
    found = trained_by(lambda p: torch.optim.Adam(p, lr=lr, weight_decay=decay), weight, grads)
    return weight.where(frozen[:, None], found)


def no_decay(weight, grads, frozen, lr, decay):
    return train_frozen(weight, grads, frozen, lr, 0.0)


def default_decay(weight, grads, frozen, lr, decay):
    return train_frozen(weight, grads, frozen, lr, 0.01)


def freezes_the_rest(weight, grads, frozen, lr, decay):
    return train_frozen(weight, grads, ~frozen, lr, decay)


def plain_sgd(weight, grads, frozen, lr, decay):
    found = trained_by(lambda p: torch.optim.SGD(p, lr=lr), weight, grads)
    return weight.where(frozen[:, None], found)


exercise(
    "06.1",
    train_frozen,
    cases_train_frozen,
    {
        "only the gradient is zero. AdamW's weight decay still moves a frozen row; write it back.": zero_gradient,
        "the frozen rows are zero. They keep the values they had at the start.": zeroed_rows,
        "this is Adam with the decay in the gradient. AdamW decays the weights themselves.": adam_with_l2,
        "the decay is missing in the rows that train.": no_decay,
        "the decay is torch's default. Hand `decay` over as `weight_decay`.": default_decay,
        "it is the wrong way round: the frozen rows train and the others stay.": freezes_the_rest,
        "this is plain gradient descent. AdamW divides by the gradients' running size.": plain_sgd,
    },
    minutes=20,
    level="medium",
)

# %% [markdown]
# ## 06.2 The interval of a difference
# Two models answered the *same* prompts. How far apart are their rates? Only the prompts on which they disagree tell.
# Let $b$ be those that only the first model has, $c$ those that only the second has. Bonett and Price add one imagined
# pair to each side,
#
# $$\tilde p = \frac{b + 1}{n + 2}, \quad \tilde q = \frac{c + 1}{n + 2}, \qquad
# \tilde p - \tilde q \pm z \sqrt{\frac{\tilde p + \tilde q - (\tilde p - \tilde q)^2}{n + 2}}$$


# %%
def difference_interval(first: list[bool], second: list[bool], level: float) -> tuple[float, float]:
    """The interval of the difference of two paired rates.

    Args:
        first: what the first model has on each of n prompts.
        second: what the second model has on the same prompts.
        level: the coverage, such as 0.95.

    Returns:
        (low, high) of the first rate minus the second.
    """
    ### BEGIN SOLUTION
    n, z = len(first), NormalDist().inv_cdf((1 + level) / 2)
    p = (sum(one and not two for one, two in zip(first, second, strict=True)) + 1) / (n + 2)
    q = (sum(two and not one for one, two in zip(first, second, strict=True)) + 1) / (n + 2)
    half = z * ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5
    return p - q - half, p - q + half
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Prompts on which both agree enter only through n.

# %% [markdown] tags=["discussion"]
# Here is why the formula is no magic. Give each prompt +1, 0 or −1, append one +1 and one −1, and take the familiar
# interval of a *mean*: that is this formula, term by term, and it is how the check computes it. Pairing pays: with 200
# prompts, rates of 10 and 13 % and 10 disagreements the interval is 7 points wide; treated as two independent samples
# it would be 12.


# %% tags=["hidden"]
def interval_of_a_mean(first, second, level):
    """The normal interval of the mean of +1, 0 and −1, two imagined prompts appended."""
    values = np.array([*(int(a) - int(b) for a, b in zip(first, second, strict=True)), 1, -1])
    half = NormalDist().inv_cdf((1 + level) / 2) * values.std() / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def cases_difference_interval(rng):
    yield Case(
        "by hand: they always agree", ([True, False], [True, False], 0.95), (-0.6929519, 0.6929519), tolerance=1e-5
    )
    for n, p, q, level in ((20, 0.5, 0.5, 0.95), (200, 0.1, 0.9, 0.95), (200, 0.3, 0.2, 0.99), (50, 0.02, 0.0, 0.8)):
        first, second = (rng.random(n) < p).tolist(), (rng.random(n) < q).tolist()
        yield Case(f"{n} prompts, level {level}", (first, second, level), interval_of_a_mean(first, second, level))


def as_if_independent(first, second, level):
    n, z = len(first), NormalDist().inv_cdf((1 + level) / 2)
    p, q = sum(first) / n, sum(second) / n
    half = z * ((p * (1 - p) + q * (1 - q)) / n) ** 0.5
    return p - q - half, p - q + half


def nothing_added(first, second, level):
    values = np.array(first, dtype=float) - np.array(second, dtype=float)
    half = NormalDist().inv_cdf((1 + level) / 2) * values.std() / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def second_minus_first(first, second, level):
    return difference_interval(second, first, level)


def one_sided(first, second, level):
    return difference_interval(first, second, 2 * level - 1)


def in_points(first, second, level):
    low, high = difference_interval(first, second, level)
    return 100 * low, 100 * high


def adds_to_n_alone(first, second, level):
    n, z = len(first) + 2, NormalDist().inv_cdf((1 + level) / 2)
    p = sum(a and not b for a, b in zip(first, second, strict=True)) / n
    q = sum(b and not a for a, b in zip(first, second, strict=True)) / n
    half = z * ((p + q - (p - q) ** 2) / n) ** 0.5
    return p - q - half, p - q + half


exercise(
    "06.2",
    difference_interval,
    cases_difference_interval,
    {
        "the rates are treated as two independent samples. Both models had the same "
        "prompts: pair them.": as_if_independent,
        "no imagined pairs are added. Where the models never disagree the interval would have no width.": nothing_added,
        "the sign is turned: it is the first rate minus the second.": second_minus_first,
        "z is that of a one-sided interval. Use (1 + level) / 2.": one_sided,
        "these are percentage points. Return rates.": in_points,
        "n grew by two, b and c did not. One pair goes to each side.": adds_to_n_alone,
    },
    minutes=15,
    level="medium",
)
