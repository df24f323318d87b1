# %% [markdown]
# # Exercises to notebooks 10 to 13: what a study may say

# %%
import numpy as np

from course import check

# %% [markdown]
# ## 10.1 Bootstrap over seeds
# A defense was run on several seeds, 200 prompts each, and so was a control on the same seeds. How far apart are their
# ASRs, and how sure is that? Prompts of one seed share one trained model, so they are no independent witnesses: draw
# *seeds* with replacement, and with a seed both of its models. Take the difference of the mean ASRs, do it again and
# again, and cut the same share off both ends of what came out.


# %%
def seed_interval(
    first: np.ndarray, second: np.ndarray, level: float, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The percentile bootstrap interval of the difference of two ASRs, over seeds.

    Args:
        first: [seeds, prompts], True where the first model of a seed gave the payload.
        second: [seeds, prompts], the second model, on the same seeds in the same order.
        level: the coverage, such as 0.95.
        draws: how many times to draw.
        rng: makes every random choice.

    Returns:
        (low, high) of the first rate minus the second.
    """
    ### BEGIN SOLUTION
    differences = first.mean(axis=1) - second.mean(axis=1)
    chosen = rng.integers(0, len(differences), (draws, len(differences)))
    low, high = np.quantile(differences[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Once each seed has one number, the difference of its two rates, the prompts are out of the way.

# %% [markdown] tags=["hint"]
# `rng.integers(0, n, (draws, n))` draws all bootstrap samples at once.

# %% [markdown] tags=["discussion"]
# 1,600 prompts look like a lot, and an interval over prompts is narrow. But what varies is the *training*: another
# seed may give an ASR of 5 or of 60 %. Eight seeds are eight observations. The bootstrap does not repair that; with
# three seeds it can draw only ten different sets, and its interval is too narrow. Report the seeds, and how many
# there were.

# %% tags=["hidden"]
# isort: split
from scipy.stats import bootstrap

from course.checking import Case, exercise

DRAWS = 3000


def interval_of(samples, level):
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])


def known_intervals(first, second, level):
    """The right interval by scipy, and what typical mistakes give, {message: (low, high)}."""
    rng, one, two = np.random.default_rng(1), first.mean(axis=1), second.mean(axis=1)
    n, differences = len(one), one - two
    options = {"confidence_level": level, "n_resamples": DRAWS, "method": "percentile", "rng": rng}
    right = bootstrap((differences,), np.mean, vectorized=True, **options).confidence_interval
    apart = [one[rng.integers(0, n, (DRAWS, n))].mean(1) - two[rng.integers(0, n, (DRAWS, n))].mean(1)]
    errors = [np.sqrt(x.mean() * (1 - x.mean()) / x.size) for x in (first, second)]
    around = rng.normal(one.mean() - two.mean(), np.hypot(*errors), DRAWS)
    single = differences[rng.integers(0, n, DRAWS * 3)]
    wrong = {
        "you draw prompts. Prompts of one seed share one model: draw seeds.": interval_of(around, level),
        "both models draw seeds of their own. They were run on the same seeds: draw a seed with both.": interval_of(
            apart[0], level
        ),
        "this is how single seeds spread. The interval is of the mean over as many seeds as there are.": interval_of(
            single, level
        ),
        "the sign is turned: it is the first rate minus the second.": (-right.high, -right.low),
        "only one end is cut. Cut (1 - level) / 2 off both.": tuple(
            bootstrap((differences,), np.mean, **(options | {"confidence_level": 2 * level - 1})).confidence_interval
        ),
    }
    return (right.low, right.high), wrong


def judge_interval(first, second, level):
    """Compares ends with the right ones, within an eighth of the width: enough for any run of random draws."""

    def judge(result):
        if not isinstance(result, tuple | list) or len(result) != 2:
            return "expected two numbers, low and high"
        right, wrong = known_intervals(first, second, level)

        def miss(interval):
            return max(abs(a - b) for a, b in zip(result, interval, strict=True)) / (interval[1] - interval[0])

        if miss(right) < 1 / 8:
            return None
        told = f"expected about ({right[0]:.3f}, {right[1]:.3f}), got ({result[0]:.3f}, {result[1]:.3f})"
        likely = min(wrong, key=lambda message: miss(wrong[message]))
        return told + (f"\n  A likely mistake: {likely}" if miss(wrong[likely]) < 1 / 8 else "")

    return judge


def cases_seed_interval(rng):
    for seeds, prompts, level, name in (
        (8, 200, 0.95, "eight seeds"),
        (12, 100, 0.9, "twelve seeds, level 0.9"),
        (20, 50, 0.8, "twenty seeds, level 0.8"),
    ):
        hard = rng.permutation(np.linspace(0.15, 0.75, seeds))
        easier = np.clip(hard - 0.1 + rng.permutation(np.linspace(-0.09, 0.09, seeds)), 0, 1)
        first, second = (rng.random((seeds, prompts)) < rates[:, None] for rates in (hard, easier))
        asked = (first, second, level, DRAWS, np.random.default_rng(int(rng.integers(10**6))))
        yield Case(name, asked, judge=judge_interval(first, second, level), may_change=True)


def draws_prompts(first, second, level, draws, rng):
    rates = []
    for marks in (first, second):
        rates.append(rng.binomial(marks.size, marks.mean(), draws) / marks.size)
    return tuple(interval_of(rates[0] - rates[1], level))


def unpaired(first, second, level, draws, rng):
    n = len(first)
    rates = [marks.mean(axis=1)[rng.integers(0, n, (draws, n))].mean(axis=1) for marks in (first, second)]
    return tuple(interval_of(rates[0] - rates[1], level))


def single_seeds(first, second, level, draws, rng):
    differences = first.mean(axis=1) - second.mean(axis=1)
    return tuple(interval_of(differences[rng.integers(0, len(first), draws)], level))


def turned(first, second, level, draws, rng):
    return seed_interval(second, first, level, draws, rng)


def one_end(first, second, level, draws, rng):
    return seed_interval(first, second, 2 * level - 1, draws, rng)


exercise(
    "10.1",
    seed_interval,
    cases_seed_interval,
    {
        "you draw prompts. Prompts of one seed share one model: draw seeds.": draws_prompts,
        "They were run on the same seeds: draw a seed with both.": unpaired,
        "this is how single seeds spread.": single_seeds,
        "the sign is turned: it is the first rate minus the second.": turned,
        "only one end is cut. Cut (1 - level) / 2 off both.": one_end,
    },
    minutes=20,
    level="hard",
)

# %% [markdown]
# ## 10.2 The regret of a choice
# A challenge lets the defender *choose* τ without the true trigger. How much does that choice cost? Its regret is the
# true ASR at the chosen setting minus the lowest true ASR that any setting of that attack has. The defender chooses
# by the challenge's ASR, for each attack anew; of equal ones the first.


# %%
def regret(challenge: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """What choosing by a challenge costs.

    Args:
        challenge: [attacks, settings], the challenge's ASR, which the defender sees.
        truth: [attacks, settings], the true ASR, which he does not.

    Returns:
        the mean regret over the attacks, and the largest one; both >= 0.
    """
    ### BEGIN SOLUTION
    chosen = challenge.argmin(axis=1)
    costs = truth[np.arange(len(truth)), chosen] - truth.min(axis=1)
    return float(costs.mean()), float(costs.max())
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Two tables, two uses: `challenge` says *where*, `truth` says *how much*.

# %% [markdown] tags=["discussion"]
# A correlation between challenge and truth says how alike the curves are; the regret says what a user loses. They can
# disagree: a challenge that is wrong everywhere except at its minimum costs nothing. Report the largest regret beside
# the mean, because a defender meets one attacker, not the mean of thirteen. And never choose by `truth` and call the
# result the defense's.


# %% tags=["hidden"]
def regret_by_loops(challenge, truth):
    costs = []
    for seen, real in zip(challenge.tolist(), truth.tolist(), strict=True):
        costs.append(real[seen.index(min(seen))] - min(real))
    return sum(costs) / len(costs), max(costs)


def cases_regret(rng):
    seen, real = np.array([[0.5, 0.1, 0.2], [0.3, 0.2, 0.0]]), np.array([[0.6, 0.3, 0.1], [0.4, 0.1, 0.1]])
    yield Case("by hand: regrets 0.2 and 0", (seen, real), (0.1, 0.2))
    yield Case("by hand: equal challenges, the first one", (np.array([[0.1, 0.1]]), np.array([[0.5, 0.2]])), (0.3, 0.3))
    for attacks, settings in ((1, 6), (13, 5), (40, 9)):
        seen, real = rng.random((attacks, settings)), rng.random((attacks, settings))
        yield Case(f"{attacks} attacks, {settings} settings", (seen, real), regret_by_loops(seen, real))


def costs_of(choose):
    def answer(challenge, truth):
        costs = choose(challenge, truth)
        return float(costs.mean()), float(costs.max())

    return answer


def at(table, chosen):
    return table[np.arange(len(table)), chosen]


optimism = costs_of(lambda seen, real: at(real, seen.argmin(1)) - seen.min(1))
by_truth = costs_of(lambda seen, real: at(real, real.argmin(1)) - real.min(1))
one_setting = costs_of(lambda seen, real: real[:, seen.mean(0).argmin()] - real.min(1))
highest = costs_of(lambda seen, real: at(real, seen.argmax(1)) - real.min(1))
one_target = costs_of(lambda seen, real: at(real, seen.argmin(1)) - real.min())


exercise(
    "10.2",
    regret,
    cases_regret,
    {
        "you subtract the challenge's ASR. That is how optimistic it was; regret compares true with true.": optimism,
        "you choose by the truth, so the regret is 0. The defender sees the challenge alone.": by_truth,
        "one setting serves all attacks. The defender chooses for each anew.": one_setting,
        "the highest challenge is chosen. A low ASR is the good one.": highest,
        "every attack is held against the best of all attacks. Its own lowest true ASR "
        "is what could be had.": one_target,
    },
    minutes=10,
    level="easy",
)
