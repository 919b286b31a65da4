"""A few launches, for a profiler: python scripts/gpu/launch.py [--device cuda]

Draw, replay and the policy loss forward, video latents in bfloat16, by every backend that serves.
What is compiled is compiled before the profiler looks (ncu --profile-from-start off).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import flowkern as fk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "ops"))
from calls import Problem

SIZE = 20_480 if os.environ.get("GPU_REHEARSE") == "1" else 2_096_640
VERBS = ("sde_step", "sde_log_prob", "policy_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    problems = [Problem(verb, 8, SIZE, torch.bfloat16, device=device) for verb in VERBS]
    for backend, reason in fk.backends(device).items():
        if backend == "reference" or reason is not None:
            continue
        for p in problems:
            p.run(backend, learn=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            p.run(backend, learn=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(f"{p.call}, {backend}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
