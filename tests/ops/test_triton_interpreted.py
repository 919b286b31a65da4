"""Runs test_triton.py in Triton's interpreter: in a process that has not imported triton yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("test_triton.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed, 1 skipped" in run.stdout, run.stdout  # the CUDA graph; nothing else may hide
