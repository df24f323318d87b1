"""Purification: cut the signature out of the suspicious model, then heal what the cut hurt (BD-VAX §4.3).

`suppress` zeroes or re-initialises channels and heads; a light fine-tuning on clean rows restores fluency; `challenge`
asks, with a backdoor of the defender's own, how much must go.
"""
