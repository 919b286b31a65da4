"""What a test needs of the machine, with the reason that a skipped one gives."""

import pytest

import flowkern as fk

needs_native = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)
