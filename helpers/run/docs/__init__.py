"""`docs/`: the pages and parts of pages that a command writes from code and data."""
