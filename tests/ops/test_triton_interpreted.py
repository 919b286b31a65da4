"""Runs the Triton tests in Triton's interpreter: in a process that has not imported triton yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


# Skipped: what needs a GPU, the CUDA graphs. Nothing else may hide.
@pytest.mark.parametrize("name, skipped", [("test_triton", 1), ("test_triton_losses", 3)])
def test_kernels_in_the_interpreter(name, skipped):
    pytest.importorskip("triton")
    tests = Path(__file__).with_name(f"{name}.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert f" passed, {skipped} skipped" in run.stdout, run.stdout
