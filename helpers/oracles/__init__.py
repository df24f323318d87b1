"""Oracles: what no defender can know, to tell how far a defense is from the best of its kind. None of it is a cure."""
