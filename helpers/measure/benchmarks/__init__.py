"""Benchmarks: BD-VAX's ten sets by lm-evaluation-harness, which `make harness` installs.

`sets` knows the ten sets and where their data lies, `running` measures a model on them, `families` makes the small
model's task families tasks of the harness, and `language_model` is how the harness asks a model of the lab. The last
two import the harness, and so are imported by `running` alone, when it is there.
"""
