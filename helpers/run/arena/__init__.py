"""The arena: every defense on one suspicious model, with the same clean rows and the same budget, in one table."""
