"""Selection: exact counts, the highest first, ties by index."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from helpers.core.errors import LabError
from helpers.defenses.bdvax.select import select, select_heads

SCORES = {"a": torch.tensor([0.1, 0.9, 0.5, 0.7]), "b": torch.tensor([10.0, 30, 20, 40])}
VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


def chosen(masks):
    return {module: mask.nonzero().flatten().tolist() for module, mask in masks.items()}


def test_inside_each_matrix():
    assert chosen(select(SCORES, 0.5, "module")) == {"a": [1, 3], "b": [1, 3]}


def test_over_the_whole_model():
    assert chosen(select(SCORES, 0.5, "model")) == {"a": [], "b": [0, 1, 2, 3]}
    assert chosen(select(SCORES, 0.75, "model")) == {"a": [1, 3], "b": [0, 1, 2, 3]}


def test_ties_go_to_the_lower_index():
    scores = {"a": torch.ones(1000), "b": torch.ones(1000)}
    assert chosen(select(scores, 0.003, "module")) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert chosen(select(scores, 0.001, "model")) == {"a": [0, 1], "b": []}


@given(VALUES, VALUES, st.floats(0.01, 0.99), st.sampled_from(["module", "model"]))
@settings(max_examples=80, deadline=None)
def test_count_and_threshold(first, second, tau, scope):
    scores = {"a": torch.tensor(first), "b": torch.tensor(second)}
    masks = select(scores, tau, scope)
    groups = [["a"], ["b"]] if scope == "module" else [["a", "b"]]
    for group in groups:
        values, mask = (torch.cat([part[module] for module in group]) for part in (scores, masks))
        assert mask.sum() == round(tau * len(values))
        assert not mask.any() or mask.all() or values[mask].min() >= values[~mask].max()


@pytest.mark.parametrize("tau", [0, 1, -0.1, 35, float("nan")])
def test_tau_outside_0_and_1_is_refused(tau):
    with pytest.raises(LabError, match=rf"tau = {tau} is not a share of channels: expected 0 < tau < 1"):
        select(SCORES, tau, "module")


def test_an_unknown_scope_is_refused():
    with pytest.raises(LabError, match=r"scope = 'modul' is unknown; did you mean 'module'\?"):
        select(SCORES, 0.5, "modul")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_of_a_diverged_variant_are_refused(value):
    with pytest.raises(LabError, match="not finite: a variant's training diverged"):
        select({"a": torch.tensor([1.0, value])}, 0.5, "module")


def test_heads():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.3]])
    assert select_heads(scores, 3).tolist() == [[False, True, True], [True, False, False]]
    assert select_heads(scores, 1).tolist() == [[False, True, False], [False, False, False]]
    assert not select_heads(scores, 0).any()


def test_heads_of_each_layer():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.0, 0.0, 0.3]])
    assert select_heads(scores, 2, "layer").tolist() == [[False, True, True], [True, False, True]]
    with pytest.raises(LabError, match="cannot select 4 of 3 attention heads of a layer"):
        select_heads(scores, 4, "layer")
    with pytest.raises(LabError, match=r"heads_of = 'layers' is unknown; did you mean 'layer'\?"):
        select_heads(scores, 1, "layers")


@pytest.mark.parametrize("count", [-1, 7])
def test_an_impossible_number_of_heads_is_refused(count):
    with pytest.raises(LabError, match=f"cannot select {count} of 6 attention heads"):
        select_heads(torch.zeros(2, 3), count)
