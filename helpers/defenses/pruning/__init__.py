"""Pruning: what a few clean rows, or nothing at all, say can go.

`blocks` gives the matrices of a loaded model in one orientation, `activations` tells what enters them on clean rows,
`magnitude`, `wanda` and `last_layer` rank by what each of these says, and `packing` rounds instead of removing.
"""
