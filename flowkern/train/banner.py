"""What a run says of itself before it begins: what is trained, on what, how much of it, and, on a
card that is known, what it is estimated to take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from flowkern.checks import ConfigError, counted
from flowkern.ops._common.dispatch import backends
from flowkern.train.cards import CARDS

if TYPE_CHECKING:
    from flowkern.train.loop import Loop


def lines(loop: Loop) -> Iterator[str]:
    """Of a run whose task has begun, on the main process; on others nothing."""
    if not loop.accelerator.is_main_process:
        return
    config, task = loop.config, loop.task
    images = loop.recipe.task == "flow"
    if images:
        yield f"model      {_model(loop)}"
    for fact in task.facts:
        yield f"training   {fact}" if fact is task.facts[0] else f"           {fact}"
    if images:
        yield f"iteration  {_iteration(loop)}"
        yield f"device     {_device(loop)}"
    yield f"rewards    {_rewards(config)}"
    if images and (said := waiting(loop)):
        yield f"           {said}"
    yield f"folder     {loop.directory.path}"
    if images and (said := estimated(loop)):
        yield f"estimate   {said}"


def _model(loop: Loop) -> str:
    model = loop.task.model
    about = model.describe()
    frames = f" x {counted(about['num_frames'], 'frame')}" if about.get("num_frames") else ""
    height, width = about["size"]
    return (
        f"{about['pipeline']}, {loop.config.model.path}: {about['parameters']:,} weights in "
        f"{about['dtype']}, {height} x {width} px{frames}, D = {about['elements']:,} elements of a "
        "latent"
    )


def _iteration(loop: Loop) -> str:
    recipe, planned = loop.recipe, loop.task.planned(loop.iteration)
    plan = recipe.plan(loop.task.model.sigmas, loop.iteration, loop.config.seed)
    images = recipe.prompts_per_rollout * plan.cost().images
    sampling, training = (loop.world * planned[phase] for phase in ("sampling", "training"))
    updates = recipe.updates_per_rollout
    steps = f" in {updates} optimizer steps" if updates > 1 else ""
    drawn = f"{counted(recipe.prompts_per_rollout, 'prompt')}, {counted(images, 'image')}"
    return (
        f"{drawn}; rows of the network: {sampling:,.0f} sampling, {training:,.0f} training{steps}; "
        f"{counted(loop.config.train.steps - loop.global_step, 'step')} to go"
    )


def _device(loop: Loop) -> str:
    device, count = loop.device, loop.world
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    usable = [backend for backend, why_not in backends(device).items() if why_not is None]
    processes = f", {count} processes" if count > 1 else ""
    return f"{name}{processes}; backends of the kernels: {', '.join(usable)}"


def _rewards(config: Any) -> str:
    return ", ".join(
        f"{name} {one.weight:g}" if one.weight else f"{name} (reported only)"
        for name, one in config.reward.root.items()
    )


def waiting(loop: Loop) -> str | None:
    """Where rewards are asked elsewhere, and nothing is sampled meanwhile."""
    elsewhere = [name for name, one in loop.task.rewards.items() if one.overlaps]
    if not elsewhere or loop.config.train.prompts_per_block or len(loop.task.slots) == 1:
        return None
    verb = "is" if len(elsewhere) == 1 else "are"
    return (
        f"{', '.join(elsewhere)} {verb} asked when all of a rollout is sampled; with "
        "train.prompts_per_block while other prompts are"
    )


def estimated(loop: Loop) -> str | None:
    """On a card whose data sheet is known, of one process; None elsewhere."""
    if loop.device.type != "cuda" or loop.world > 1:
        return None
    has = torch.cuda.get_device_name(loop.device).lower().replace(" ", "").replace("geforce", "")
    name = next((name for name in CARDS if name in has), None)
    if name is None:
        return None
    from flowkern.train.estimate import estimate

    try:
        found = estimate(loop.config, CARDS[name])
    except ConfigError as error:  # of a model that it does not know
        return f"none: {error}"
    seconds = ", ".join(f"{phase} {took:.1f}" for phase, took in found.seconds.items())
    return f"at most {found.peak / 1e9:.1f} GB; seconds of an iteration on {name}: {seconds}"
