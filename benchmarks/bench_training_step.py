"""One training step of the digits demo, end to end, against a plain PyTorch script."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from harness import ROOT, Case, Contender

CONFIG = ROOT / "configs" / "digits" / "flow_grpo.yaml"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Empty where the trainer's dependencies are missing: the kernels need torch alone."""
    try:
        from plain_training_step import PlainTrainingStep

        from flowkern.train.config import load_config
        from flowkern.train.trainer import Trainer
    except ImportError:
        return []
    folder = tempfile.TemporaryDirectory()
    overrides = [f"model.path={ROOT / 'assets/digits-sd3'}", f"output_dir={Path(folder.name)}"]
    overrides += [
        f"data.{s}_prompts={ROOT / f'assets/digits-prompts/{s}.jsonl'}" for s in ("train", "test")
    ]

    def trainer():
        return Trainer(load_config(CONFIG, overrides))

    ours = trainer()
    group, total = ours.recipe.group_size, ours.recipe.group_size * ours.recipe.prompts_per_rollout
    plain = {
        size: PlainTrainingStep(trainer(), size) for size in ((group,) if quick else (group, 1))
    }
    difference = _gradient_difference(trainer(), PlainTrainingStep(trainer(), group))

    def run(step):
        def call():
            step()
            call.keep = folder  # the run directory lives as long as the case
            return ()

        return call

    contenders = [
        Contender(
            "flowkern", run(ours.step), f"rollout in batches of {ours.config.train.max_batch}"
        )
    ]
    for size, one in plain.items():
        name = (
            "plain PyTorch, one group at a time"
            if size == group
            else "plain PyTorch, one sample at a time"
        )
        contenders.append(Contender(name, run(one.step), "the way released scripts loop"))
    shape = (total, *ours.model.latent_shape())
    rounds = 2 if quick else 3
    return [
        Case(
            "training_step",
            "digits demo",
            shape,
            "float32",
            contenders,
            lambda: difference,
            1e-3,
            rounds=rounds,
        )
    ]


def _gradient_difference(ours, plain) -> float:
    """With the same noise both must reach the same gradient: their relative distance."""
    from flowkern import philox_normal
    from flowkern.rollout.engine import sample_ids

    group, slots = ours.recipe.group_size, ours.slots
    ids = sample_ids(0, slots, group)

    def noise(shape, stream, i, first):
        return philox_normal(shape, ours.config.seed, ids[first : first + shape[0]], i, stream)

    gradients = []
    update = ours.update
    ours.update = lambda means: (
        gradients.extend(p.grad.clone() for p in ours.parameters),
        update(means),
    )[1]
    ours.step()
    plain.noise = noise
    plain.step()
    ours_flat, plain_flat = (
        torch.cat([g.flatten() for g in gs]) for gs in (gradients, plain.gradient)
    )
    return float((ours_flat - plain_flat).norm() / plain_flat.norm())
