"""Random calls of every op, each held to what float32 arithmetic may make of its formula.

    python tests/fuzz [--calls 10000] [--seed 0] [--backend native] [--device cpu]
                      [--op sde_step] [--index 17] [--keep-going] [--no-check]

A call is right where every result lies within its bound (bounds.py) of the formula in
float64, the float64 reference of the package lies within a thousandth of it, what must have the
bits of the float32 reference has them, and a second run, on other threads, gives the same bits.
One call in eight gets one argument wrong and must answer with an error that names it. Of the steps
two in seven are drawn in place, one in seven has an output across what is read, to be refused.
Kinds of layouts and outputs are counted; one of which there is none is a failure. Outputs are NaN
before they are written. A disagreement, or a crash, ends with the line that repeats the call.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # where this folder is a package
from fuzz.run import again, run  # noqa: E402


def main() -> int:
    options = _arguments()
    context = multiprocessing.get_context("spawn")
    place = context.Value("q", -1)  # the call under way, known also after a crash
    process = context.Process(target=run, args=(options, place))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        print(
            f"\ncrashed, exit status {process.exitcode}\n{again(options, place.value)}", flush=True
        )
    return 1 if process.exitcode else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="this call alone, with its arguments shown")
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--no-check", action="store_true", help="only the calls, for sanitizers")
    parser.add_argument("--keep-going", action="store_true", help="past the first disagreement")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="native on the CPU, triton on CUDA by default")
    options = parser.parse_args()
    options.backend = options.backend or ("native" if options.device == "cpu" else "triton")
    return options


if __name__ == "__main__":
    sys.exit(main())
