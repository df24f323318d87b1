"""`docs/results.md`: everything that was recorded, as one page that a command writes from the data."""
