"""Why MixGRPO falls and Flash* collapses at higher rates: the candidates and their experiments.

Each line changes one thing in runs that fall: were that thing the cause, they would hold. MixGRPO
at 3e-3 moves its window every five iterations; Flash* at 6e-3 never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import mean
from unittest.mock import patch

import torch
from algorithm_runs import evaluate
from causes import BUDGET, IMAGES, Experiment

LONG, SLOW = 100_000, 1.5e-3  # forward-equivalents; a rate
# What falls: entry and rate.
FALLING = {"mix": ("MixGRPO", "mixgrpo", 3e-3), "star": ("Flash*", "mixgrpo_flash_star", 6e-3)}


# ---- what no option says: changes to a trainer ----


def forget(trainer) -> None:
    """AdamW's moments begin anew where the window moves."""
    step, recipe, seed = trainer.step, trainer.recipe, trainer.config.seed

    def forgetting():
        starts = [recipe.window_start(max(0, trainer.iteration - back), seed) for back in (0, 1)]
        if starts[0] != starts[1]:
            for state in trainer.optimizer.state.values():
                for moment in state.values():
                    moment.zero_()
        return step()

    trainer.step = forgetting


def hold(trainer) -> None:
    """The adapter acts at the noise levels that the window has been at, and is off below them."""
    trainer.task.model.velocity = _split(trainer, "below")


def _split(trainer, off: str) -> Callable[..., torch.Tensor]:
    """The model's velocity, with the adapter off at noise levels "below" those where the window has
    been, or at those, "trained"."""
    model, recipe, ask = trainer.task.model, trainer.recipe, trainer.task.model.velocity
    levels = recipe.levels(None)

    def split(x_t, sigma, conditioning, network=None, sigma_host=None):
        start = recipe.window_start(trainer.iteration, trainer.config.seed)
        is_below = sigma < levels[start + recipe.window - 1] - 1e-6
        is_off = is_below if off == "below" else ~is_below
        if not is_off.any():
            return ask(x_t, sigma, conditioning, network, sigma_host)
        out = torch.empty_like(x_t)
        with model.network.disable_adapter():
            out[is_off] = ask(x_t[is_off], sigma[is_off], conditioning[is_off])
        if not is_off.all():
            out[~is_off] = ask(x_t[~is_off], sigma[~is_off], conditioning[~is_off])
        return out

    return split


def look_closer(trainer) -> Callable[[], dict[str, float]]:
    """The same weights with the adapter off at some levels; and the rollout's rewards through the
    tail that the algorithm has and through one of the grid's own steps, from the same states."""

    looks = count()

    def more() -> dict[str, float]:
        found: dict[str, float] = {}
        if next(looks) % 8:  # as it takes several evaluations
            return found
        for off in ("below", "trained"):
            with patch.object(trainer.task.model, "velocity", _split(trainer, off)):
                scores = evaluate(trainer, IMAGES)
            found |= {f"{key}_off_{off}": scores[key] for key in ("reward", "distance")}
        return found | (_tails(trainer) if hasattr(trainer.recipe, "tail_ratio") else {})

    return more


def _tails(trainer) -> dict[str, float]:
    """Rewards of one rollout through two tails: the spreads within groups, and how far they say
    the same of a group."""
    task, own, seen = trainer.task, trainer.task.recipe, []
    credit = task.credit
    task.credit = lambda scores, plan: seen.append(scores) or credit(scores, plan)
    try:
        for task.recipe in (own, replace(own, tail_ratio=None)):
            task.collect(trainer.iteration)
    finally:
        task.recipe, task.credit = own, credit
    rewards = [scores["digits_classifier"] for scores in seen]
    within = [reward - reward.mean(1, keepdim=True) for reward in rewards]
    both = torch.stack(within).flatten(1)
    return {
        "tail_reward": rewards[0].mean().item(), "full_reward": rewards[1].mean().item(),
        "tail_spread": both[0].std().item(), "full_spread": both[1].std().item(),
        "tail_correlation": torch.corrcoef(both)[0, 1].item(),
    }  # fmt: skip


def equal_edges(trainer) -> None:
    """Trained edges weigh what makes the gradients of their log-ratios as long as one another, and
    as long in the mean as they were."""
    recipe, plan_of = trainer.recipe, trainer.recipe.plan

    def plan(*args):
        made = plan_of(*args)
        trained = {i: node.edge for i, node in enumerate(made.nodes) if node.is_trained}
        sizes = {i: abs(float(edge.b / edge.std)) for i, edge in trained.items()}
        middle = mean(sizes.values())
        for i, size in sizes.items():
            made.nodes[i] = replace(made.nodes[i], weight=middle / size)
        return made

    object.__setattr__(recipe, "plan", plan)


def over_rollout(trainer) -> None:
    """Advantages over the standard deviation of the rollout, not their group's."""
    credit = replace(trainer.recipe.credit(), global_std=True)
    object.__setattr__(trainer.recipe, "credit", lambda: credit)


# ---- the table ----


def _of(name: str, what: str, *overrides: str, rate: float | None = None, **more) -> Experiment:
    label, entry, own = FALLING[name]
    rate = f"train.learning_rate={rate or own:g}"
    budget = more.pop("budget", 60_000 if name == "mix" else 40_000)  # 12 iterations, 17 of Flash*
    share = more.pop("share", 1.0) * budget / BUDGET
    return Experiment(f"{label}: {what}", entry, (rate, *overrides), share=share, **more)


def _both(name: str, label: str, *overrides: str, **more) -> dict[str, Experiment]:
    return {f"{key}_{name}": _of(key, label, *overrides, **more) for key in FALLING}


WIDE, NARROW = (f"algorithm.clip_range={3.2e-3 * factor:g}" for factor in (16, 1 / 16))
EXPERIMENTS = {
    **_both("falls", "as it falls", change=look_closer),
    # Adam's second moment across window moves
    "mix_still": _of("mix", "the window never moves", "algorithm.stride=0"),
    "mix_forget": _of("mix", "AdamW forgets at a move", change=forget),
    **_both("beta2", "beta2 .95", "train.adam_beta2=0.95"),
    # reward noise of short tails
    "star_tail": _of("star", "the tail at full length", "algorithm.tail_ratio=null", share=1.8),
    # clip binding
    **_both("wide", "clip range x 16", WIDE),
    **_both("narrow", "clip range / 16", NARROW),
    # shared root noise
    **_both("roots", "a root for each sample", "algorithm.init_same_noise=false"),
    # group statistics
    **_both("global", "std of the rollout", change=over_rollout),
    **_both("undivided", "advantages not divided", "algorithm.scale_rewards=false"),
    **_both(
        "group",
        "groups of 16",
        "algorithm.group_size=16",
        "algorithm.prompts_per_rollout=10",
        "algorithm.updates_per_rollout=2",
    ),
    # updates per rollout, and what they move
    **_both("once", "one update per rollout", "algorithm.updates_per_rollout=1"),
    **_both("slow", "rate 1.5e-3", rate=SLOW),
    **_both("edges", "edges weigh as much", change=equal_edges),
    # levels that are never trained
    **_both("held", "the adapter off below the window", change=hold),
    **_both("random", "the window anywhere", "algorithm.strategy=random", "algorithm.stride=1"),
    # what holds on to the base
    **_both("kl", "KL .01", "algorithm.kl_coef=0.01"),
    # does the remedy end the fall, or postpone it?
    **_both("long", f"as it falls, {LONG:,}", budget=LONG),
    **_both("narrow_long", f"clip range / 16, {LONG:,}", NARROW, budget=LONG),
    **_both("slow_long", f"rate 1.5e-3, {LONG:,}", rate=SLOW, budget=LONG),
    **_both("slow_narrow_long", f"both, {LONG:,}", NARROW, rate=SLOW, budget=LONG),
}
