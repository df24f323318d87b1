# %% [markdown]
# # Exercises to notebook 05: suppress channels

# %%
import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 05.1 The top share
# τ is a share: the `round(τ · channels)` highest scores are selected. It can be a share of every matrix, so that each
# loses as much, or of the whole model, so that a matrix which changed more loses more. Write both.


# %%
def select(scores: dict[str, Tensor], tau: float, scope: str) -> dict[str, Tensor]:
    """Select the channels with the highest scores.

    Args:
        scores: {matrix: [channels]}, no two equal.
        tau: the share to select, in (0, 1).
        scope: "module": of each matrix; "model": of all matrices together.

    Returns:
        {matrix: mask [channels]}, True where a channel is selected, in the order of `scores`.
    """
    ### BEGIN SOLUTION
    groups = [[name] for name in scores] if scope == "module" else [list(scores)]
    masks = {}
    for names in groups:
        together = torch.cat([scores[name] for name in names])
        chosen = torch.zeros(len(together), dtype=torch.bool)
        chosen[together.topk(round(tau * len(together))).indices] = True
        masks |= zip(names, chosen.split([len(scores[name]) for name in names]), strict=True)
    return masks
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `topk(k).indices` says where the k highest are; a mask starts as zeros of `dtype=torch.bool`.

# %% [markdown] tags=["hint"]
# For the whole model: `torch.cat` all scores, select once, and `split` the mask by the matrices' lengths.

# %% [markdown] tags=["discussion"]
# The two scopes agree only if scores of different matrices are comparable. They are lengths of weights, and a
# `down_proj` with larger weights tends to have larger updates, so "model" can take most of its channels from a few
# matrices. "module" is blind to where the change is, but never ruins one block. This is why a control has to be
# selected in the same scope: otherwise you compare shapes, not rankings.

# %% tags=["hidden"]
# isort: split
import numpy as np
from peft import LoraConfig, get_peft_model

from course.checking import Case, exercise


def select_by_sorting(scores, tau, scope):
    """By sorting lists, the whole model's as (score, matrix, channel)."""
    pairs = [(float(score), name, i) for name, values in scores.items() for i, score in enumerate(values)]
    groups = [[p for p in pairs if p[1] == name] for name in scores] if scope == "module" else [pairs]
    chosen = {p[1:] for group in groups for p in sorted(group, reverse=True)[: round(tau * len(group))]}
    return {name: torch.tensor([(name, i) in chosen for i in range(len(values))]) for name, values in scores.items()}


def cases_select(rng):
    by_hand = {"up": torch.tensor([1.0, 5.0, 2.0, 3.0]), "down": torch.tensor([9.0, 8.0])}
    masks = {"up": torch.tensor([False, True, False, True]), "down": torch.tensor([True, False])}
    yield Case("by hand: half of each matrix", (by_hand, 0.5, "module"), masks)
    masks = {"up": torch.tensor([False, True, False, False]), "down": torch.tensor([True, True])}
    yield Case("by hand: half of the model", (by_hand, 0.5, "model"), masks)
    for tau, scope in ((0.35, "module"), (0.35, "model"), (0.05, "module"), (0.9, "model")):
        sizes = {"gate": 11, "up": 30, "down": 7}
        scores = {name: torch.from_numpy(rng.normal(size=n)) * (i + 1) for i, (name, n) in enumerate(sizes.items())}
        yield Case(f"τ = {tau}, scope {scope}", (scores, tau, scope), select_by_sorting(scores, tau, scope))


def always_module(scores, tau, scope):
    return select(scores, tau, "module")


def always_model(scores, tau, scope):
    return select(scores, tau, "model")


def lowest(scores, tau, scope):
    return select({name: -values for name, values in scores.items()}, tau, scope)


def rounds_down(scores, tau, scope):
    if scope == "module":
        return {
            name: select({name: v}, max(0.0, int(tau * len(v)) / len(v)), scope)[name] for name, v in scores.items()
        }
    n = sum(map(len, scores.values()))
    return select(scores, int(tau * n) / n, scope)


def above_threshold(scores, tau, scope):
    return {name: values > tau for name, values in scores.items()}


def positions(scores, tau, scope):
    return {name: mask.nonzero()[:, 0] for name, mask in select(scores, tau, scope).items()}


exercise(
    "05.1",
    select,
    cases_select,
    {
        "you always select in each matrix. With scope 'model' all channels compete with each other.": always_module,
        "you always select over the whole model. With scope 'module' each matrix loses the same share.": always_model,
        "these are the lowest scores. Suspicious are the highest.": lowest,
        "the number is cut off. It is rounded: `round(tau * channels)`.": rounds_down,
        "τ is taken for a threshold of the score. It is a share of the channels.": above_threshold,
        "expected shape [4], got [2]": positions,
    },
    minutes=15,
    level="easy",
)

# %% [markdown]
# ## 05.2 Zero a channel on the right side
# A LoRA update is $BA$, $B$ [out, r] and $A$ [r, in]. A channel of the MLP is an *output* of `gate_proj` and
# `up_proj`, and an *input* of `down_proj`. Take the channels out of the update by zeroing one factor, and leave the
# other one and everything else alone. Afterwards the update's row (or column) is zero, and no other number of it has
# changed.


# %%
def suppress(adapter: dict[str, tuple[Tensor, Tensor]], mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Take channels of one MLP out of an adapter.

    Args:
        adapter: {"gate_proj", "up_proj", "down_proj": (A [r, in], B [out, r])}.
        mask: [channels], True for those to suppress.

    Returns:
        the adapter without them; the one given stays as it is.
    """
    ### BEGIN SOLUTION
    suppressed = {}
    for name, (a, b) in adapter.items():
        if name == "down_proj":
            suppressed[name] = (a.masked_fill(mask, 0.0), b.clone())
        else:
            suppressed[name] = (a.clone(), b.masked_fill(mask[:, None], 0.0))
    return suppressed
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Row $j$ of $BA$ is (row $j$ of $B$) times $A$. Column $j$ of $BA$ is $B$ times (column $j$ of $A$).

# %% [markdown] tags=["discussion"]
# Why is this gentle? A suppressed channel of an adapter falls back to the clean base: it still computes what it did
# before the attack. With full access there is nothing to fall back on, so the channel is drawn anew and computes
# nonsense until the recovery. And a row of `lora_A` is no channel at all: it is a direction of the rank, which all
# channels share.


# %% tags=["hidden"]
class Mlp(torch.nn.Module):
    """The three matrices of an MLP, for PEFT to adapt."""

    def __init__(self, width, channels):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(width, channels, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(channels, width, bias=False)


def updates_by_peft(adapter, width, channels):
    """The updates of an adapter as PEFT computes them."""
    names, rank = list(adapter), adapter["up_proj"][0].shape[0]
    model = get_peft_model(Mlp(width, channels).double(), LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    deltas = {}
    for name, (a, b) in adapter.items():
        layer = getattr(model.base_model.model, name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
        deltas[name] = layer.get_delta_weight("default").detach().double()
    return deltas


def judge_suppressed(adapter, mask, sizes):
    """Holds the update after suppression against the one before."""

    def judge(result):
        if not isinstance(result, dict) or result.keys() != adapter.keys():
            return f"expected a dict with {', '.join(adapter)}; got {result!r:.60}"
        for name, pair in result.items():
            if [tuple(x.shape) for x in pair] != [tuple(x.shape) for x in adapter[name]]:
                return f"{name}: expected (A, B) in the shapes they had; zero a channel, do not cut it out"
        before, after = updates_by_peft(adapter, *sizes), updates_by_peft(result, *sizes)
        for name in adapter:
            rows = mask if name != "down_proj" else torch.zeros(sizes[0], dtype=torch.bool)
            columns = mask if name == "down_proj" else torch.zeros(sizes[0], dtype=torch.bool)
            gone = rows[:, None] | columns[None]
            side = (
                "columns, its inputs: zero columns of A" if name == "down_proj" else "rows, its outputs: zero rows of B"
            )
            if after[name][gone].abs().max() > 0:
                return f"{name}: channels in the mask are still in the update. They are its {side}"
            if not torch.allclose(after[name][~gone], before[name][~gone]):
                return f"{name}: numbers of other channels have changed. The masked channels are its {side}"
            kept = 1 if name == "down_proj" else 0
            if not torch.equal(result[name][kept], adapter[name][kept]):
                return f"{name}: {'AB'[kept]} has changed, and the other factor alone would do"
        return None

    return judge


def cases_suppress(rng):
    for width, channels, chosen, name in (
        (4, 4, [1], "a square MLP, one channel"),
        (5, 8, [0, 7], "eight channels, two of them"),
        (6, 9, [2, 3, 4, 5], "nine channels, four of them"),
        (3, 3, [0, 1, 2], "all channels"),
    ):
        shapes = {"gate_proj": (width, channels), "up_proj": (width, channels), "down_proj": (channels, width)}
        adapter = {
            m: (torch.from_numpy(rng.normal(size=(2, i))), torch.from_numpy(rng.normal(size=(o, 2))))
            for m, (i, o) in shapes.items()
        }
        mask = torch.zeros(channels, dtype=torch.bool)
        mask[chosen] = True
        yield Case(name, (adapter, mask), judge=judge_suppressed(adapter, mask, (width, channels)))


def rows_everywhere(adapter, mask):
    return {
        name: (a, b.masked_fill(mask[:, None], 0.0) if b.shape[0] == len(mask) else b)
        for name, (a, b) in adapter.items()
    }


def columns_everywhere(adapter, mask):
    return {name: (a.masked_fill(mask, 0.0) if a.shape[1] == len(mask) else a, b) for name, (a, b) in adapter.items()}


def both_factors(adapter, mask):
    found = suppress(adapter, mask)
    return {name: (a * 0 if name != "down_proj" else a, b) for name, (a, b) in found.items()}


def cuts_out(adapter, mask):
    return {name: (a[:, ~mask], b) if name == "down_proj" else (a, b[~mask]) for name, (a, b) in adapter.items()}


def keeps_the_masked(adapter, mask):
    return suppress(adapter, ~mask)


exercise(
    "05.2",
    suppress,
    cases_suppress,
    {
        "They are its columns, its inputs: zero columns of A": rows_everywhere,
        "They are its rows, its outputs: zero rows of B": columns_everywhere,
        "gate_proj: numbers of other channels have changed. The masked channels are its rows": both_factors,
        "zero a channel, do not cut it out": cuts_out,
        "gate_proj: channels in the mask are still in the update": keeps_the_masked,
    },
    minutes=10,
    level="medium",
)

# %% [markdown]
# ## 05.3 Choose τ from a challenge
# A defender without the true trigger plants a challenge and measures it after cures of several shares τ and several
# recoveries. From those points choose: the smallest τ whose ASR is at most the threshold; of several good points with
# that τ the one of the best utility. If no point is good enough, take the one with the lowest ASR, and say that it is
# not.

# %%
Point = tuple[float, float, float]  # τ, ASR of the challenge, utility


def choose_tau(points: list[Point], threshold: float) -> tuple[Point, bool]:
    """Choose how much to suppress.

    Args:
        points: (τ, ASR of the challenge, utility), in any order; no two with equal ASRs or utilities.
        threshold: the largest ASR that counts as gone.

    Returns:
        the point chosen, and whether its ASR is good enough.
    """
    ### BEGIN SOLUTION
    good = [point for point in points if point[1] <= threshold]
    if good:
        return min(good, key=lambda point: (point[0], -point[2])), True
    return min(points, key=lambda point: point[1]), False
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# First keep the good points, then the smallest τ among them. The list is not sorted, and the ASR need not fall with τ.

# %% [markdown] tags=["hint"]
# `min(good, key=lambda point: (point[0], -point[2]))` compares τ first and, where it is equal, the utility.

# %% [markdown] tags=["discussion"]
# "The lowest ASR" would be the wrong rule: it drifts to the largest τ and pays for the last tenth of a percent with
# utility. But the smallest τ below a threshold has a bias of its own: among several noisy measurements it picks one
# that happened to fall low, so the true ASR there is a little higher than measured. Ask more prompts at the chosen
# point, or lower the threshold by the width of its interval. And a challenge speaks for backdoors of its own kind
# only.


# %% tags=["hidden"]
def choose_by_sorting(points, threshold):
    """By numpy's sort of columns."""
    table = np.array(points)
    enough = table[table[:, 1] <= threshold]
    if len(enough):
        return tuple(enough[np.lexsort((-enough[:, 2], enough[:, 0]))[0]].tolist()), True
    return tuple(table[table[:, 1].argmin()].tolist()), False


def cases_choose_tau(rng):
    low, mid, high = (0.1, 0.3, 0.9), (0.2, 0.04, 0.8), (0.5, 0.0, 0.7)
    yield Case("by hand: 0.2 suffices", ([high, mid, low], 0.05), (mid, True))
    yield Case("by hand: exactly at the threshold", ([high, mid, low], 0.04), (mid, True))
    worse, better = (0.2, 0.01, 0.6), (0.2, 0.03, 0.75)
    yield Case("by hand: three recoveries at τ = 0.2", ([worse, better, (0.2, 0.3, 0.9), high], 0.05), (better, True))
    again = (0.4, 0.2, 0.95)
    yield Case("by hand: the ASR rises again", ([again, mid, (0.6, 0.01, 0.9)], 0.05), (mid, True))
    bad = (0.5, 0.4, 0.5)
    yield Case("by hand: none suffices", ([(0.1, 0.9, 0.9), (0.3, 0.2, 0.8), bad], 0.05), ((0.3, 0.2, 0.8), False))
    for threshold in (0.5, 0.05):
        taus, utilities = rng.integers(1, 5, 12) / 10, rng.permutation(100)[:12] / 100
        asrs = rng.permutation(np.arange(20, 100))[:12] / 100
        points = list(zip(taus.tolist(), asrs.tolist(), utilities.tolist(), strict=True))
        yield Case(f"twelve points, threshold {threshold}", (points, threshold), choose_by_sorting(points, threshold))


def if_good(rule):
    def answer(points, threshold):
        good = [point for point in points if point[1] <= threshold]
        return (rule(good), True) if good else (min(points, key=lambda point: point[1]), False)

    return answer


lowest_asr = if_good(lambda good: min(good, key=lambda point: point[1]))
first_in_the_list = if_good(lambda good: good[0])
best_utility = if_good(lambda good: max(good, key=lambda point: point[2]))
first_of_that_tau = if_good(lambda good: min(good, key=lambda point: point[0]))


def strictly_below(points, threshold):
    return choose_tau(points, threshold - 1e-12)


def after_the_last_bad(points, threshold):
    worst = max((tau for tau, asr, _ in points if asr > threshold), default=0.0)
    good = [point for point in points if point[1] <= threshold and point[0] > worst]
    return choose_tau(good or points, threshold)


def largest_tau_if_none(points, threshold):
    found = choose_tau(points, threshold)
    return found if found[1] else (max(points), False)


exercise(
    "05.3",
    choose_tau,
    cases_choose_tau,
    {
        "this is the lowest ASR. The smallest τ that is good enough costs less utility.": lowest_asr,
        "an ASR equal to the threshold is good enough.": strictly_below,
        "the points come in any order. Take the smallest τ, not the first.": first_in_the_list,
        "of several good points with the smallest τ the best utility decides.": first_of_that_tau,
        "a larger τ may be worse again. The smallest good one counts all the same.": after_the_last_bad,
        "utility only decides between points of one τ.": best_utility,
        "none is good enough: then the lowest ASR decides, not the largest τ.": largest_tau_if_none,
    },
    minutes=10,
    level="easy",
)
