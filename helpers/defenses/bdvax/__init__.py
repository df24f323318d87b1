"""BD-VAX (§4): what poisoned training changes again and again, whatever the trigger, is found and suppressed.

`vaccines` trains the pairs, `score` ranks channels by the strength and the agreement of their differences (Eqs. 1 and
2), `select` takes the top share τ, `access` zeroes or reinitializes it (`Access.suppress`), `recover` fine-tunes on
clean rows, and `challenge` asks, with a backdoor of the defender's own, how much must go.
"""
