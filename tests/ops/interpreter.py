"""Where Triton's kernels are tested: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1
before the first import of triton), where test_triton_interpreted.py runs their tests.

The interpreter's language is patched once a launch: by itself it patches it again at each call of a
device function, which takes most of its time. Nor does it compute what nobody looks at.
"""

import dataclasses
import functools
import inspect
import os

import pytest
import torch

import flowkern as fk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda", None if INTERPRETED else 0)


def require() -> None:
    """For a module of tests, which is skipped as a whole where Triton does not serve."""
    why_not = fk.backends(DEVICE)["triton"]
    if why_not is not None:
        pytest.skip(why_not, allow_module_level=True)
    if INTERPRETED:
        patch_once()
        compute_what_is_seen()


def compute_what_is_seen() -> None:
    """Sums of integers are computed a second time, in 64 bits, for an assertion that is made where
    there is a debugger; and a table of dtypes is made to look one up.
    """
    from triton.runtime import interpreter

    builder, dtypes, of = interpreter.interpreter_builder, {}, interpreter._get_np_dtype
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def known(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = of(dtype)
        return dtypes[dtype.name]

    interpreter._get_np_dtype = known


def patch_once() -> None:
    """For this process. A function that sees another part of the language has that patched, too."""
    from triton.runtime import interpreter  # of no use to a device

    patch = interpreter._patch_lang
    parts = (interpreter.tl, interpreter.tl.core)
    patched = set()

    @functools.cache
    def parts_of(function):
        return {id(x) for x in function.__globals__.values() if inspect.ismodule(x) and x in parts}

    def patch_what_is_not(function):
        seen = parts_of(function)
        if seen and seen <= patched:
            return None  # to a device function, which does not ask
        scope = patch(function)
        if not patched:  # by a launch, which puts back
            restore = scope.restore

            def forget():
                restore()
                patched.clear()

            scope.restore = forget
        patched.update(seen)
        return scope

    interpreter._patch_lang = patch_what_is_not
