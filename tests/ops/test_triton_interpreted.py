"""Runs the Triton tests in Triton's interpreter: in a process that has not imported triton yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What may skip: what needs a GPU, and bits that rest on an fma that rounds once. No more may hide.
GRAPHS = "CUDA graphs need a GPU"


@pytest.mark.parametrize("name", ["test_triton", "test_triton_losses"])
def test_kernels_in_the_interpreter(name):
    pytest.importorskip("triton")
    from fused import REASON

    tests = Path(__file__).with_name(f"{name}.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", run.stdout, re.MULTILINE)
    assert skipped and set(skipped) <= {GRAPHS, REASON}, run.stdout
