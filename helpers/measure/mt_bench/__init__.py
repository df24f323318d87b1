"""MT-Bench (Zheng et al., 2023): two turns, and a judge that marks answers or prefers one of two.

`questions` reads questions in MT-Bench's own format and asks them, `judges` are a language model behind an endpoint and
a rule, `grading` makes marks and preferences a score.
"""
