# %% [markdown]
# # Exercises to notebook 08: external evidence

# %%
import random

from course import check

# %% [markdown]
# ## 08.1 TextRank
# Evidence is asked for about the *keywords* of a prompt. Each word points to the words at most `window` places behind
# it: to each of them once, however often it stands there, and never to itself. A word is heavy if heavy words point to
# it (Eq. 15), and a word that points to $L_j$ others shares its weight out among them:
#
# $$W_i = (1 - d) + d \sum_{j \to i} \frac{W_j}{L_j}$$
#
# Start from 1 and repeat until no weight moves by more than $10^{-10}$.


# %%
def textrank(words: list[str], window: int, d: float) -> dict[str, float]:
    """The weight of every word.

    Args:
        words: in the order of the text; a word may occur several times.
        window: 1 or more, how far ahead a word points.
        d: damping, in [0, 1).

    Returns:
        {word: W}, within 1e-8 of the solution of Eq. 15.
    """
    ### BEGIN SOLUTION
    targets = {word: set() for word in words}
    for i, word in enumerate(words):
        targets[word] |= {later for later in words[i + 1 : i + 1 + window] if later != word}
    old = dict.fromkeys(words, 1.0)
    while True:
        new = dict.fromkeys(words, 1 - d)
        for word, reached in targets.items():
            for other in reached:
                new[other] += d * old[word] / len(reached)
        if max(abs(new[word] - old[word]) for word in new) < 1e-10:
            return new
        old = new
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Collect for each word the *set* of words it points to; $L_j$ is the size of that set.

# %% [markdown] tags=["hint"]
# The last word of a text may point nowhere. Then it shares out nothing; do not divide by its $L$ = 0.

# %% [markdown] tags=["discussion"]
# This is not quite PageRank. PageRank hands the weight of words that point nowhere to *all* words and makes the sum 1;
# Eq. 15 lets it go. On a short prompt, whose last word nearly always points nowhere, the two rank differently. Before
# you replace a formula by a library's function of a similar name, compare both on three words.

# %% tags=["hidden"]
# isort: split
import itertools
from collections import Counter

import networkx as nx
import numpy as np
from scipy.stats import chisquare

from course.checking import Case, exercise


def word_graph(words, window, directed=True):
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(words)
    graph.add_edges_from(
        (words[i], words[k]) for i in range(len(words)) for k in range(i + 1, min(len(words), i + window + 1))
    )
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


def solve(graph, d):
    """Eq. 15 as a system of linear equations."""
    if not graph.is_directed():
        graph = graph.to_directed()
    names = list(graph)
    links = nx.to_numpy_array(graph, names)
    shares = links / np.maximum(links.sum(axis=1, keepdims=True), 1)
    weights = np.linalg.solve(np.eye(len(names)) - d * shares.T, np.full(len(names), 1 - d))
    return dict(zip(names, map(float, weights), strict=True))


def cases_textrank(rng):
    yield Case("by hand: two words", (["red", "fox"], 1, 0.5), {"red": 0.5, "fox": 0.75})
    by_hand = {"a": 0.5, "b": 0.625, "c": 0.9375}
    yield Case("by hand: three words, window 2", (["a", "b", "c"], 2, 0.5), by_hand)
    for n, kinds, window, d, name in (
        (12, 20, 1, 0.85, "window 1"),
        (20, 7, 2, 0.85, "words that occur again"),
        (30, 6, 4, 0.5, "window 4, many repetitions"),
    ):
        words = [f"w{i}" for i in rng.integers(0, kinds, n)]
        yield Case(name, (words, window, d), solve(word_graph(words, window), d))
    words = ["to", "be", "or", "not", "to", "be"]
    yield Case("the window reaches beyond the end", (words, 9, 0.85), solve(word_graph(words, 9), 0.85))


def undirected(words, window, d):
    return solve(word_graph(words, window, directed=False), d)


def as_pagerank(words, window, d):
    return nx.pagerank(word_graph(words, window), alpha=d, tol=1e-12, max_iter=1000)


def scaled_pagerank(words, window, d):
    return {word: w * len(set(words)) for word, w in as_pagerank(words, window, d).items()}


def window_too_short(words, window, d):
    return solve(word_graph(words, window - 1), d)


def turned(words, window, d):
    return solve(word_graph(words[::-1], window), d)


def counts_repeats(words, window, d):
    names = list(dict.fromkeys(words))
    links = np.zeros((len(names), len(names)))
    for i, word in enumerate(words):
        for later in words[i + 1 : i + 1 + window]:
            links[names.index(word), names.index(later)] += later != word
    shares = links / np.maximum(links.sum(axis=1, keepdims=True), 1)
    weights = np.linalg.solve(np.eye(len(names)) - d * shares.T, np.full(len(names), 1 - d))
    return dict(zip(names, map(float, weights), strict=True))


def not_shared_out(words, window, d):
    graph, weights = word_graph(words, window), dict.fromkeys(words, 1.0)
    for _ in range(200):
        weights = {w: min(1e9, 1 - d + d * sum(weights[j] for j in graph.predecessors(w))) for w in graph}
    return weights


exercise(
    "08.1",
    textrank,
    cases_textrank,
    {
        "your words point both ways. They point in the direction of reading.": undirected,
        "the weights sum to 1: this is PageRank. Eq. 15 gives a word that none points to 1 − d.": as_pagerank,
        "words that point nowhere share their weight out to all, as in PageRank. Eq. 15 lets it go.": scaled_pagerank,
        "your window is one short: a word points to `window` words behind it.": window_too_short,
        "your words point backwards. A word points to the words behind it.": turned,
        "a word that follows twice counts twice. An edge is there or not.": counts_repeats,
        "W_j is not divided by L_j. A word shares its weight out.": not_shared_out,
    },
    minutes=15,
    level="medium",
)

# %% [markdown]
# ## 08.2 A derangement as a control
# Does evidence help because of what it *says*, or because some text stands there? The control gives every prompt the
# evidence of another one. A plain shuffle leaves some prompts their own (on average one, however many there are), and
# a rotation always pairs the same neighbours. Draw permutations without a fixed point, *all equally likely*.


# %%
def derangements(n: int, count: int, rng: random.Random) -> list[list[int]]:
    """Draw permutations that leave nothing in its place.

    Args:
        n: how many prompts, at least 2.
        count: how many permutations to draw.
        rng: makes every random choice.

    Returns:
        `count` permutations of 0 … n − 1 as lists p with p[i] != i for every i, each of them equally likely.
    """
    ### BEGIN SOLUTION
    found = []
    while len(found) < count:
        order = rng.sample(range(n), n)
        if all(i != place for i, place in enumerate(order)):
            found.append(order)
    return found
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Draw, look, and draw again if there is a fixed point. How often, on average?

# %% [markdown] tags=["discussion"]
# About one permutation in $e \approx 2.72$ has no fixed point, for any n, so throwing the others away costs less than
# three draws. Repairing a bad draw by swaps is the tempting alternative, and makes some derangements likelier than
# others. One more trap on real data: two prompts with the *same* evidence. Then "another prompt's" is still one's
# own, so compare texts, not places.


# %% tags=["hidden"]
def judge_derangements(n, count):
    """Checks each permutation, and for small n that all of them come equally often."""

    def judge(result):
        if not isinstance(result, list) or len(result) != count:
            return f"expected a list of {count} permutations"
        for order in result:
            if sorted(order) != list(range(n)):
                return f"{order} is no permutation of 0 to {n - 1}: every prompt's evidence is used once"
            if any(i == place for i, place in enumerate(order)):
                return f"{order} leaves {next(i for i, p in enumerate(order) if i == p)} in its place"
        every = [p for p in itertools.permutations(range(n)) if all(i != x for i, x in enumerate(p))] if n <= 4 else []
        times = Counter(map(tuple, result))
        missing = [list(p) for p in every if not times[p]]
        if count >= 500 and len(missing) == len(every) - 1:
            return f"always the same one; there are {len(every)}, and each is to be equally likely"
        if count >= 500 and missing:
            return f"{missing[0]} never comes in {count} draws; each of the {len(every)} is to be equally likely"
        if count >= 500 and every and chisquare([times[p] for p in every]).pvalue < 1e-6:
            often, rare = max(every, key=times.get), min(every, key=times.get)
            return (
                f"{list(often)} comes {times[often]} times and {list(rare)} {times[rare]} times in {count}: "
                "each is to be equally likely"
            )
        return None

    return judge


def cases_derangements(rng):
    for n, count in ((2, 5), (3, 20), (30, 20), (4, 1800)):
        asked = (n, count, random.Random(int(rng.integers(10**6))))
        yield Case(f"{count} permutations of {n}", asked, judge=judge_derangements(n, count), may_change=True)


def plain_shuffle(n, count, rng):
    return [rng.sample(range(n), n) for _ in range(count)]


def rotation(n, count, rng):
    return [[(i + 1) % n for i in range(n)] for _ in range(count)]


def one_cycle(n, count, rng):
    found = []
    for _ in range(count):
        order = rng.sample(range(n), n)
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        found.append([following[i] for i in range(n)])
    return found


def independent_draws(n, count, rng):
    return [[rng.choice([k for k in range(n) if k != i]) for i in range(n)] for _ in range(count)]


def repaired(n, count, rng):
    found = plain_shuffle(n, count, rng)
    for order in found:
        for i in range(n):
            if order[i] == i:
                k = (i + 1) % n
                order[i], order[k] = order[k], order[i]
    return found


exercise(
    "08.2",
    derangements,
    cases_derangements,
    {
        "in its place": plain_shuffle,
        "always the same one; there are 9": rotation,
        "[1, 0, 3, 2] never comes": one_cycle,
        "every prompt's evidence is used once": independent_draws,
        "each is to be equally likely": repaired,
    },
    minutes=10,
    level="easy",
)
