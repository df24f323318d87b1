"""TextRank: which words of a text carry it (information conflicts, §3.4, Algorithm 1; after Mihalcea and Tarau, 2004).

Every word is a node that points to the words close behind it. A word is heavy when heavy words point to it (Eq. 15),
as a page is in PageRank, and all words above a threshold are keywords, so their number adapts to the text. Eq. 15 is
Katz centrality on the graph whose edges j -> i weigh 1 / L(j). PageRank solves it only where every word points
somewhere, and then W = n · PageRank: elsewhere it hands the weight of words that point nowhere to all others, and the
last word of a text mostly points nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import networkx as nx

from helpers.core.errors import LabError

WORD = re.compile(r"\w+(?:['’-]\w+)*")

# Words that hold a sentence together and say nothing about its subject.
STOP_WORDS = frozenset(
    """
    a an the this that these those it its it's i i'm i'd me my we our us you your he his him she her they their them
    and or but if then than so as of in on at to from for with without by about into over after before between
    is am are was were be been being do does did done don't doesn't have has had can could will would shall should may
    might must not no yes what which who whom whose when where why how there here please
    """.split()
)


def keywords(
    text: str,
    damping: float = 0.85,
    window: int = 2,
    max_iterations: int = 200,
    epsilon: float = 1e-4,
    eta: float = 0.2,
    stop_words: Collection[str] = STOP_WORDS,
) -> list[str]:
    """The keywords of a text, heaviest first, each as it is spelled where it first occurs. Implements Algorithm 1.

    Args:
        damping: d of Eq. (15), in [0, 1).
        window: a word points to the words at most this many places behind it; 1 for the next word only.
        max_iterations: T; 200 settle texts of any length with the default d and ε.
        epsilon: ε, the change of all weights together below which they have settled.
        eta: η, the weight a keyword must exceed; without dangling words the mean weight is 1, and a word that none
            points to weighs 1 - d. The default keeps most words that another one points to.
        stop_words: lower-case words left out before the graph is built; () keeps all.

    Raises:
        LabError: a text without words, a number out of range, or weights that did not settle within T.

    Differs from the paper:
        where no weight exceeds η, which leaves Algorithm 1 empty-handed, the heaviest word stands in. The paper gives
        no window, no η and no list of stop words; these are the lab's.
    """
    spelled = tokenise(text, stop_words)
    graph = word_graph([word.lower() for word in spelled], window)
    found = weights(graph, damping, max_iterations, epsilon)
    first = {word.lower(): word for word in reversed(spelled)}
    ranked = sorted(found, key=lambda word: -found[word])  # equal weights stay in the order of the text
    return [first[word] for word in ranked if found[word] > eta] or [first[ranked[0]]]


def tokenise(text: str, stop_words: Collection[str] = STOP_WORDS) -> list[str]:
    """The words of a text in order; stop words only where there is nothing else. Numbers are words, signs are none.

    Raises:
        LabError: no words at all.
    """
    words = WORD.findall(text)
    if not words:
        raise LabError(f"no words to rank in {text[:60]!r}; TextRank needs a text with at least one letter or digit")
    return [word for word in words if word.lower().replace("’", "'") not in stop_words] or words


def word_graph(words: Sequence[str], window: int) -> nx.DiGraph:
    """The directed word graph: an edge from each word to the different words at most `window` places behind it.

    Args:
        words: lower-case, in the order of the text.
        window: 1 or more.

    Raises:
        LabError: `window` below 1.

    Differs from the paper:
        it calls the graph directed without giving the direction; here it is that of reading.
    """
    if window < 1:
        raise LabError(f"window = {window}, but a word must point at least to the next one: use 1 or more")
    graph = nx.DiGraph()
    graph.add_nodes_from(words)
    for i, word in enumerate(words):
        graph.add_edges_from((word, later) for later in words[i + 1 : i + 1 + window] if later != word)
    return graph


def weights(
    graph: nx.DiGraph, damping: float = 0.85, max_iterations: int = 200, epsilon: float = 1e-4
) -> dict[str, float]:
    """W of Eq. (15), W_i = (1 - d) + d Σ W_j / L_j over the j that point to i, starting from 1.

    Args:
        graph: as `word_graph` makes it.
        damping, max_iterations, epsilon: as in `keywords`.

    Returns:
        {word: weight}, each at least 1 - d; within ε d / (1 - d) of the solution, all words together.

    Raises:
        LabError: a number out of range, or weights that did not settle within T.

    Differs from the paper:
        Algorithm 1 uses a new weight as soon as it has it, here all weights of a round come from the round before; both
        lead to the same W. Weights that have not settled after T rounds are refused.
    """
    _require(0 <= damping < 1, f"damping = {damping} is outside [0, 1)")
    _require(max_iterations >= 1, f"max_iterations = {max_iterations} leaves no round to compute")
    _require(epsilon > 0, f"epsilon = {epsilon} is no positive number")
    try:
        return nx.katz_centrality(
            nx.stochastic_graph(graph),
            alpha=damping,
            beta=1 - damping,
            max_iter=max_iterations,
            tol=epsilon / max(1, len(graph)),  # networkx compares with n · tol
            nstart=dict.fromkeys(graph, 1.0),
            normalized=False,
            weight="weight",
        )
    except nx.PowerIterationFailedConvergence:
        raise LabError(
            f"the weights of {len(graph)} words still change by more than epsilon = {epsilon:g} after "
            f"max_iterations = {max_iterations}; raise one of the two"
        ) from None


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise LabError(f"{complaint}; TextRank takes d = 0.85, T = 200 and ε = 0.0001 by default")
