"""Model editing: a new value for a key, written into a few matrices without training."""
