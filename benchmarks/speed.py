"""What flowkern buys on this machine, against eager PyTorch and torch.compile.

    python benchmarks/speed.py [--device cpu|cuda] [--quick] [--json PATH]

Kernels, and one whole training step. Every timing is gated on correctness, contenders take turns,
and nothing in the table is typed by hand. Writes a JSON file and, beside it, a PNG chart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from harness import ROOT, describe_machine, device_slug, measure_bandwidths, run_case

SECTIONS = {
    "Kernels": ("bench_sde_step", "bench_policy_loss", "bench_matching_loss"),
    "One training step": ("bench_rollout",),
}


def main() -> int:
    options = _arguments()
    device = torch.device(options.device)
    begin = time.perf_counter()
    machine = describe_machine(device)
    seconds = 0.8 if options.quick else 1.0 if device.type == "cuda" else 3.0
    bandwidths = measure_bandwidths(device, seconds)
    _print_head(machine, bandwidths)
    result = {
        "machine": machine,
        "command": " ".join(sys.argv),
        "bandwidth_gb_per_s": bandwidths,
        "rows": [],
    }
    path = options.json or _default_path(device, machine, options.quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_good = True
    for section, modules in SECTIONS.items():
        _print_section(section)
        for module in modules:
            found = importlib.import_module(module).cases(device, options.quick)
            if not found:
                print(f"skipped: {module} needs the trainer's libraries (pip install '.[train]')")
            for case in found:
                measured = run_case(case, device, seconds, bandwidths)
                _print_case(case, measured)
                result["rows"] += measured
                result["seconds"] = time.perf_counter() - begin
                path.write_text(json.dumps(result, indent=1) + "\n")  # what is cut short counts
                is_good &= not any(
                    "failed" in r and r["backend"].startswith("flowkern") for r in measured
                )
    print(f"\n{result['seconds']:.0f} s; wrote {path}{_chart(result, path)}")
    if not is_good:
        print("a flowkern row failed its check: no speed counts", file=sys.stderr)
    return 0 if is_good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases, shorter timings: a smoke test"
    )
    parser.add_argument("--json", type=Path, help="where the results go; the chart goes beside")
    return parser.parse_args()


def _default_path(device: torch.device, machine: dict, quick: bool) -> Path:
    return (
        ROOT
        / "benchmarks"
        / "results"
        / device_slug(device, machine)
        / f"speed{'-quick' if quick else ''}.json"
    )


def _chart(result: dict, path: Path) -> str:
    try:
        from plot import plot

        plot(result, path.with_suffix(".png"))
    except ImportError as error:
        return f" (no chart: {error})"
    return f" and {path.with_suffix('.png').name}"


# ---- the table ----


def _print_head(machine: dict, bandwidths: dict[str, float]) -> None:
    where = (
        machine.get("gpu")
        or f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"
    )
    print(
        f"flowkern {machine['flowkern']} at {machine['commit']}"
        f"{' (modified)' if machine['dirty'] else ''} on {where}"
    )
    print(
        f"python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{machine['utc']} UTC"
    )
    for name, reason in machine["backends"].items():
        print(f"  backend {name}: {'ready' if reason is None else reason}")
    print(f"  bandwidth: copy {bandwidths['copy']:.1f} GB/s, read {bandwidths['read']:.1f} GB/s")


def _print_section(title: str) -> None:
    print(
        f"\n{title}\n{'':36}{'p20':>9} {'p50':>9} {'p80':>9}  ms {'GB/s':>8} {'of peak':>8}"
        "  flowkern is faster by"
    )


def _print_case(case, rows: list[dict]) -> None:
    dtype = "" if case.dtype == "float32" else f", {case.dtype}"
    print(f"{case.name}{dtype}  {' x '.join(map(str, case.shape))}")
    for row in rows:
        if "failed" in row:
            print(f"  {row['backend']:34}{row['failed']}")
            continue
        times = " ".join(f"{row[p]:9.3f}" for p in ("ms_p20", "ms_p50", "ms_p80"))
        moved = (
            f"{row['gb_per_s']:8.1f} {row['of_bandwidth']:8.0%}" if "gb_per_s" in row else " " * 17
        )
        factor = f"{row['flowkern_is_faster_by']:6.1f} x" if "flowkern_is_faster_by" in row else ""
        print(f"  {row['backend']:34}{times}     {moved}  {factor}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
