"""The cases of network.py, one by one: what each times, compares and notes.

A case notes a part after each thing that it measures; one that fails is noted with what it said.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from network_models import IS_REHEARSAL, Network, images
from torch import Tensor

from flowkern.models.quantize import quantize

PEAK = 989.0
"""TFLOP/s of dense bfloat16 products on an H100 or H200 (SXM), by its data sheet."""
UTILIZATION = (
    "utilization: TFLOP of the network's products and attention, counted by torch's flop counter "
    "(forward, and backward as LoRA on a frozen base needs it; nothing computed again), by seconds "
    f"and {PEAK:.0f} TFLOP/s, which is dense bfloat16, for float8 too"
)
CALLS = 1 if IS_REHEARSAL else 4
BACKEND = "eager" if IS_REHEARSAL else "inductor"  # the code that a CPU needs takes a minute
MODES = ("forward", "learning rows forward", "both")
"""What is compiled for: a graph each, of each sort of block."""
Note = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    limit: float
    """Seconds from its turn on."""
    base: str = "bfloat16"
    is_compiled: bool = False
    is_emulated: bool = False
    """Casts that fusing would skip are made, as eager mode makes them."""


CASES = (
    Case("sd3", "sd3", 40),
    Case("sd3 compiled, emulated casts", "sd3", 30, is_compiled=True, is_emulated=True),
    Case("sd3 compiled", "sd3", 30, is_compiled=True),
    Case("flux", "flux", 35),
    Case("sd3 float8, compiled", "sd3", 30, "float8", True, True),
    Case("flux float8, compiled", "flux", 40, "float8", True, True),
    Case("wan", "wan", 25),
    Case("flux compiled, emulated casts", "flux", 35, is_compiled=True, is_emulated=True),
    Case("wan compiled, emulated casts", "wan", 30, is_compiled=True, is_emulated=True),
)
"""By value: the first that is ready has its turn."""


class Meter:
    """Times and compares one network, and notes it."""

    def __init__(self, model: Network, operations: dict[str, float], note: Note):
        self.model, self.operations, self.note = model, operations, note
        self.forward, self.learning = model.rows

    @contextmanager
    def part(self, name: str):
        """What is measured in it is noted at its end; what was raised, too, and no more."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:  # the next part may be well
            found["error"] = f"{type(error).__name__}: {error}"[:600]
        self.note(name, found)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(self, found: dict[str, Any], has_forward: bool = True) -> None:
        """Milliseconds, peak memory, TFLOP/s and utilization of the calls of a part."""
        calls = {}
        if has_forward:
            calls["forward"] = self.forward, torch.no_grad()(self.model.velocity)
        if self.model.learned:
            calls["both"] = (self.learning, self.model.learn)
        for name, (rows, call) in calls.items():
            milliseconds, memory = timed(lambda: call(rows), self.model.device)  # noqa: B023
            rate = self.operations[name] * rows / milliseconds * 1e3
            found[f"{name}_{rows}_ms"] = round(milliseconds, 2)
            found[f"{name}_ms_per_row"] = round(milliseconds / rows, 2)
            found[f"{name}_tflops"] = round(rate, 1)
            found[f"{name}_utilization"] = round(rate / PEAK, 3)
            found[f"{name}_peak_gb"] = memory

    def answers(self) -> tuple[Tensor, Tensor]:
        """The velocity of a graph with a gradient, and the gradient."""
        velocity = self.model.learn(self.learning)
        if not velocity.isfinite().all():
            raise FloatingPointError("the velocity is not finite")
        return velocity, self.model.gradient()

    def compare(self, found: dict[str, Any], right: tuple[Tensor, Tensor] | None = None) -> None:
        """No gradient against gradient, many rows against few, and all against another way's."""
        velocity, gradient = self.answers()
        with torch.no_grad():
            alone = self.model.velocity(self.learning)
            among = self.model.velocity(self.forward)[: self.learning]
        found["max_without_gradient_less_with"] = (alone - velocity).abs().max().item()
        found["max_of_all_rows_less_few"] = (among - alone).abs().max().item()
        if right is not None:
            found["velocity_off"] = distance(velocity, right[0])
            found["gradient_off"] = distance(gradient, right[1])


def distance(found: Tensor, right: Tensor) -> float:
    """Relative, by norms."""
    return ((found - right).float().norm() / right.float().norm()).item()


def timed(call: Callable, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds, the median of calls after one; the most memory that was taken, in GB."""
    is_cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    call()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(CALLS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        found.append((time.perf_counter() - begin) * 1e3)
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if is_cuda else None
    return statistics.median(found), peak


def measure(
    case: Case, device: torch.device, operations: dict[str, float], note: Note, turn: Callable
) -> None:
    """The whole case; `turn` returns when the device is its own."""
    kept = None
    if case.is_compiled:
        kept = compile_for(case, device, MODES, lambda name, found: note(f"{name}, again", found))
    turn()
    has_lora = case.is_compiled or case.family != "sd3"
    meter = Meter(Network(case.family, device, has_lora=has_lora), operations, note)
    if case.is_compiled:
        compiled(case, meter)
        del kept
        return
    if case.family == "sd3":
        precisions(meter)
        return decoding(meter)
    for is_on in (False, True):
        with meter.part("checkpointing" if is_on else "eager") as found:
            meter.model.checkpoint(is_on)
            meter.time(found, has_forward=not is_on)


def compile_for(case: Case, device: torch.device, modes: tuple[str, ...], note: Note) -> Network:
    """Compile each sort of block for the calls of the modes: others like it take what was made, as
    long as the network that this returns is there.
    """
    model = Network(case.family, device, has_few=True)
    if case.base != "bfloat16":
        quantize(model.blocks)
    _compile(model, case)
    forward, learning = model.rows
    calls = {
        MODES[0]: lambda: torch.no_grad()(model.velocity)(forward),
        MODES[1]: lambda: torch.no_grad()(model.velocity)(learning),
        MODES[2]: lambda: model.learn(learning),
    }
    for mode in modes:
        begin = time.perf_counter()
        calls[mode]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        note(
            f"compile, {mode}",
            {"seconds": round(time.perf_counter() - begin, 1)} | _graphs("so far"),
        )
    for parameter in model.learned:
        parameter.grad = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def compiled(case: Case, meter: Meter) -> None:
    """The same network eager and compiled; on a float8 base, both against bfloat16."""
    model, right = meter.model, None
    with meter.part("eager bfloat16") as found:
        right = meter.answers()
        if case.base == "bfloat16":
            meter.time(found)
            meter.compare(found)
    if case.base != "bfloat16":
        with meter.part("eager float8") as found:
            found["layers"] = quantize(model.blocks)
            meter.time(found)
            meter.compare(found, right)
    with meter.part("compiled") as found:
        found |= _graphs("before")
        begin = time.perf_counter()
        _compile(model, case)
        found["blocks"] = len(model.blocks)
        meter.answers()
        found["first_call_seconds"] = round(time.perf_counter() - begin, 1)
        meter.time(found)
        meter.compare(found, right)
        found |= _graphs("after")
    if case.family != "sd3":
        with meter.part("compiled, checkpointing") as found:
            model.checkpoint(True)
            meter.time(found, has_forward=False)


def _compile(model: Network, case: Case) -> None:
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.emulate_precision_casts = case.is_emulated
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=BACKEND)


def _graphs(when: str) -> dict[str, Any]:
    """Graphs compiled up to now, and how many of them another process had left in the cache."""
    counted = torch._dynamo.utils.counters
    found = {
        "graphs": counted["stats"]["unique_graphs"],
        "code_from_cache": counted["inductor"]["fxgraph_cache_hit"],
        "all_from_cache": counted["aot_autograd"]["autograd_cache_hit"],
    }
    return {when: found}


def precisions(meter: Meter) -> None:
    """What autocast and the dtype of LoRA's weights cost. An adapter stays once it is there."""
    model = meter.model
    for name, dtype, has_autocast in (
        ("no LoRA, no autocast", None, False),
        ("no LoRA, autocast", None, True),
        ("LoRA fp32, autocast (as the trainer)", torch.float32, True),
        ("LoRA bf16, autocast", torch.bfloat16, True),
        ("LoRA bf16, no autocast", torch.bfloat16, False),
    ):
        with meter.part(name) as found:
            if dtype is not None and not model.learned:
                model.add_lora()
            for parameter in model.learned:
                parameter.grad, parameter.data = None, parameter.data.to(dtype)
            model.has_autocast = has_autocast
            meter.time(found)


def decoding(meter: Meter) -> None:
    """As many images as learn by the VAE: float32 without TF32 and with it, bfloat16."""
    device, right = meter.model.device, None
    vae, latents = images(meter.learning, device)
    for name, dtype, has_tf32 in (
        ("float32, no TF32", torch.float32, False),
        ("float32", torch.float32, True),
        ("bfloat16", torch.bfloat16, True),
    ):
        with meter.part(f"decode, {name}") as found, torch.no_grad():
            torch.backends.cudnn.allow_tf32 = has_tf32
            given = latents.to(dtype)
            torch.nn.Module.to(vae, dtype)
            milliseconds, found["peak_gb"] = timed(lambda: vae.decode(given), device)  # noqa: B023
            found[f"images_{meter.learning}_ms"] = round(milliseconds, 2)
            image = vae.decode(given).sample
            right = image if right is None else right
            found["images_off"] = distance(image, right)
