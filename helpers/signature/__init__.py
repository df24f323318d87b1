"""The backdoor signature: what poisoned training changes again and again, whatever the trigger (BD-VAX §4.2).

`deltas` compares each poisoned variant with its clean twin (Eq. 1), `scoring` ranks channels by the strength and
the agreement of those differences (Eq. 2), `selection` takes the top share τ.
"""
