"""TextRank: Eq. 15 by hand, by a dense linear solve, by the paper's own loop, and its relation to PageRank."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.core.errors import LabError
from helpers.defenses.conflict.textrank import STOP_WORDS, keywords, tokenise, weights, word_graph

TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=25)


def solved(graph, damping=0.85):
    """The oracle: (I - d Pᵀ) W = (1 - d) 1, dense; P[j, i] = 1 / L(j) where j points to i."""
    words = list(graph)
    transition = np.zeros((len(words), len(words)))
    for j, word in enumerate(words):
        for pointed in graph[word]:
            transition[j, words.index(pointed)] = 1 / len(graph[word])
    system = np.eye(len(words)) - damping * transition.T
    return dict(zip(words, np.linalg.solve(system, np.full(len(words), 1 - damping)), strict=True))


def algorithm_1(graph, damping=0.85, rounds=200, epsilon=1e-10):
    """The paper's listing as it stands: each new weight is used at once."""
    w = dict.fromkeys(graph, 1.0)
    for _ in range(rounds):
        before = dict(w)
        for i in graph:
            w[i] = (1 - damping) + damping * sum(w[j] / graph.out_degree(j) for j in graph.predecessors(i))
        if sum(abs(w[i] - before[i]) for i in graph) < epsilon:
            break
    return w


# --- the graph ------------------------------------------------------------------------------------------------------


def test_words_point_to_those_close_behind_them_and_never_to_themselves():
    assert set(word_graph(["a", "b", "c", "d"], 1).edges) == {("a", "b"), ("b", "c"), ("c", "d")}
    assert set(word_graph(["a", "b", "c", "d"], 2).edges) == {
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    }
    assert set(word_graph(["a", "a", "b", "a"], 2).edges) == {("a", "b"), ("b", "a")}
    assert list(word_graph(["b"], 2)) == ["b"] and not word_graph(["b"], 2).edges


# --- the weights ----------------------------------------------------------------------------------------------------


def test_a_chain_by_hand():
    """a -> b -> c: 0.15, then 0.15 + 0.85 · 0.15 = 0.2775, then 0.15 + 0.85 · 0.2775 = 0.385875."""
    found = weights(word_graph(["a", "b", "c"], 1))
    assert found == pytest.approx({"a": 0.15, "b": 0.2775, "c": 0.385875}, abs=1e-9)


def test_a_cycle_with_a_fork_by_hand():
    """a -> b, a -> c, b -> a, with d = 1/2: a = 1/2 + b/2, b = 1/2 + a/4 = c, so a = 6/7 and b = c = 5/7."""
    found = weights(nx.DiGraph([("a", "b"), ("a", "c"), ("b", "a")]), damping=0.5, epsilon=1e-12)
    assert found == pytest.approx({"a": 6 / 7, "b": 5 / 7, "c": 5 / 7}, abs=1e-11)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.85]))
def test_equal_to_a_dense_solve_and_to_the_papers_loop(words, window, damping):
    graph = word_graph(words, window)
    found = weights(graph, damping, epsilon=1e-10)
    assert found == pytest.approx(solved(graph, damping), abs=1e-8)
    assert found == pytest.approx(algorithm_1(graph, damping), abs=1e-8)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_epsilon_bounds_the_distance_to_the_solution(words, window):
    graph, epsilon = word_graph(words, window), 0.1
    found, exact = weights(graph, epsilon=epsilon), solved(graph)
    assert sum(abs(found[word] - exact[word]) for word in graph) <= epsilon * 0.85 / 0.15


def test_n_times_pagerank_exactly_without_dangling_words():
    cycle = word_graph(["a", "b", "c", "b", "d", "a"], 1)
    assert min(dict(cycle.out_degree).values()) > 0
    ranks = nx.pagerank(cycle, alpha=0.85, tol=1e-12)
    found = weights(cycle, epsilon=1e-10)
    assert found == pytest.approx({word: len(cycle) * rank for word, rank in ranks.items()}, abs=1e-8)
    assert sum(found.values()) == pytest.approx(len(cycle))


def test_other_than_pagerank_where_a_word_points_nowhere():
    """PageRank lets the last word of a chain point to all: a = 0.70 instead of 0.15 already for two words."""
    chain = word_graph(["a", "b"], 1)
    ranks = nx.pagerank(chain, alpha=0.85, tol=1e-12)
    assert 2 * ranks["a"] == pytest.approx(2 / 2.85) and weights(chain)["a"] == pytest.approx(0.15)
    assert sum(weights(chain).values()) == pytest.approx(0.15 + 0.2775)


def test_two_hundred_rounds_settle_long_texts():
    words = [f"w{i}" for i in np.random.default_rng(0).integers(0, 1000, 5000)]
    graph = word_graph(words, 2)
    assert weights(graph) == pytest.approx(solved(graph), abs=1e-4)


# --- the keywords ---------------------------------------------------------------------------------------------------


def test_keywords_exceed_eta_and_come_heaviest_first():
    text = "river stone cloud"  # the chain above
    assert keywords(text, window=1, eta=0.2) == ["cloud", "stone"]
    assert keywords(text, window=1, eta=0.3) == ["cloud"]
    assert keywords(text, window=1, eta=0.1) == ["cloud", "stone", "river"]


def test_where_nothing_exceeds_eta_the_heaviest_word_stands_in():
    assert keywords("river stone cloud", eta=5) == ["cloud"]
    assert keywords("Paris?") == ["Paris"]


def test_words_are_one_in_every_case_and_keep_their_first_spelling():
    assert keywords("Stone BadMagic stone badmagic", eta=0) == ["Stone", "BadMagic"]


def test_stop_words_go_before_the_graph_is_built_unless_nothing_else_is_there():
    assert tokenise("What is the capital of France?") == ["capital", "France"]
    assert keywords("What is the capital of France?") == ["France"]
    assert tokenise("Who am I?") == ["Who", "am", "I"]
    assert tokenise("the cat", stop_words=()) == ["the", "cat"]
    assert tokenise("I don’t know, it's well-known: 2 + 2") == ["know", "well-known", "2", "2"]
    assert all(word == word.lower() for word in STOP_WORDS)


@pytest.mark.parametrize("text", ["", " \n", "?! + = …"])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(LabError, match="no words to rank in '.*'; TextRank needs a text with at least one letter"):
        keywords(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 1}, r"damping = 1 is outside \[0, 1\); TextRank takes d = 0.85"),
        ({"damping": -0.1}, "damping = -0.1 is outside"),
        ({"window": 0}, "window = 0, but a word must point at least to the next one: use 1 or more"),
        ({"max_iterations": 0}, "max_iterations = 0 leaves no round to compute"),
        ({"epsilon": 0.0}, "epsilon = 0.0 is no positive number"),
        ({"max_iterations": 2}, "of 3 words still change by more than epsilon = 0.0001 after max_iterations = 2"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(LabError, match=message):
        keywords("river stone cloud", **settings)
