"""One training step of the digits demo, end to end, against a plain PyTorch script."""

from __future__ import annotations

import os
import tempfile

import torch
from harness import ROOT, Case, Contender

CONFIG = ROOT / "configs" / "digits" / "flow_grpo.yaml"
PLAIN = "the way released scripts loop"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Empty where the trainer's dependencies are missing: the kernels need torch alone."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from diffusers.utils import logging as diffusers_logging
        from plain_training_step import PlainTrainingStep
        from transformers.utils import logging as transformers_logging

        from flowkern.train.config import load_config
        from flowkern.train.trainer import Trainer
    except ImportError:
        return []
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = tempfile.TemporaryDirectory()
    overrides = [f"model.path={ROOT / 'assets/digits-sd3'}", f"output_dir={folder.name}"]
    for split in ("train", "test"):
        overrides.append(f"data.{split}_prompts={ROOT / f'assets/digits-prompts/{split}.jsonl'}")

    def trainer():
        return Trainer(load_config(CONFIG, overrides))

    ours, group = trainer(), trainer()
    size, prompts = ours.recipe.group_size, ours.recipe.prompts_per_rollout
    difference = _gradient_difference(trainer(), PlainTrainingStep(trainer(), size))

    def check(*_, folder=folder) -> float:  # keeps the run directory as long as the case
        return difference

    contenders = [
        Contender("flowkern", lambda: (ours.step(), ())[1]),
        _plain("plain PyTorch, one group at a time", PlainTrainingStep(group, size)),
    ]
    if not quick:
        alone = PlainTrainingStep(trainer(), 1)
        contenders.append(_plain("plain PyTorch, one sample at a time", alone))
    shape = (size * prompts, *ours.model.latent_shape())
    rounds = 2 if quick else 3
    return [
        Case(
            "training_step", "digits demo", shape, "float32", contenders, check, 1e-3, rounds=rounds
        )
    ]


def _plain(name: str, plain) -> Contender:
    return Contender(name, lambda: (plain.step(), ())[1], PLAIN)


def _gradient_difference(ours, plain) -> float:
    """With the same noise both must reach the same gradient in the first update: how far apart."""
    from flowkern import philox_normal
    from flowkern.rollout import prompt_ids

    member = torch.arange(ours.recipe.group_size)
    ids = (prompt_ids(0, ours.slots)[:, None] + member).flatten()
    gradients, update = [], ours.update

    def noise(shape, stream, i, first):
        return philox_normal(shape, ours.config.seed, ids[first : first + shape[0]], i, stream)

    def recorded(means):
        gradients.append(torch.cat([p.grad.flatten() for p in ours.parameters]))
        return update(means)

    ours.update, plain.noise = recorded, noise
    ours.step()
    plain.step()
    expected = torch.cat([g.flatten() for g in plain.gradient])
    return float((gradients[0] - expected).norm() / expected.norm())
