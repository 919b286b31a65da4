"""What flowkern buys on this machine, against eager PyTorch and torch.compile.

    python benchmarks/speed.py [--device cpu|cuda] [--quick] [--json PATH]
        [--kernels] [--module NAME] [--no-compile] [--only WORDS] [--leave-out OP:BACKEND,...]
        [--seconds S]

Kernels, and whole training steps; with `--module bench_compat` the drop-ins alone. Every timing is
gated on correctness, contenders take turns, and nothing in the table is typed by hand. Writes a
JSON file after each case, into the folder that FLOWKERN_RESULTS names or benchmarks/results, and at
the end a PNG chart beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from harness import describe_machine, measure_bandwidths, results_folder, run_case

SECTIONS = {
    "Kernels": ("bench_sde_step", "bench_guidance", "bench_policy_loss", "bench_matching_loss"),
    "One training step": ("bench_rollout",),
    "One training step as released, a tiny Stable Diffusion 3.5": ("bench_train_step",),
    "Drop-ins": ("bench_compat",),
}
ON_REQUEST = ("bench_compat",)  # by --module alone, into a file of its own


def main() -> int:
    options = _arguments()
    device = torch.device(options.device)
    begin = time.perf_counter()
    machine = describe_machine(device)
    seconds = options.seconds or (0.3 if device.type == "cuda" else 0.8 if options.quick else 3.0)
    bandwidths = measure_bandwidths(device, seconds)
    _print_head(machine, bandwidths)
    result = {
        "machine": machine,
        "command": " ".join(sys.argv),
        "bandwidth_gb_per_s": bandwidths,
        "rows": [],
    }
    name = options.module.removeprefix("bench_") if options.module in ON_REQUEST else "speed"
    path = options.json or _default_path(name, device, machine, options.quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_good, names = True, []
    for section, modules in SECTIONS.items():
        if options.kernels and section != "Kernels":
            continue
        default = [m for m in modules if m not in ON_REQUEST]
        asked = [m for m in modules if m == options.module] if options.module else default
        if asked:
            _print_section(section)
        for module in asked:
            found = importlib.import_module(module).cases(device, options.quick)
            if not found:
                print(f"skipped: {module} needs the trainer's libraries (pip install '.[train]')")
            for case in found:
                names.append(case.name)
                if options.only not in case.name:
                    continue
                _leave_out(case, options)
                measured = run_case(case, device, seconds, bandwidths)
                _print_case(case, measured)
                result["rows"] += measured
                result["seconds"] = time.perf_counter() - begin
                path.write_text(json.dumps(result, indent=1) + "\n")  # what is cut short counts
                is_good &= not any(
                    "failed" in r and r["backend"].startswith("flowkern") for r in measured
                )
    if not result["rows"]:
        known = "; ".join(dict.fromkeys(names)) or "none"
        print(f"--only: no case has {options.only!r} in its name, of {known}", file=sys.stderr)
        return 2
    print(f"\n{time.perf_counter() - begin:.0f} s; wrote {path}{_chart(result, path)}")
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
    parser.add_argument("--kernels", action="store_true", help="no training step")
    parser.add_argument(
        "--module", choices=[m for modules in SECTIONS.values() for m in modules],
        help="the cases of this file alone",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument(
        "--leave-out", type=lambda text: set(filter(None, text.split(","))), default=set(),
        metavar="OP:BACKEND,...", help="kernels that are not to be called, such as noise:triton",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of timing per case")
    return parser.parse_args()


def _leave_out(case, options: argparse.Namespace) -> None:
    """Drop the contenders that are not wanted; where a kernel is left out, so is the own choice."""
    out = {f"flowkern, {name}" for op, name in map(_pair, options.leave_out) if op == case.op}
    names = out | ({"flowkern"} if out else set())

    def is_wanted(name: str) -> bool:
        return name not in names and not (options.no_compile and "torch.compile" in name)

    case.contenders = [c for c in case.contenders if is_wanted(c.name)]


def _pair(text: str) -> tuple[str, str]:
    op, _, backend = text.partition(":")
    return op, backend


def _default_path(name: str, device: torch.device, machine: dict, quick: bool) -> Path:
    return results_folder(device, machine) / f"{name}{'-quick' if quick else ''}.json"


def _chart(result: dict, path: Path) -> str:
    if not any("flowkern_is_faster_by" in row for row in result["rows"]):
        return " (no chart: no rival)"
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
    print("  bandwidth, GB/s: " + ", ".join(f"{n} {value:.1f}" for n, value in bandwidths.items()))


def _print_section(title: str) -> None:
    print(
        f"\n{title}\n{'':36}{'p20':>9} {'p50':>9} {'p80':>9}  ms {'GB/s':>8} {'of peak':>8}"
        "  flowkern is faster by"
    )


def _print_case(case, rows: list[dict]) -> None:
    dtype = "" if case.dtype == "float32" else f", {case.dtype}"
    print(f"{case.name}{dtype}  {' x '.join(map(str, case.shape))}")
    for row in rows:
        if "failed" in row or "ms_p50" not in row:
            why = row.get("failed") or row.get("not_captured", "")
            print(f"  {row['backend']:34}{why}{_host_time(row)}")
            continue
        times = " ".join(f"{row[p]:9.3f}" for p in ("ms_p20", "ms_p50", "ms_p80"))
        moved = (
            f"{row['gb_per_s']:8.1f} {row['of_bandwidth']:8.0%}" if "gb_per_s" in row else " " * 17
        )
        factor = f"{row['flowkern_is_faster_by']:6.1f} x" if "flowkern_is_faster_by" in row else ""
        print(
            f"  {row['backend']:34}{times}     {moved}  {factor}{_host_time(row)}".rstrip(),
            flush=True,
        )


def _host_time(row: dict) -> str:
    return f"  host {1e3 * row['host_ms_p50']:.1f} us" if "host_ms_p50" in row else ""


if __name__ == "__main__":
    sys.exit(main())
