"""How many tokens a pass may hold: what a card tells of itself decides, and on a CPU nothing is measured."""

import contextlib

import pytest
import torch

from helpers.train.room import MOST, ON_CPU, tokens_that_fit


def no_pass():
    raise AssertionError("on a CPU nothing is measured")


def test_on_a_cpu_nothing_is_measured():
    assert tokens_that_fit(no_pass, 10, torch.device("cpu")) == ON_CPU


class Card:
    """What `torch.cuda` tells of a card with 1,000 bytes, of which others hold 100."""

    def __init__(self, allowed=1.0):
        self.allowed, self.held, self.peak, self.gradients = allowed, 200, 0, False
        self.empty_cache = lambda: None

    def run(self):
        """A pass that takes 60 bytes at its peak, and 40 for good the first time."""
        self.held += 0 if self.gradients else 40
        self.gradients = True
        self.peak = max(self.peak, self.held + 60)

    def reset_peak_memory_stats(self, device):
        self.peak = self.held

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak

    def memory_reserved(self, device):
        return self.held + 10

    def mem_get_info(self, device):
        return 1000 - 100 - self.memory_reserved(device), 1000

    def get_per_process_memory_fraction(self, device):
        return self.allowed


@pytest.mark.parametrize(
    ("allowed", "tokens"),
    [
        (1.0, 30 * int(0.8 * (1000 - 100 - 240)) // 60),  # what is free beside the base, the gradients and others
        (0.5, 30 * int(0.8 * (500 - 240)) // 60),
        (0.25, 30),  # there is no room, and fewer than a row of each job cannot be
    ],
)
def test_on_a_card_the_free_memory_decides(monkeypatch, allowed, tokens):
    card = Card(allowed)
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    assert tokens_that_fit(card.run, 30, torch.device("cuda", 0)) == pytest.approx(tokens, abs=1)


def test_a_large_card_is_not_filled_for_nothing(monkeypatch):
    card = Card()
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    assert tokens_that_fit(card.run, 3000, torch.device("cuda", 0)) == MOST
    assert tokens_that_fit(card.run, 2 * MOST, torch.device("cuda", 0)) == 2 * MOST
