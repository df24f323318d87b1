"""What an attacker draws for himself."""

import random


def own_rng(seed: int) -> random.Random:
    """The attacker's own source of random choices, made from the run's seed."""
    return random.Random(f"{seed}/adaptive")


def own_seed(seed: int) -> int:
    """A seed of the attacker's own: no number that a defender counts up from the run's seed."""
    return own_rng(seed).getrandbits(31)
