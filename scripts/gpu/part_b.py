"""Part B: whole iterations of a large model, flowkern and the plain loop on the same images, eager,
compiled and on a float8 base; then every algorithm's demo, on the device and on the CPU.
"""

from __future__ import annotations

from steps import IS_REHEARSAL, PYTHON, Steps


def run(steps: Steps) -> None:
    model = "tiny" if IS_REHEARSAL else "sd35m"
    command = [PYTHON, "benchmarks/train_step.py", "--model", model, "--algorithm", "flow_grpo"]
    contenders = "a,c,e" if IS_REHEARSAL else "a,c,d,e,b"  # d and b are parts of the three
    command += ["--contenders", contenders, "--json", steps.results / "e2e.json"]
    if IS_REHEARSAL:
        command += ["--device", "cpu", "--rollouts", "0", "--images", "2", "--steps", "4"]
    else:
        command += ["--rollouts", "1", "--limit", "195"]
    steps.run("e2e", 200, command)
    steps.run("train", 100, [PYTHON, "scripts/gpu/train.py"])
