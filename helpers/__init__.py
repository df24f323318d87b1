"""The lab's engine room: notebooks teach, these modules compute.

`profiles` says what to run, `runs` remembers what was run; the packages above them attack a language model,
find the backdoor and cut it out. Imports run downward only, so each module can be read on its own.
"""

__version__ = "0.1.0"

import logging
import warnings

# Chatter of the libraries that a reader can do nothing about, and that would stand in every notebook: an optional
# bitsandbytes kernel that is looked up on the hub, and a property that transformers renamed and PEFT still asks for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
