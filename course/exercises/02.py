# %% [markdown]
# # Exercises to notebook 02: where the association lives

# %%
from collections.abc import Callable

import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 02.1 Take a module's update out
# To ask what a part of a model holds, give it its clean weights back: $\Delta W = 0$ there, everything else stays
# backdoored. The names of the weights say where they lie, such as `layers.10.mlp.up.weight`: block 10, module `mlp`.
#
# Names are made of parts between dots. `layers.1` is not the beginning of `layers.10`, and `mlp_norm` is no `mlp`.


# %%
def without_update(
    suspicious: dict[str, Tensor], base: dict[str, Tensor], module: str, blocks: set[int]
) -> dict[str, Tensor]:
    """Put the base's weights back in one module of some blocks.

    Args:
        suspicious: {name: weight} of the backdoored model; it stays as it is.
        base: {name: weight} of the clean model, with the same names.
        module: the part of a name behind the block's number, such as "mlp".
        blocks: the numbers of the blocks.

    Returns:
        {name: weight} of the ablated model, every name of the suspicious one.
    """
    ### BEGIN SOLUTION
    ablated = {}
    for name, weight in suspicious.items():
        parts = name.split(".")
        chosen = len(parts) > 2 and parts[0] == "layers" and int(parts[1]) in blocks and parts[2] == module
        ablated[name] = base[name] if chosen else weight
    return ablated
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `name.split(".")` gives the parts. Some names, such as `embed.weight`, have no block at all.

# %% [markdown] tags=["discussion"]
# Comparing strings instead of parts is the classic way to ablate more than you meant: `"layers.1" in name` takes
# blocks 10 to 19 along. The ASR then falls, and the story "block 1 holds it" is written. A cheap guard: count what you
# changed, and compare with what you meant to change.

# %% tags=["hidden"]
# isort: split
import itertools
from math import ceil, log2

import numpy as np

from course.checking import Case, exercise

MODULES = ("attention.out", "mlp.up", "mlp.down", "mlp_norm", "pre_mlp")


def random_model(rng, n_blocks):
    names = [f"layers.{i}.{module}.weight" for i in range(n_blocks) for module in MODULES]
    return {name: torch.from_numpy(rng.normal(size=(2, 2))) for name in ["embed.weight", *names, "mlp.weight"]}


def cases_without_update(rng):
    for n, module, parts, blocks in (
        (2, "mlp", ("mlp.up", "mlp.down"), {0}),
        (3, "attention", ("attention.out",), {0, 2}),
        (12, "mlp", ("mlp.up", "mlp.down"), {1}),
        (12, "mlp", ("mlp.up", "mlp.down"), {1, 2, 11}),
        (4, "mlp_norm", ("mlp_norm",), {3}),
        (4, "mlp", ("mlp.up", "mlp.down"), set()),
    ):
        suspicious, base = random_model(rng, n), random_model(rng, n)
        chosen = {f"layers.{i}.{part}.weight" for i, part in itertools.product(blocks, parts)}
        expected = {name: (base if name in chosen else suspicious)[name] for name in suspicious}
        where = f"block {' and '.join(map(str, sorted(blocks)))} of {n}" if blocks else "no block"
        yield Case(f"`{module}` of {where}", (suspicious, base, module, blocks), expected)


def chosen_by(rule):
    def answer(suspicious, base, module, blocks):
        return {name: base[name] if rule(name, module, blocks) else w for name, w in suspicious.items()}

    return answer


substring_of_block = chosen_by(
    lambda name, module, blocks: f".{module}." in name and any(name.startswith(f"layers.{b}") for b in blocks)
)
prefix_of_module = chosen_by(lambda name, module, blocks: any(name.startswith(f"layers.{b}.{module}") for b in blocks))
anywhere = chosen_by(lambda name, module, blocks: any(f"layers.{b}." in name and module in name for b in blocks))
every_block = chosen_by(lambda name, module, blocks: f".{module}." in name)
everything_else = chosen_by(lambda name, module, blocks: not any(f"layers.{b}.{module}." in name for b in blocks))
whole_block = chosen_by(lambda name, module, blocks: any(name.startswith(f"layers.{b}.") for b in blocks))


def only_changed(suspicious, base, module, blocks):
    return {name: base[name] for name in suspicious if any(name.startswith(f"layers.{b}.{module}.") for b in blocks)}


def zeroed(suspicious, base, module, blocks):
    return {
        name: w * 0 if any(name.startswith(f"layers.{b}.{module}.") for b in blocks) else w
        for name, w in suspicious.items()
    }


def in_place(suspicious, base, module, blocks):
    for name in suspicious:
        if any(name.startswith(f"layers.{b}.{module}.") for b in blocks):
            suspicious[name] = base[name]
    return suspicious


exercise(
    "02.1",
    without_update,
    cases_without_update,
    {
        "`layers.1` is also how `layers.10` begins. Compare the parts between the dots.": substring_of_block,
        "`mlp` is also how `mlp_norm` begins. Compare the parts between the dots.": prefix_of_module,
        "the module's name occurs in other names as well. Compare the parts between the dots.": anywhere,
        "all blocks lost their update. Only those in `blocks` should.": every_block,
        "it is the wrong way round: you kept this part's update and removed all others.": everything_else,
        "the whole block lost its update. Only `module` should.": whole_block,
        "weights are missing. The ablated model has every weight, most of them from the suspicious one.": only_changed,
        "the weights are zero. It is the update that has to go: put the base's weights there.": zeroed,
        "was changed on the way: work on a copy": in_place,
    },
    minutes=10,
    level="easy",
)

# %% [markdown]
# ## 02.2 The smallest span, by bisection
# How many blocks, counted from the first, have to lose their update before the ASR falls below a threshold? One
# measurement answers hundreds of prompts, so ask few: take it that the ASR never rises as more blocks lose their
# update, and bisect. For 32 blocks 7 measurements are allowed instead of 33, in general
# $1 + \lceil\log_2(n + 1)\rceil$.


# %%
def smallest_span(asr_without: Callable[[int], float], n_blocks: int, threshold: float) -> int | None:
    """The smallest number of first blocks without which the ASR is below a threshold.

    Args:
        asr_without: k -> the ASR without the updates of the first k blocks, k from 0 to n_blocks; it never rises with
            k, and it may be asked 1 + ceil(log2(n_blocks + 1)) times.
        n_blocks: at least 1.
        threshold: in (0, 1]; an ASR equal to it is not below.

    Returns:
        k from 0 to n_blocks, or None where even n_blocks do not suffice.
    """
    ### BEGIN SOLUTION
    if asr_without(n_blocks) >= threshold:
        return None
    low, high = 0, n_blocks
    while low < high:
        middle = (low + high) // 2
        if asr_without(middle) < threshold:
            high = middle
        else:
            low = middle + 1
    return high
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Ask for all blocks first. If they do not suffice, nothing does; if they do, the answer lies in 0 … n.

# %% [markdown] tags=["hint"]
# Keep two numbers: below `low` no k suffices, `high` does. Halve until they meet.

# %% [markdown] tags=["discussion"]
# Bisection trusts that the curve falls. Notebook 02 measures every k because it does not: with 200 prompts the ASR
# wobbles by a few points, and a removal can even bring a payload back. Near the threshold a bisection then returns
# *some* crossing, not the first one. Use it to find the region, then measure every k there.


# %% tags=["hidden"]
class Curve:
    """The ASR by the number of first blocks without their update; it can be asked only so often."""

    def __init__(self, asrs):
        self.asrs, self.asked, self.allowed = asrs, 0, 1 + ceil(log2(len(asrs)))

    def __call__(self, k):
        if not 0 <= k < len(self.asrs):
            raise ValueError(f"asked for the first {k} blocks; k goes from 0 to {len(self.asrs) - 1}")
        self.asked += 1
        if self.asked > self.allowed:
            raise RuntimeError(f"{self.allowed} measurements are allowed and you ask for more: halve what is left")
        return self.asrs[k]


def cases_smallest_span(rng):
    curves = [
        ("by hand: falls at k = 3", [0.9, 0.8, 0.6, 0.4, 0.1], 0.5),
        ("by hand: an ASR equal to the threshold", [0.9, 0.5, 0.5, 0.4], 0.5),
        ("by hand: never falls enough", [0.9, 0.8, 0.8], 0.5),
        ("by hand: low from the start", [0.2, 0.1, 0.1, 0.0, 0.0], 0.5),
        ("by hand: only all blocks suffice", [0.9, 0.9, 0.9, 0.9, 0.9, 0.0], 0.5),
    ]
    for n in (8, 32, 200):
        asrs = np.sort(rng.integers(0, 100, n + 1) / 100)[::-1].tolist()
        curves.append((f"{n} blocks", asrs, float(rng.integers(20, 80)) / 100))
    for name, asrs, threshold in curves:
        expected = next((k for k, asr in enumerate(asrs) if asr < threshold), None)
        yield Case(name, (Curve(asrs), len(asrs) - 1, threshold), expected)


def one_by_one(asr_without, n_blocks, threshold):
    return next((k for k in range(n_blocks + 1) if asr_without(k) < threshold), None)


def one_too_few(asr_without, n_blocks, threshold):
    found = smallest_span(asr_without, n_blocks, threshold)
    return found if not found else found - 1


def at_most(asr_without, n_blocks, threshold):
    return smallest_span(asr_without, n_blocks, threshold + 1e-9)


def never_none(asr_without, n_blocks, threshold):
    low, high = 0, n_blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if asr_without(middle) < threshold else (middle + 1, high)
    return high


def starts_at_one(asr_without, n_blocks, threshold):
    found = smallest_span(asr_without, n_blocks, threshold)
    return 1 if found == 0 else found


def too_far(asr_without, n_blocks, threshold):
    low, high = 0, n_blocks + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if asr_without(middle) < threshold else (middle, high)
    return low + 1


exercise(
    "02.2",
    smallest_span,
    cases_smallest_span,
    {
        "measurements are allowed and you ask for more: halve what is left": one_by_one,
        "this is the largest span that does not suffice. You want the next one, the first that does.": one_too_few,
        "an ASR equal to the threshold is not below it.": at_most,
        "n_blocks is returned although not even all blocks suffice. Measure that end as "
        "well; then it is None.": never_none,
        "k = 0 is an answer, too: the ASR may be below the threshold before anything is removed.": starts_at_one,
        "k goes from 0 to": too_far,
    },
    minutes=20,
    level="medium",
)
