"""Attackers who know the defenses, one for each paper, and plant the backdoor so that it should survive.

They know a method and all its numbers, but not what a defender draws for himself: keys, payloads, rows and seeds. So
each plays the defender with his own.
"""
