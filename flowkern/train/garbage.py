"""What Python looks through for garbage while a run goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def found_soon() -> Iterator[None]:
    """Objects that are there already (libraries and networks, half a million) count as here to
    stay, and are not looked through again until the block is left.

    Python looks through all it knows once a quarter of it is new. Pictures of a validation are
    cycles that nothing else frees: without this, some 70 MB of them lie about at a time, between
    which memory is cut into pieces that do not go back.
    """
    if gc.get_freeze_count():  # someone around this has done so, and undoes it
        yield
        return
    gc.collect()
    gc.freeze()
    gc.collect()  # counts what is old anew: nothing
    try:
        yield
    finally:
        gc.unfreeze()
