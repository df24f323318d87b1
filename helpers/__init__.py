"""The lab's engine room: notebooks teach, these modules compute.

Rooms, from the ground up: `core` says what to run and remembers what was run, `data` holds rows, `model` a language
model, `access` what may be edited of it, `train` trains and `measure` measures; `attacks` and `defenses` stand beside
each other and never meet but in `adaptive`; `run` drives them all. Imports run downward only.
"""

__version__ = "0.1.0"

import logging
import warnings

# Chatter of the libraries that a reader can do nothing about, and that would stand in every notebook: an optional
# bitsandbytes kernel that is looked up on the hub, and a property that transformers renamed and PEFT still asks for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
