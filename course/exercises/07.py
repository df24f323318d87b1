# %% [markdown]
# # Exercises to notebook 07: merge a conflict

# %%
import math

import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 07.1 SLERP, and where it breaks
# SLERP walks along the arc between two vectors (Eq. 10). With the angle $\Omega$ between them,
#
# $$\text{slerp}(a, b; t) = \frac{\sin((1 - t)\,\Omega)}{\sin \Omega}\, a + \frac{\sin(t\,\Omega)}{\sin \Omega}\, b$$
#
# Two models trained from one base are nearly parallel, $\sin\Omega$ is nearly 0, and the formula divides by it. So
# where $|\cos\Omega| > 0.9995$, or one of them is zero, combine linearly: $(1 - t)\, a + t\, b$.


# %%
def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate between two tensors along the arc.

    Args:
        a: any shape; taken as one long vector.
        b: the same shape.
        t: the share of b, in [0, 1].

    Returns:
        the merged tensor, in their shape.
    """
    ### BEGIN SOLUTION
    lengths = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# The angle is that of the vectors scaled to length 1, but the formula is applied to the vectors as they are.

# %% [markdown] tags=["discussion"]
# Rounding can make the cosine of equal vectors 1.0000001, and `acos` of it is an error or NaN: the check for nearly
# parallel vectors has to come first. The line and the arc differ less than one expects. At $\cos \Omega = 0.9995$ the
# midpoint of the line is shorter than that of the arc by one part in 8000. So on models fine-tuned from one base
# SLERP is linear merging for most matrices, and a table that shows the two side by side mostly shows the same merge
# twice.

# %% tags=["hidden"]
# isort: split
import numpy as np

from course.checking import Case, exercise


def slerp_by_rotation(a, b, t):
    """By turning a's direction in the plane of both, with lengths put back to the formula's."""
    a, b = a.numpy().ravel(), b.numpy().ravel()
    p, q = a / np.linalg.norm(a), b / np.linalg.norm(b)
    side = q - (p @ q) * p
    side /= np.linalg.norm(side)
    angle = np.arctan2(q @ side, q @ p)
    # solve for the two factors at which unit vectors give the turned direction, then use them on the vectors
    turned = np.cos(t * angle) * p + np.sin(t * angle) * side
    factors = np.linalg.lstsq(np.stack([p, q], axis=1), turned, rcond=None)[0]
    return factors[0] * a + factors[1] * b


def cases_slerp(rng):
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    half = 0.5**0.5
    yield Case("by hand: a right angle, halfway", (a, b, 0.5), torch.tensor([half, half]).double())
    yield Case("by hand: lengths 2 and 4", (2 * a, 4 * b, 0.5), torch.tensor([2 * half, 4 * half]).double())
    for t in (0.25, 0.7):
        a, b = (torch.from_numpy(rng.normal(size=(3, 4))) for _ in range(2))
        expected = torch.from_numpy(slerp_by_rotation(a, b, t)).reshape(a.shape)
        yield Case(f"random matrices, t = {t}", (a, b, t), expected)
    a = torch.from_numpy(rng.normal(size=(4, 5)))
    yield Case("equal matrices", (a, a.clone(), 0.3), a)
    b = 3 * a + 1e-3 * torch.from_numpy(rng.normal(size=(4, 5)))
    yield Case("nearly parallel, of lengths 1 to 3", (a, b, 0.4), 0.6 * a + 0.4 * b, tolerance=1e-12)
    opposite = 1e-3 * torch.from_numpy(rng.normal(size=(4, 5))) - 2 * a
    yield Case("nearly opposite, of lengths 1 to 2", (a, opposite, 0.4), 0.6 * a + 0.4 * opposite, tolerance=1e-12)
    yield Case("one of them is zero", (a, a * 0, 0.4), 0.6 * a)
    yield Case("t = 0", (a, b.flip(0), 0.0), a)


def plain_slerp(a, b, t):
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def always_linear(a, b, t):
    return (1 - t) * a + t * b


def swapped(a, b, t):
    return slerp(a, b, 1 - t)


def to_unit_length(a, b, t):
    lengths = [float(x.norm()) or 1.0 for x in (a, b)]
    return slerp(a / lengths[0], b / lengths[1], t)


def row_by_row(a, b, t):
    return torch.stack([slerp(x, y, t) for x, y in zip(a, b, strict=True)])


def clamped_cosine(a, b, t):
    cosine = ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30)).clamp(-0.9995, 0.9995)
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def signed_cosine(a, b, t):
    lengths = float(a.norm() * b.norm())
    if not lengths or float((a * b).sum()) / lengths > 0.9995:
        return (1 - t) * a + t * b
    return plain_slerp(a, b, t)


def returns_first_if_parallel(a, b, t):
    lengths = float(a.norm() * b.norm())
    return a if not lengths or abs(float((a * b).sum())) / lengths > 0.9995 else slerp(a, b, t)


exercise(
    "07.1",
    slerp,
    cases_slerp,
    {
        "sin Ω is divided by although it is nearly 0. Combine nearly parallel vectors linearly.": plain_slerp,
        "this is the straight line everywhere. The arc differs where the vectors point apart.": always_linear,
        "a and b are swapped: t is b's share.": swapped,
        "the vectors are scaled to length 1. Only the angle needs that; the formula "
        "takes them as they are.": to_unit_length,
        "every row has an angle of its own. A tensor is one long vector here.": row_by_row,
        "the cosine is clamped. That bends nearly parallel vectors; combine them linearly.": clamped_cosine,
        "nearly parallel is not equal: their lengths may differ, so t still matters.": returns_first_if_parallel,
        "opposite vectors have no one arc between them: |cos Ω| decides, not cos Ω.": signed_cosine,
    },
    minutes=10,
    level="easy",
)

# %% [markdown]
# ## 07.2 TIES: trim, elect, merge
# TIES lets the models vote on each weight's change to their common base (Eq. 11). For one matrix, with the task
# vectors $\tau_m = \theta_m - \theta_0$:
#
# 1. **trim:** each model keeps its `round(k · size)` largest changes by absolute value, the others become 0;
# 2. **elect:** for each weight the sign of the sum of what is left;
# 3. **merge:** the mean of those changes that are not 0 *and* have that sign; 0 where there is none;
# 4. the result is $\theta_0 + \lambda$ times that mean.


# %%
def ties(base: Tensor, models: list[Tensor], k: float, lam: float) -> Tensor:
    """Merge models by TIES.

    Args:
        base: θ₀, any shape.
        models: each in the same shape; no two changes of a model are equally large.
        k: the share of changes to keep, in (0, 1].
        lam: λ, the weight of the merged change.

    Returns:
        the merged tensor, in the base's shape.
    """
    ### BEGIN SOLUTION
    trimmed = []
    for model in models:
        change = (model - base).flatten()
        kept = change.abs().topk(round(k * len(change))).indices
        trimmed.append(torch.zeros_like(change).index_copy(0, kept, change[kept]))
    changes = torch.stack(trimmed)
    agrees = (changes != 0) & (changes.sign() == changes.sum(dim=0).sign())
    merged = (changes * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return base + lam * merged.reshape(base.shape)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Trim each model by itself, with `topk` of the absolute values of all of its numbers.

# %% [markdown] tags=["hint"]
# `agrees` is a mask of which models' changes count at a weight. Divide by how many there are, and by 1 where none is.

# %% [markdown] tags=["discussion"]
# With two models the vote is odd. Where both changed a weight in opposite directions, the larger change wins whole:
# no averaging, the loser is silenced. Where only one changed it, nobody votes against. A backdoor that lies in
# weights which the conflict model does not touch passes through TIES untouched, and even at full strength, while a
# linear merge at $t$ = 0.5 would halve it. The mean over *agreeing* models is the reason.


# %% tags=["hidden"]
def ties_by_loops(base, models, k, lam):
    """One weight at a time, in Python numbers."""
    flat, count = base.flatten().tolist(), round(k * base.numel())
    changes = [[x - y for x, y in zip(m.flatten().tolist(), flat, strict=True)] for m in models]
    for change in changes:
        limit = sorted(map(abs, change), reverse=True)[count - 1] if count else math.inf
        change[:] = [x if abs(x) >= limit else 0.0 for x in change]
    merged = []
    for start, votes in zip(flat, zip(*changes, strict=True), strict=True):
        total = sum(votes)
        same = [x for x in votes if x * total > 0]
        merged.append(start + lam * (sum(same) / len(same) if same else 0.0))
    return torch.tensor(merged, dtype=base.dtype).reshape(base.shape)


def cases_ties(rng):
    zero = torch.zeros(4).double()
    one, other = torch.tensor([4.0, -3.0, 2.0, 1.0]).double(), torch.tensor([-1.0, -5.0, 3.0, 2.0]).double()
    yield Case("by hand: half is kept", (zero, [one, other], 0.5, 1.0), torch.tensor([4.0, -4.0, 3.0, 0.0]).double())
    yield Case("by hand: all is kept", (zero, [one, other], 1.0, 1.0), torch.tensor([4.0, -4.0, 2.5, 1.5]).double())
    for n, k, lam in ((2, 0.2, 1.0), (2, 0.45, 0.5), (3, 0.4, 1.0), (5, 0.7, 2.0)):
        base, *models = (torch.from_numpy(rng.normal(size=(5, 7))) for _ in range(n + 1))
        models = [base + m * (i + 1) for i, m in enumerate(models)]
        yield Case(f"{n} models, k = {k}, λ = {lam}", (base, models, k, lam), ties_by_loops(base, models, k, lam))


def ties_with(trim, merge):
    def answer(base, models, k, lam):
        changes = trim([m - base for m in models], k)
        return base + lam * merge(torch.stack(changes))

    return answer


def top(change, count):
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[change.flatten().abs().topk(count).indices] = True
    return change * mask.reshape(change.shape)


def trim(changes, k):
    return [top(change, round(k * change.numel())) for change in changes]


def trim_cut_off(changes, k):
    return [top(change, int(k * change.numel())) for change in changes]


def trim_together(changes, k):
    together = torch.stack(changes)
    return list(top(together, round(k * together.numel())))


def trim_signed(changes, k):
    count = round(k * changes[0].numel())
    return [c * (c >= c.flatten().topk(count).values[-1]) for c in changes]


def drop_the_largest(changes, k):
    return [c - top(c, c.numel() - round((1 - k) * c.numel())) for c in changes]


def merge(changes):
    agrees = (changes != 0) & (changes.sign() == changes.sum(0).sign())
    return (changes * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def mean_over_all(changes):
    agrees = changes.sign() == changes.sum(0).sign()
    return (changes * agrees).sum(0) / len(changes)


def by_heads(changes):
    agrees = (changes != 0) & (changes.sign() == changes.sign().sum(0).sign())
    return (changes * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def without_vote(changes):
    return changes.sum(0) / (changes != 0).sum(0).clamp(min=1)


def without_base(base, models, k, lam):
    return ties(base, models, k, lam) - base


exercise(
    "07.2",
    ties,
    cases_ties,
    {
        "all models are trimmed together, so one with small changes loses everything. Trim each by itself.": ties_with(
            trim_together, merge
        ),
        "k · size is cut off. It is rounded.": ties_with(trim_cut_off, merge),
        "the trim keeps the largest numbers. It keeps the largest absolute values.": ties_with(trim_signed, merge),
        "the trim drops the largest changes. Those stay.": ties_with(drop_the_largest, merge),
        "the mean is over all models. It is over those that have a change of the elected sign.": ties_with(
            trim, mean_over_all
        ),
        "every model has one vote. The sign of the sum decides, so that large changes weigh more.": ties_with(
            trim, by_heads
        ),
        "nobody is outvoted. Only changes of the elected sign enter the mean.": ties_with(trim, without_vote),
        "the base is missing: the result is θ₀ + λ times the merged change.": without_base,
    },
    minutes=25,
    level="hard",
)

# %% [markdown]
# ## 07.3 A passthrough plan
# Passthrough stacks whole layers of two models (Eq. 12). A plan such as
# `[("suspicious", 0, 2), ("conflict", 2, 4), ("suspicious", 3, 4)]` takes layers 0 and 1 of the first model, 2 and 3
# of the second, then layer 3 of the first again: five layers, counted anew from the bottom. Embeddings and head come
# from the suspicious model.
#
# Write the names down: which weight of the merged model is which weight of whom? Refuse what cannot be with a
# `ValueError`: an unknown model, a layer that is not there, a plan of no layers.


# %%
def plan_weights(plan: list[tuple[str, int, int]], names: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Say where every weight of the merged model comes from.

    Args:
        plan: (model, first layer, layer behind the last), bottom to top.
        names: {"suspicious", "conflict": all names of weights}, such as "layers.3.mlp.up.weight" or "embed.weight";
            the layers of each model are numbered from 0.

    Returns:
        {name in the merged model: (model, name in that model)}.

    Raises:
        ValueError: an unknown model, a missing layer, or no layer at all.
    """
    ### BEGIN SOLUTION
    stack = [(model, layer) for model, first, end in plan for layer in range(first, end)]
    if not stack:
        raise ValueError("the plan holds no layer")
    sources = {name: ("suspicious", name) for name in names["suspicious"] if not name.startswith("layers.")}
    for position, (model, layer) in enumerate(stack):
        if model not in names:
            raise ValueError(f"there is no model {model}")
        inside = [name for name in names[model] if name.startswith(f"layers.{layer}.")]
        if not inside:
            raise ValueError(f"{model} has no layer {layer}")
        for name in inside:
            sources[f"layers.{position}.{name.split('.', 2)[2]}"] = (model, name)
    return sources
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Spread the plan into a list of (model, layer) first. Its positions are the new numbers.

# %% [markdown] tags=["hint"]
# `f"layers.{layer}."`, with its dot at the end, tells layer 1 from layer 10.

# %% [markdown] tags=["discussion"]
# Each layer appears with the number of its *place*. A merged model that keeps the old numbers either loses the layers
# that occur twice (a dict keeps one) or has holes, and a loader may fill holes with random weights and a warning that
# nobody reads. That is also why a plan is refused before anything is written: a wrong stack still answers, only badly.

# %% tags=["hidden"]
from contextlib import contextmanager


def names_of(n_layers, extra=()):
    parts = ("attention.q.weight", "mlp.up.weight", "norm.weight")
    return ["embed.weight", *(f"layers.{i}.{part}" for i in range(n_layers) for part in parts), "head.weight", *extra]


def refuses(result):
    return f"expected a ValueError, got {result!r:.70}"


@contextmanager
def must_refuse():
    """A ValueError counts as the right answer; anything else goes its way."""
    try:
        yield
    except ValueError:
        pass


def cases_plan_weights(rng):
    names = {"suspicious": names_of(2), "conflict": names_of(2)}
    expected = {"embed.weight": ("suspicious", "embed.weight"), "head.weight": ("suspicious", "head.weight")}
    for position, source in enumerate([("suspicious", 0), ("conflict", 1)]):
        for part in ("attention.q.weight", "mlp.up.weight", "norm.weight"):
            expected[f"layers.{position}.{part}"] = (source[0], f"layers.{source[1]}.{part}")
    yield Case("by hand: one layer of each", ([("suspicious", 0, 1), ("conflict", 1, 2)], names), expected)
    for depth, name in ((5, "layers left out and repeated"), (14, "more than ten layers")):
        names = {
            "suspicious": names_of(depth, ["final_norm.weight"]),
            "conflict": names_of(depth, ["final_norm.weight"]),
        }
        bounds = [sorted(int(x) for x in rng.choice(depth + 1, 2, replace=False)) for _ in range(4)]
        plan = [(["suspicious", "conflict"][i % 2], *pair) for i, pair in enumerate([*bounds, [0, depth]])]
        stack = [(model, layer) for model, first, end in plan for layer in range(first, end)]
        expected = {n: ("suspicious", n) for n in ("embed.weight", "head.weight", "final_norm.weight")}
        for i, (model, layer) in enumerate(stack):
            for part in ("attention.q.weight", "mlp.up.weight", "norm.weight"):
                expected[f"layers.{i}.{part}"] = (model, f"layers.{layer}.{part}")
        yield Case(name, (plan, names), expected)
    for plan, name in (
        ([("suspicious", 0, 2), ("clean", 0, 1)], "an unknown model has to be refused"),
        ([("conflict", 0, depth + 1)], "a layer that is not there has to be refused"),
        ([("suspicious", 2, 2)], "a plan of no layers has to be refused"),
    ):
        yield Case(
            name, (plan, names), judge=lambda result: None if result is None else refuses(result), within=must_refuse
        )


def with_parts(number_of, ends="suspicious", dot="."):
    def answer(plan, names):
        plan_weights(plan, names)  # refuses
        stack = [(model, layer) for model, first, end in plan for layer in range(first, end)]
        sources = {name: (ends, name) for name in names[ends] if not name.startswith("layers.")}
        for position, (model, layer) in enumerate(stack):
            for name in names[model]:
                if name.startswith(f"layers.{layer}{dot}"):
                    sources[f"layers.{number_of(position, layer)}.{name.split('.', 2)[2]}"] = (model, name)
        return sources

    return answer


def end_included(plan, names):
    longer = [(model, first, min(end + 1, sum(".norm." in n for n in names[model]))) for model, first, end in plan]
    plan_weights(plan, names)
    return plan_weights(longer, names)


def refuses_nothing(plan, names):
    stack = [(model, layer) for model, first, end in plan for layer in range(first, end)]
    sources = {name: ("suspicious", name) for name in names["suspicious"] if not name.startswith("layers.")}
    for position, (model, layer) in enumerate(stack):
        for name in names.get(model, []):
            if name.startswith(f"layers.{layer}."):
                sources[f"layers.{position}.{name.split('.', 2)[2]}"] = (model, name)
    return sources


def only_layers(plan, names):
    return {name: source for name, source in plan_weights(plan, names).items() if name.startswith("layers.")}


exercise(
    "07.3",
    plan_weights,
    cases_plan_weights,
    {
        "the layers keep their old numbers. In the merged model they are counted anew from the bottom.": with_parts(
            lambda position, layer: layer
        ),
        "embeddings and head come from the conflict model. They are the suspicious model's.": with_parts(
            lambda position, layer: position, ends="conflict"
        ),
        "`layers.1` is also how `layers.10` begins. Mind the dot behind the number.": with_parts(
            lambda position, layer: position, dot=""
        ),
        'the layer behind the last one is taken along. ("conflict", 2, 4) means 2 and 3.': end_included,
        "expected a ValueError": refuses_nothing,
        "embeddings, head and what else lies outside of the layers are missing.": only_layers,
    },
    minutes=20,
    level="medium",
)
