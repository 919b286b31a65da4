"""The calls of a seed, one after the other, and the count of what they covered."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections import Counter

import torch

from flowkern.ops._common import native

from .checks import OPS, Disagreement, one_call, serving
from .inputs import KINDS_OF_MATCHING, LAYOUTS, OUTPUTS
from .tokens import KINDS, KINDS_OF_A_LOSS, TOKENS

ENOUGH = 500  # calls, for every kind of layout and output to come up


def run(options, place) -> None:
    faulthandler.enable()
    # Unwritten memory is NaN in this mode; warn_only as nothing here is nondeterministic by it.
    torch.use_deterministic_algorithms(not options.no_check, warn_only=True)
    ops = [op for op in OPS if options.op in (None, op.name)]
    backends = serving(ops, options.backend, options.device)
    if native.cpu() is not None:
        print(f"native kernels: {native.cpu().__file__}")
    for name, (backend, reason) in backends.items():
        print(f"{name}: {backend}{f', as {reason}' if reason else ''}", flush=True)
    begin, counts, drawn, disagreements = time.perf_counter(), Counter(), Counter(), 0
    indices = range(options.calls) if options.index is None else [options.index]
    for index in _progress(indices):
        place.value = index
        try:
            kind = one_call(
                ops, backends, f"{options.seed}:{index}", options.device, options, drawn
            )
        except Disagreement as found:
            print(f"\n{found}\n{again(options, index)}", flush=True)
            if not options.keep_going:
                sys.exit(1)
            kind, disagreements = "disagreement", disagreements + 1
        counts[kind] += 1
    seconds = time.perf_counter() - begin
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(", ".join(f"{name} {count}" for name, count in sorted(drawn.items())))
    print(f"{counts.total()} calls, {disagreements} disagreements, {seconds:.0f} s")
    missing = [name for name in kinds(ops) if not drawn[name]]
    if missing and counts.total() >= ENOUGH:
        print(f"never drawn: {', '.join(missing)}")
    sys.exit(1 if disagreements or (missing and counts.total() >= ENOUGH) else 0)


def again(options, index: int) -> str:
    arguments = f"--seed {options.seed} --backend {options.backend} --device {options.device}"
    arguments += f" --op {options.op}" if options.op else ""
    return f"again: python tests/fuzz {arguments} --index {index}"


def kinds(ops) -> list[str]:
    """What enough calls must have drawn."""
    names = [f"layout {name}" for name in LAYOUTS]
    if {"sde_step", "ode_step"} & {op.name for op in ops}:
        names += [f"output {name}" for name in OUTPUTS if name != "in place"]
        names += [f"output in place, {name}" for name in ("x_t", "velocity")]
    if "sde_step" in {op.name for op in ops}:
        names += ["output in place, noise", "rounded", "rounded to what it is stored in"]
        names.append("gradient of nothing, with a mean")
    if {"sde_step", "sde_log_prob"} & {op.name for op in ops}:
        names += [
            "mean",
            *(f"gradient of {of}, with a mean" for of in ("log_prob", "mean", "both")),
        ]
    if "matching_loss" in {op.name for op in ops}:
        names += KINDS_OF_MATCHING
    if set(TOKENS) & set(ops):
        names += KINDS
    if "linear_policy_loss" in {op.name for op in ops}:
        names += KINDS_OF_A_LOSS
    return names


def _progress(indices):
    try:
        from tqdm import tqdm
    except ImportError:
        return indices
    return tqdm(indices, mininterval=1, disable=not sys.stderr.isatty())
