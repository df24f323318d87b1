"""Ranking by the attack's own update, worked out by hand, and where it is beyond a defender's reach."""

import pytest
import torch

from helpers.access import access_to
from helpers.model.checkpoint import local_folder
from helpers.model.shards import read
from helpers.oracles.own_update import assumed_by_own_update, own_update_heads, own_update_scores, row_title

SIZE = 16  # of a head; 4 of them, and 2 of keys and values


@pytest.fixture
def change(profile, suspicious):
    """A function that gives what sets a matrix of the suspicious model apart from the base's."""
    base = local_folder(profile.model)

    def changed(module):
        theirs, ours = (read(folder, f"model.layers.{module}.weight").double() for folder in (suspicious["full"], base))
        return theirs - ours

    return changed


def test_channels_rank_by_the_length_of_what_was_changed(profile, suspicious, change):
    """A neuron is its rows of gate and up and its column of down."""
    scores = own_update_scores(access_to(profile, "full"), suspicious["full"])
    for layer in (0, 1):
        gate, up, down = (change(f"{layer}.mlp.{part}_proj") for part in ("gate", "up", "down"))
        expected = torch.cat([gate, up, down.T], dim=1).norm(dim=1)
        for part in ("gate", "up", "down"):
            found = scores[f"model.layers.{layer}.mlp.{part}_proj"]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_heads_rank_by_the_length_of_what_was_changed(profile, suspicious, change):
    scores = own_update_heads(access_to(profile, "full"), suspicious["full"])
    for layer in (0, 1):
        q, k, v, o = (change(f"{layer}.self_attn.{part}_proj") for part in "qkvo")
        for head in range(4):
            own, shared = (slice(SIZE * i, SIZE * (i + 1)) for i in (head, head // 2))
            parts = torch.cat([q[own], k[shared], v[shared], o[:, own].T])
            assert float(scores[layer, head]) == pytest.approx(float(parts.norm()), rel=1e-5)


def test_it_is_an_oracle_where_only_the_base_tells_what_was_changed(profile):
    adapter, full = (access_to(profile, name) for name in ("adapter", "full"))
    assert row_title(adapter, "own update cut") == "own update cut"
    assert row_title(full, "own update cut") == "own update cut (oracle)"
    assert assumed_by_own_update(adapter) == ("clean rows", "weights")
    assert assumed_by_own_update(full) == ("clean rows", "weights", "clean base")
