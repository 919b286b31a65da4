"""Why MixGRPO falls and Flash* collapses at higher rates: the candidates and their experiments.

Each line changes one thing in runs that fall: were that thing the cause, they would hold. MixGRPO
at 3e-3 moves its window every five iterations; Flash* at 6e-3 never does.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import torch
from causes import Experiment

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
    model, recipe, ask = trainer.task.model, trainer.recipe, trainer.task.model.velocity
    levels = recipe.levels(None)

    def held(x_t, sigma, conditioning, network=None, sigma_host=None):
        start = recipe.window_start(trainer.iteration, trainer.config.seed)
        below = sigma < levels[start + recipe.window - 1] - 1e-6
        if not below.any():
            return ask(x_t, sigma, conditioning, network, sigma_host)
        out = torch.empty_like(x_t)
        with model.network.disable_adapter():
            out[below] = ask(x_t[below], sigma[below], conditioning[below])
        if not below.all():
            out[~below] = ask(x_t[~below], sigma[~below], conditioning[~below])
        return out

    model.velocity = held


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
    return Experiment(f"{label}: {what}", entry, (rate, *overrides), **more)


def _both(name: str, label: str, *overrides: str, **more) -> dict[str, Experiment]:
    return {f"{key}_{name}": _of(key, label, *overrides, **more) for key in FALLING}


WIDE, NARROW = (f"algorithm.clip_range={3.2e-3 * factor:g}" for factor in (16, 1 / 16))
EXPERIMENTS = {
    **_both("falls", "as it falls"),
    "mix_tuned": _of("mix", "rate 1.5e-3", rate=1.5e-3),
    "star_tuned": _of("star", "rate 1.5e-3", rate=1.5e-3),
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
    "mix_quarter": _of("mix", "a quarter of the rate", rate=0.75e-3),
    "star_quarter": _of("star", "a quarter of the rate", rate=1.5e-3),
    **_both("edges", "edges weigh as much", change=equal_edges),
    # levels that are never trained
    **_both("held", "the adapter off below the window", change=hold),
    **_both("random", "the window anywhere", "algorithm.strategy=random", "algorithm.stride=1"),
    # what holds on to the base
    **_both("kl", "KL .01", "algorithm.kl_coef=0.01"),
}
