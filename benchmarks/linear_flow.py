"""What an image teaches each algorithm, on a flow whose velocity is known in closed form.

    python benchmarks/linear_flow.py [--rollouts N] [--from-json PATH]

Images of D elements are standard normal, so the exact velocity is linear in x_t, and what learns is
a shift of it, (D,). The reward is -mean((image - target)^2) with a target of +-1: the shift that
raises it is known, and so are signal and noise of a gradient. Printed is how many images it takes
until the noise of a gradient's D elements is as long as its signal, and what Flow-GRPO takes for
that over what others take, in forward-equivalents (a call 1, its backward 2). Some settings are
also trained with Adam until GOAL of the way to the target is made, each algorithm at the rate of
RATES that was fastest on a seed of its own. Rollouts, advantages, losses and gradients are the
package's own, of the recipes at the demo's sizes without guidance, KL and pulls. `theory` says the
first of them without a rollout.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import mean

import torch
from algorithms import compact
from harness import at_least_one, describe_machine, recorded, results_folder
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowkern.rl.algorithms import recipe
from flowkern.rollout import Source, batch, network_batches, prompt_ids, run
from flowkern.schedules import edge_coefficients, sd3_sigmas

SEEDS, ROLLOUTS, MAX_BATCH = (0, 1, 2), 12, 4096
TUNING_SEED, GOAL, MOST = 1000, 0.8, 1_500_000
RATES = (0.025, 0.0125, 0.05, 0.00625, 0.1, 0.2, 0.4)  # the likely first
REACH = math.sqrt(2) * math.asinh(1)  # of a shift in the image: the integral of 1 / sqrt(q) below
SIZES = {
    "flow_grpo": {"group_size": 8, "prompts_per_rollout": 20, "updates_per_rollout": 1},
    "awm": {"group_size": 8, "prompts_per_rollout": 20, "ref_coef": 0.0, "ema_coef": 0.0}
    | {"last_sigma_ratio": 0.0},
    "tempflow_grpo": {"num_seeds": 2, "group_size": 4, "prompts_per_rollout": 10}
    | {"updates_per_rollout": 1},
}
POLICY = {"kl_coef": 0.0, "guidance_scale": 1.0}
LABELS = {"flow_grpo": "Flow-GRPO", "awm": "AWM", "tempflow_grpo": "TempFlow-GRPO"}


@dataclass(frozen=True)
class Setting:
    """A line: what is varied, of all algorithms or of some."""

    label: str
    elements: int
    options: dict[str, dict] = field(default_factory=dict)
    """Of an algorithm; one that is not named is as it was."""
    is_trained: bool = False
    """Also with an optimizer?"""


def _policies(label: str, is_trained: bool = True, **options) -> Setting:
    """With options of the two that train steps."""
    return Setting(label, 256, dict.fromkeys(("flow_grpo", "tempflow_grpo"), options), is_trained)


_GROUPS = {
    "flow_grpo": {"group_size": 24, "prompts_per_rollout": 7},
    "awm": {"group_size": 24, "prompts_per_rollout": 7},
    "tempflow_grpo": {"num_seeds": 4, "group_size": 6, "prompts_per_rollout": 4},
}
SETTINGS = (
    *(Setting(f"{n} elements", n, is_trained=True) for n in (16, 64, 256)),
    Setting("256, groups of 24", 256, _GROUPS, is_trained=True),
    _policies("256, 20 steps", num_inference_steps=20),
    _policies("256, 40 steps", num_inference_steps=40, is_trained=False),
    _policies("256, noise level .4", noise_level=0.4),
    _policies("256, noise level 1", noise_level=1.0),
    *(Setting(f"{n} elements", n, is_trained=n < 4096) for n in (1024, 4096)),
)


def pull(t: float) -> float:
    """The exact velocity over x_t."""
    return (2 * t - 1) / (t * t + (1 - t) ** 2)


class LinearFlow(torch.nn.Module):
    """The exact velocity with a shift; counts its calls, and those that will go backward."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(elements))
        self.calls = self.with_gradient = 0

    @property
    def taken(self) -> int:
        """Forward-equivalents."""
        return self.calls + 2 * self.with_gradient

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, on_host) -> Tensor:
        self.calls += len(x_t)
        self.with_gradient += len(x_t) if torch.is_grad_enabled() else 0
        t = sigma.to(x_t.dtype).view(-1, 1, 1, 1)
        return (2 * t - 1) / (t * t + (1 - t) ** 2) * x_t + self.shift


def made(name: str, setting: Setting):
    """The recipe of an algorithm in a setting."""
    policy = POLICY | {"clip_range": 1e-4 * math.sqrt(65536 / setting.elements)}
    options = SIZES[name] | (policy if name != "awm" else {}) | setting.options.get(name, {})
    return recipe(name)(**options)


def gradient(algorithm, net: LinearFlow, target: Tensor, seed: int, iteration: int) -> Tensor:
    """(D,): of one rollout, on policy."""
    plan, prompts = algorithm.plan(sd3_sigmas, iteration, seed), algorithm.prompts_per_rollout
    every = torch.arange(prompts)
    source = Source(seed, prompt_ids(iteration, every), (1, 1, len(target)), torch.float32)
    rollout = run(plan, net, source, MAX_BATCH)
    rewards = -(rollout.latents.flatten(2) - target).square().mean(-1).double()
    advantage = algorithm.credit()({"target": rewards}, {"target": 1.0}, plan)
    objective = algorithm.objective(None)
    how = objective.needs_all, objective.compares
    for site, prompt in network_batches(rollout.layout, advantage[None], 0, MAX_BATCH, *how):
        part = batch(rollout, site, prompt, advantage, is_on_policy=True)
        (objective(part, net, {}).loss / advantage.numel()).backward()
    found, net.shift.grad = net.shift.grad, None
    return found


def target_of(setting: Setting, seed: int) -> Tensor:
    """(D,)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(setting.elements, generator=generator).sign()


def climb(name: str, setting: Setting, seed: int, rate: float, most: float) -> float | None:
    """Forward-equivalents until GOAL of the way is made; None: not within `most`."""
    algorithm, net = made(name, setting), LinearFlow(setting.elements)
    target, last = target_of(setting, seed), (0, 0.0)
    optimizer = torch.optim.Adam([net.shift], lr=rate)
    for iteration in count():
        net.shift.grad = gradient(algorithm, net, target, seed, iteration)
        optimizer.step()
        left = (REACH * net.shift.detach() + target).square().mean()
        now = net.taken, 1 - float(left)
        if now[1] >= GOAL:
            return last[0] + (GOAL - last[1]) / (now[1] - last[1]) * (now[0] - last[0])
        if now[0] > most or now[1] < -1:
            return None
        last = now


def trained(name: str, setting: Setting) -> dict:
    """At the fastest rate of a seed of its own."""
    best, fastest = MOST, RATES[0]
    for rate in RATES:
        found = climb(name, setting, TUNING_SEED, rate, best)
        if found is not None and found < best:
            best, fastest = found, rate
    return {"rate": fastest, "calls": [climb(name, setting, seed, fastest, MOST) for seed in SEEDS]}


def measure(name: str, setting: Setting, seed: int, rollouts: int) -> dict[str, float]:
    """Images and forward-equivalents until noise is as long as signal."""
    algorithm, net = made(name, setting), LinearFlow(setting.elements)
    target = target_of(setting, seed)
    found = torch.stack([gradient(algorithm, net, target, seed, i) for i in range(rollouts)])
    along = found.double() @ target.double() / math.sqrt(setting.elements)
    signal = along.mean().square() - along.var() / rollouts
    noise = found.double().square().sum(1).mean() - signal
    plan = algorithm.plan(sd3_sigmas)
    images = algorithm.prompts_per_rollout * len(plan.leaves)
    cost = net.taken / rollouts
    scale = float(noise / signal)
    return {
        "images": scale * images,
        "forward_equivalents": scale * cost,
        "per_image": cost / images,
    }


# ---- theory ----


def theory(name: str, setting: Setting) -> dict[str, float]:
    """Squared signal over squared noise of an image's gradient in one direction, times the noise
    that the image itself has there; for policy gradients also with the best weights of steps, which
    is the share of an image's variance that trained draws have.
    """
    algorithm = made(name, setting)
    if name == "awm":
        plan = algorithm.plan(sd3_sigmas)
        levels = [sigma for leaf, sigma in plan.points if leaf == plan.points[0][0]]
        return {"as_weighted": _of_matching(levels, algorithm.ghuber_power)}
    return _of_steps(algorithm)


def _of_matching(levels: list[float], power: float) -> float:
    """The residual at t is ((1 - t) noise - t image) / q, q = t^2 + (1 - t)^2, and weighs
    t q^(1 - power): the image's part is common to all levels, that of the noise is not."""
    weights = [t * (t * t + (1 - t) ** 2) ** -power for t in levels]
    image = sum(w * t for w, t in zip(weights, levels, strict=True))
    noise = sum((w * (1 - t)) ** 2 for w, t in zip(weights, levels, strict=True))
    return image**2 / (image**2 + noise)


def _of_steps(algorithm) -> dict[str, float]:
    """A step x_next = a x_t + b velocity + std noise; its gradient weighs noise by b / std."""
    sigmas = sd3_sigmas(algorithm.num_inference_steps).tolist()
    edges = [edge_coefficients(*pair, *algorithm.sde(i)) for i, pair in enumerate(pairwise(sigmas))]
    keeps = [float(e.a) + float(e.b) * pull(s) for e, s in zip(edges, sigmas, strict=False)]
    reach = [float(e.std) * math.prod(keeps[i + 1 :]) for i, e in enumerate(edges)]
    variance = math.prod(keeps) ** 2 + sum(r * r for r in reach)
    weights = [abs(float(e.b)) / float(e.std) for e in edges[:-1]]
    signal = sum(w * r for w, r in zip(weights, reach[:-1], strict=True))
    noise = sum(w * w for w in weights)
    best = sum(r * r for r in reach[:-1])
    return {"as_weighted": signal**2 / noise / variance, "best": best / variance}


# ---- the table ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=at_least_one, default=ROLLOUTS, help="of a gradient")
    parser.add_argument("--from-json", type=Path, help="print the table again")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if options.from_json:
        report(recorded(options.from_json, "lines"))
        return 0
    device = torch.device("cpu")
    machine = describe_machine(device)
    torch.set_num_threads(1)
    path = options.json or results_folder(device, machine) / "linear_flow.json"
    settings = {"seeds": SEEDS, "rollouts": options.rollouts, "rates": RATES, "goal": GOAL}
    result = {"machine": machine, "command": " ".join(("python", *sys.argv))}
    result |= {"settings": settings, "lines": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    for setting in SETTINGS:
        result["lines"].append(_line(setting, options.rollouts))
        path.write_text(compact(result))  # what is cut short counts
    report(result)
    return 0


def _line(setting: Setting, rollouts: int) -> dict:
    line = {"label": setting.label, "elements": setting.elements}
    for name in SIZES:
        line[name] = {"runs": [measure(name, setting, seed, rollouts) for seed in SEEDS]}
        if setting.is_trained:
            line[name]["trained"] = trained(name, setting)
        if name != "tempflow_grpo":  # whose advantages are of single steps
            line[name]["theory"] = theory(name, setting)
    return line


def ratios(line: dict, name: str) -> list[float]:
    """How much more Flow-GRPO takes than another until noise is signal, of each seed."""
    pairs = zip(line["flow_grpo"]["runs"], line[name]["runs"], strict=True)
    key = "forward_equivalents"
    return [flow[key] / other[key] for flow, other in pairs]


def report(result: dict) -> None:
    others = [name for name in SIZES if name != "flow_grpo"]
    table = Table(title="How much more Flow-GRPO takes, in forward-equivalents: mean (of 3 seeds)")
    columns = ["", *(f"images until noise is signal: {LABELS[name]}" for name in SIZES)]
    columns += [f"{LABELS[name]}: until noise is signal" for name in others]
    columns += [f"{LABELS[name]}: trained" for name in others]
    for i, name in enumerate([*columns, "AWM: theory (per image, x cost)"]):
        table.add_column(name, justify="right" if i else "left")
    for line in result["lines"]:
        images = [mean(run["images"] for run in line[name]["runs"]) for name in SIZES]
        found = [ratios(line, name) for name in others]
        gains = [f"{mean(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in found]
        gains += [_climbed(line, name) for name in others]
        table.add_row(line["label"], *(f"{n:.0f}" for n in images), *gains, _predicted(line))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _climbed(line: dict, name: str) -> str:
    """Means over seeds, and both rates."""
    if "trained" not in line[name]:
        return ""
    pair = [line[each]["trained"] for each in ("flow_grpo", name)]
    if any(None in one["calls"] for one in pair):
        return "not reached"
    flow, other = (mean(one["calls"]) / 1000 for one in pair)
    return f"{flow / other:.1f} ({flow:.0f}k, {other:.0f}k)"


def _predicted(line: dict) -> str:
    flow, awm = (line[name]["theory"] for name in ("flow_grpo", "awm"))
    cost = [line[name]["runs"][0]["per_image"] for name in ("flow_grpo", "awm")]
    images = awm["as_weighted"] / flow["as_weighted"]
    return f"{images * cost[0] / cost[1]:.1f} ({images:.1f} x {cost[0] / cost[1]:.2f})"


if __name__ == "__main__":
    sys.exit(main())
