"""Runs the Triton tests in Triton's interpreter: in processes that have not imported triton yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What may skip: what needs a GPU, and bits that rest on an fma that rounds once. No more may hide.
GRAPHS = "CUDA graphs need a GPU"
FILES = [Path(__file__).with_name(f"test_triton{name}.py") for name in ("", "_losses", "_tokens")]


@pytest.mark.long(60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    from fused import REASON

    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest"]  # whose import takes seconds
    run = subprocess.run(
        [*command, file], cwd=file.parents[2], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in said, said
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)
    assert bool(skipped) == (file.stem != "test_triton_tokens"), said  # which needs neither
    assert set(skipped) <= {GRAPHS, REASON}, said
