"""An iteration of a tiny Stable Diffusion 3.5: contenders (a) and (c) of train_step.py.

(a) is the plain path as the algorithm's released script writes it, both have the papers' steps,
guidance and losses. Gate: on the same noise both reach the same gradient. Beside the measured
factor is the one that counting the rows of the network gives, each with its operations.
"""

from __future__ import annotations

import torch
from bench_rollout import is_ready
from harness import Case, Contender

MODEL, ROWS = "tiny", 16
QUICK = ("flow_grpo", "awm")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Empty where the trainer's dependencies are missing: the kernels need torch alone."""
    if not is_ready():
        return []
    from contenders import operations
    from plain_loops import LOOPS
    from settings import MODELS

    of_a_row = operations(MODELS[MODEL])
    return [_case(name, device, quick, of_a_row) for name in (QUICK if quick else LOOPS)]


def _case(name: str, device: torch.device, quick: bool, of_a_row: dict[str, float]) -> Case:
    from contenders import WAYS
    from contenders import Contender as Way
    from counting import MIDDLE, tflop
    from settings import IMAGES, Setting

    setting = Setting(MODEL, name, IMAGES.get(name, 8), ROWS, str(device), MIDDLE)
    plain = Way(WAYS["a"], setting.released_batch())
    ways = {"flowkern": Way(WAYS["c"], setting), "plain PyTorch, as released": plain}
    rows, made = {}, {}
    for label, way in ways.items():
        rows[label] = way.rollout(is_first=True)["rows"]
        made[label] = (way.found["gradient"].clone(),)
    truth = made["plain PyTorch, as released"][0]

    def check(gradient: torch.Tensor) -> float:
        return float((gradient - truth).norm() / truth.norm())

    def run(way: Way):
        return lambda: (way.rollout()["seconds"],)

    contenders = [
        Contender(label, run(way), f"rows {rows[label]}", True, made[label])
        for label, way in ways.items()
    ]
    dtype, allowed = ("float32", 1e-3) if device.type == "cpu" else ("bfloat16", 0.1)
    ours, theirs = (tflop(each, of_a_row) for each in rows.values())
    shape = (plain.images, *plain.model.latent_shape)
    title = f"{name}, tiny, by counting {theirs / ours:.2f} x"
    rounds = 1 if quick else 7
    return Case("train_step", title, shape, dtype, contenders, check, allowed, rounds=rounds)
