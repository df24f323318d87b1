"""A language model: its files, its parts, its prompt format, its answers."""
