"""Runs the Triton tests in Triton's interpreter: in processes that have not imported triton yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What may skip: what needs a GPU, and bits that rest on an fma that rounds once. No more may hide.
GPU = {"CUDA graphs need a GPU", "where samples are long tiles are a GPU's"}
# Two processes for two cores, as each imports torch.
FILES = [["test_triton.py", "test_triton_tokens.py"], ["test_triton_losses.py"]]


@pytest.mark.long(30)
@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_kernels_in_the_interpreter(files):
    pytest.importorskip("triton")
    from fused import REASON

    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest"]  # whose import takes seconds
    command += [Path(__file__).with_name(file) for file in files]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in said, said
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)
    assert skipped and set(skipped) <= {*GPU, REASON}, said
