"""How far ways to sample end from the flow that they follow: a Gaussian's, and the demo model's.

    python benchmarks/solver_error.py [--images N] [--json PATH]

A Gaussian's velocity is known, and every way is affine in the noise it draws, so the std of what is
sampled is computed, not drawn; over that of the data it is 1 where nothing is wrong. With the demo
model final latents are held against those of 400 steps of order 2 on the even grid, from the same
noise, as a root of the mean square. Of AWM, which draws some of its steps, the scores alone speak.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from harness import ROOT, at_least_one, describe_machine, results_folder

from flowkern.rl.algorithms import recipe
from flowkern.rollout import Plan, Source, prompt_ids, run
from flowkern.schedules import sd3_sigmas, shifted_sigmas

STDS, STEPS, DEMO_STEPS, FINE = (0.1, 0.25, 0.35, 0.5, 1.0, 2.0), (10, 14, 25, 40), (10, 14), 400
GRIDS = {"sd3": sd3_sigmas, "even": lambda steps: shifted_sigmas(steps, 3.0)}


def path(sigmas: list[float], orders: list[int]) -> Plan:
    """One deterministic sample."""
    plan = Plan()
    node = plan.root(0)
    for sigma, order in zip(sigmas[1:], orders, strict=True):
        node = plan.step(node, sigma, order)
    plan.leaf(node)
    return plan


def short_steps(sigmas: list[float]) -> list[int]:
    """Order 2 where a step is at most twice the one before it in log-SNR: beyond, more than the
    whole last difference of clean predictions would be added."""
    log_snr = torch.tensor(sigmas, dtype=torch.float64).logit().neg()
    is_short = log_snr.diff()[1:] <= 2 * log_snr.diff()[:-1]
    return [1, *(1 + is_short).tolist()]


def awm(ratio: float, sigmas: list[float]) -> Plan:
    """Two samples, each with drawn steps from noise level .9 to .3."""
    grid = torch.tensor(sigmas, dtype=torch.float64)
    options = {"num_inference_steps": len(sigmas) - 1, "group_size": 2, "last_sigma_ratio": ratio}
    return recipe("awm")(**options).plan(lambda steps: grid)


def of_order(order: int, sigmas: list[float]) -> Plan:
    return path(sigmas, [order] * (len(sigmas) - 1))


def halved(order: int, sigmas: list[float]) -> Plan:
    """With half of the level before in the place of a last one above 0 that is lower."""
    return of_order(order, recipe("awm")(last_sigma_ratio=0.5).path(sigmas))


WAYS: dict[str, Callable[[list[float]], Plan]] = {
    **{f"order {order}": partial(of_order, order) for order in (1, 2, 3)},
    "order 2, last two steps 1": lambda s: path(s, [2] * (len(s) - 3) + [1, 1]),
    "order 2, long steps 1": lambda s: path(s, short_steps(s)),
    **{f"order {order}, last level half": partial(halved, order) for order in (1, 2, 3)},
    "AWM": partial(awm, 0.0),
    "AWM, last level half": partial(awm, 0.5),
}


# ---- a Gaussian ----


def gaussian(plan: Plan, std: float) -> float:
    """The std of what is sampled of N(0, std^2), over std; negative where it is upside down. States
    and clean predictions are rows of weights on all noise that is drawn."""
    nodes = plan.nodes[: 1 + next(iter(plan.leaves))]  # the first sample's, in order
    noise = torch.eye(len(nodes), dtype=torch.float64)
    x, predictions = noise[0], []
    for i, (here, there) in enumerate(pairwise(nodes), 1):
        sigma, edge = here.sigma, there.edge
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        clean = (1 - sigma) * std**2 / variance * x
        earlier = sum(w * m for w, m in zip(edge.history, predictions, strict=False))
        x = edge.a * x + edge.b * (x - clean) / sigma + earlier + edge.std * noise[i]
        predictions.insert(0, clean)
    return math.copysign(float(x.norm()), float(x[0])) / std


def gaussians() -> Iterator[dict]:
    for grid, steps, way in product(GRIDS, STEPS, WAYS):
        plan = WAYS[way](GRIDS[grid](steps).tolist())
        found = {f"{std:g}": round(gaussian(plan, std), 4) for std in STDS}
        yield {"grid": grid, "steps": steps, "way": way, **found}


# ---- the demo model ----


@torch.no_grad()
def demo(images: int) -> Iterator[dict]:
    from flowkern.models import load_model
    from flowkern.rewards.digits import DigitsClassifier, DigitsJudge, DistanceToReal
    from flowkern.train.prompts import read_prompts

    model = load_model(ROOT / "assets/digits-sd3")
    held_out = read_prompts(ROOT / "assets/digits-prompts/test.jsonl")
    prompts = [held_out[i % len(held_out)] for i in range(images)]
    texts = [prompt["prompt"] for prompt in prompts]
    conditioning, ids = model.encode(texts), prompt_ids(0, torch.arange(images))
    rewards = {"reward": DigitsClassifier(), "judge": DigitsJudge(), "distance": DistanceToReal()}

    def sample(plan: Plan) -> torch.Tensor:
        """(images x leaves, *D), an image's leaves together."""

        def velocity(x, sigma, prompt, on_host):
            rows = conditioning.rows(prompt, on_host.prompt)
            return model.velocity(x, sigma, rows, sigma_host=on_host.sigma)

        return run(plan, velocity, Source(2**40, ids, model.latent_shape), 256).latents

    fine, cases = None, [("even", FINE, "order 2"), *product(GRIDS, DEMO_STEPS, WAYS)]
    for grid, steps, way in cases:
        sigmas = model.sigmas if grid == "sd3" else GRIDS[grid]
        latents = sample(WAYS[way](sigmas(steps).tolist()))
        fine, leaves = latents if fine is None else fine, latents.shape[1]
        row = {"grid": grid, "steps": steps, "way": way, "images": images * leaves}
        if leaves == 1:
            row["error"] = round(float((latents - fine).double().square().mean().sqrt()), 4)
        each = [prompt for prompt in prompts for _ in range(leaves)]
        decoded = model.decode(latents.flatten(0, 1))
        for name, reward in rewards.items():
            scores = reward(decoded, [prompt["prompt"] for prompt in each], each)
            row[name] = round(float(scores.double().mean()), 4)
        yield row


# ---- both ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=at_least_one, default=120, help="of the demo model")
    parser.add_argument("--json", type=Path, help="where the results go")
    options, device = parser.parse_args(), torch.device("cpu")
    result = {"machine": describe_machine(device), "command": " ".join(("python", *sys.argv))}
    target = options.json or results_folder(device, result["machine"]) / "solver_error.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    for part, rows in (("gaussian", gaussians()), ("demo", demo(options.images))):
        for row in rows:
            result.setdefault(part, []).append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    target.write_text(json.dumps(result).replace('{"grid"', '\n{"grid"') + "\n")  # a row, a line
    return 0


if __name__ == "__main__":
    sys.exit(main())
