"""The lab's engine room: notebooks teach, these modules compute.

`profiles` says what to run, `runs` remembers what was run; the packages above them attack a language model,
find the backdoor and cut it out. Imports run downward only, so each module can be read on its own.
"""

__version__ = "0.1.0"
