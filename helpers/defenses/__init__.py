"""Defenses: what can be done with a suspicious model and a few clean rows."""
