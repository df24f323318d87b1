"""The registry of stages as a Mermaid flowchart, which GitHub draws."""

import re
from collections.abc import Iterator

import networkx as nx

from helpers.core.stages import STAGES

Arrow = tuple[str, str]  # from a stage to one that is made from it


def stage_graph() -> str:
    """Every stage in its notebook's box, with an arrow from what it is made from.

    Left out are the reports of models (`evaluate/…`), each of which follows its model, and arrows that follow from
    others. Stages that share notebook and origin, and from which nothing is made, stand in one node. A dotted arrow
    counts only where TAU=auto.
    """
    drawn = _drawn()
    always = [(parent, name) for name in drawn for parent in STAGES[name].parents]
    tested = [(parent, name) for name in drawn for parent in STAGES[name].tested]
    lines = ["flowchart LR", *_boxes(drawn)]
    lines += [f"    {_id(parent)} --> {_id(name)}" for parent, name in _needed(always, always)]
    lines += [f"    {_id(parent)} -.-> {_id(name)}" for parent, name in _needed(tested, always + tested)]
    return "\n".join(["```mermaid", *lines, "```"])


def _needed(arrows: list[Arrow], among: list[Arrow]) -> list[Arrow]:
    """Those arrows that do not follow from the others among which they stand."""
    kept = nx.transitive_reduction(nx.DiGraph(among)).edges
    return [arrow for arrow in arrows if arrow in kept]


def _drawn() -> dict[str, list[str]]:
    """The names in each node, by the first of them, in the order of the registry."""
    origins = {name for entry in STAGES.values() for name in (*entry.parents, *entry.tested)}
    nodes: dict[tuple[object, ...], list[str]] = {}
    for name, entry in STAGES.items():
        if name.startswith("evaluate/") and entry.parents:
            continue
        alone = name if name in origins else ""
        nodes.setdefault((entry.notebook, entry.parents, entry.tested, alone), []).append(name)
    return {names[0]: names for names in nodes.values()}


def _boxes(drawn: dict[str, list[str]]) -> Iterator[str]:
    """A box for each notebook, with its nodes."""
    for notebook in dict.fromkeys(STAGES[name].notebook for name in drawn):
        yield f'    subgraph nb{notebook[:2]}["{notebook.replace("_", " ")}"]'
        for name, names in drawn.items():
            if STAGES[name].notebook == notebook:
                yield f'        {_id(name)}["{"<br>".join(names)}"]'
        yield "    end"


def _id(name: str) -> str:
    """A name that Mermaid takes for a node."""
    return re.sub(r"\W", "_", name)
