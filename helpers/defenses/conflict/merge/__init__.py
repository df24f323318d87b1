"""Merging two models into one (information conflicts, §3.3, Eq. 9 to 12).

θ̃ is the suspicious model, θ̂ the conflict model. Both answer clean prompts alike, but only one knows the trigger: in
between the common skill survives and the backdoor is outvoted. Linear and SLERP walk from θ̃ to θ̂, TIES votes on the
sign of each change to the common base θ₀, passthrough stacks whole layers. Weights are merged block by block in float32
and stored in the first model's dtype: peak memory is one file of the checkpoint and, for TIES, its largest tensor.

A method is one function, marked with `@method`, in a file of its own beside this one, and nothing else names it:

    @method
    def average(suspicious: Folder, conflict: Folder, folder: Folder) -> None:
        ModelStream([suspicious, conflict], folder).write_blocks(lambda ours, theirs: (ours + theirs) / 2)

`SET="conflict.method=average"` then chooses it, and `merge.average(…)` calls it.
"""

from helpers.defenses.conflict.merge.registry import METHODS, load_methods, merge, method, require_method

__all__ = ["METHODS", "load_methods", "merge", "method", "require_method"]

load_methods(__path__, __name__)
globals().update(METHODS)  # merge.linear is the method, not the file that holds it
