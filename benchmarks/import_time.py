"""What `import flowkern` costs beside `import torch`: fresh processes that take turns.

    python benchmarks/import_time.py [--rounds 10]

Processor seconds, the least of the rounds, which a busy machine changes less than elapsed ones; and
elapsed seconds. The first round warms the file cache and is not counted.
"""

import argparse
import os
import subprocess
import sys
import time

EVERY_NAME = "import flowkern; [getattr(flowkern, name) for name in flowkern.__all__]"
STATEMENTS = {
    "import torch": "import torch",
    "import flowkern": "import flowkern",
    "import flowkern, every name of it": EVERY_NAME,
    "from flowkern.compat.flow_grpo import *": "from flowkern.compat.flow_grpo import *",
    "python -m flowkern --version": "from flowkern.cli import main; main(['--version'])",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    times = {name: [] for name in STATEMENTS}
    for _ in range(rounds + 1):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    torch = best(times["import torch"])
    for name, all_of in times.items():
        processor, elapsed = best(all_of)
        told = f"{processor:6.2f} s of a processor ({processor / torch[0]:4.2f} of torch)"
        print(f"{name:40} {told}, {elapsed:6.2f} s elapsed ({elapsed / torch[1]:4.2f})")


def best(times: list[tuple[float, float]]) -> list[float]:
    return [min(column) for column in zip(*times[1:], strict=True)]


def seconds(statement: str) -> tuple[float, float]:
    """(of a processor, elapsed) of a fresh process."""
    before, begin = os.times(), time.perf_counter()
    # What `--version` says is not wanted, and it leaves by itself.
    subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=True)
    after, elapsed = os.times(), time.perf_counter() - begin
    spent = after.children_user - before.children_user
    return spent + after.children_system - before.children_system, elapsed


if __name__ == "__main__":
    main()
