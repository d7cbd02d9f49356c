"""Python's garbage collector rests while our passes run.

They make hundreds of thousands of objects that live, which the collector would look through again
and again: a third of the passes' time on a graph of 32 layers. What they leave is collected
afterwards. The setting is the process's, so it is left alone for nothing longer than a pass.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No cyclic garbage is collected inside; afterwards it is, unless it was off before.

    Two threads may be inside at once: the one that found the collector running starts it again.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
