"""Part B: whole iterations of a large model, flowkern and the plain loop on the same images; then
every algorithm's demo, on the device and on the CPU.
"""

from __future__ import annotations

from steps import IS_REHEARSAL, PYTHON, Steps


def run(steps: Steps) -> None:
    command = [PYTHON, "benchmarks/bench_large_model.py", "--json", steps.results / "e2e.json"]
    if IS_REHEARSAL:
        command += ["--device", "cpu", "--tiny", "--rollouts", "0", "--images", "2"]
    steps.run("e2e", 195, command)
    steps.run("train", 100, [PYTHON, "scripts/gpu/train.py"])
