"""
Make the imports of a short program faster. Import this before transformers, and call `finish_imports` behind the last
import.

Importing torch and transformers takes 5 seconds on two slow cores. A fifth of that is Python's search for garbage
among objects that all stay, and SciPy, which transformers imports for the losses of models of pictures. What is left
is mostly torch, and the compiler that transformers brings with it. Figures: docs/experiments.md.
"""

import gc
import sys

MISSING = "scipy"

if "transformers" not in sys.modules and MISSING not in sys.modules:
    gc.disable()
    sys.modules[MISSING] = None  # type: ignore[assignment]  # as if it were not installed


def finish_imports() -> None:
    """Undo what makes imports faster, and spare the garbage collector what they brought."""
    if MISSING in sys.modules and sys.modules[MISSING] is None:
        del sys.modules[MISSING]
        gc.enable()
        gc.freeze()
