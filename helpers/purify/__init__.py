"""Purifying a model that somebody was given: no attack is planted but the defender's own.

`suspect` says what was brought, `rows` deals the clean rows, `challenges` plants several kinds of backdoor on copies
and asks which share removes them, `steps` makes what a run keeps, and `report` tells what was done and what it proves.
"""
