"""Runs the Triton tests in Triton's interpreter: in a process that has not imported triton yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


# Skipped: what needs a GPU, the CUDA graphs; what rests on an fma that rounds once. Nothing else
# may hide.
@pytest.mark.parametrize("name, skipped", [("test_triton", 1), ("test_triton_losses", 3)])
def test_kernels_in_the_interpreter(name, skipped):
    pytest.importorskip("triton")
    from fused import REASON

    tests = Path(__file__).with_name(f"{name}.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    not_fused = sum(map(int, re.findall(rf"SKIPPED \[(\d+)\] \S+ {REASON}", run.stdout)))
    assert f" passed, {skipped + not_fused} skipped" in run.stdout, run.stdout
