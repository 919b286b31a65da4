"""What train_step.py asks of its contenders: a model, an algorithm as its paper has it, a size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness import ROOT
from large_model import MEDIUM, TINY, Architecture
from larger_models import FLUX_DEV, TINY_FLUX, TINY_WAN, WAN_1B
from plain_loops import LOOPS

from flowkern.rl.recipe import Recipe
from flowkern.train.config import from_dict

IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
MODELS: dict[str, Architecture] = {
    "sd35m": MEDIUM, "flux1": FLUX_DEV, "wan21-1.3b": WAN_1B,
    "tiny": TINY, "tiny-flux1": TINY_FLUX, "tiny-wan21": TINY_WAN,
}  # fmt: skip
IMAGES = {"tempflow_grpo": 6}  # a trunk's branches at each state; of others 8 samples
RELEASED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("Flux", "flow_grpo"): {
        "num_inference_steps": 6, "guidance_scale": 1.0, "noise_level": 0.9, "kl_coef": 0.0
    },
    ("Flux", "flow_grpo_fast"): {"num_inference_steps": 6},
    ("Flux", "grpo_guard"): {"num_inference_steps": 6, "guidance_scale": 1.0, "noise_level": 0.9},
    ("Flux", "tempflow_grpo"): {"guidance_scale": 1.0, "noise_level": 0.9},
    ("Wan", "flow_grpo"): {"num_inference_steps": 20, "clip_range": 1e-3},
    ("Wan", "dance_grpo"): {"guidance_scale": 5.0, "uncond_gradient": True},
}  # fmt: skip
"""Where a released run on this family is not the recipe's defaults, as configs/papers."""


@dataclass(frozen=True)
class Setting:
    """What one of them is asked for."""

    model: str
    algorithm: str
    images: int
    """Samples of the one prompt of an iteration; branches of a state, where there are such."""
    batch: int
    """Rows of a network call, at most; of the plain loop, samples."""
    device: str
    iteration: int = 0
    """Which of a run: windows move."""
    steps: int | None = None
    """Of the rollout; None: the paper's."""
    checkpointing: bool = False
    precision: str | None = None
    """bf16, or no; None: bf16, but on a CPU, which computes as fast in no other than float32."""

    @property
    def architecture(self) -> Architecture:
        return MODELS[self.model]

    @property
    def mixed_precision(self) -> str:
        return self.precision or ("bf16" if self.device != "cpu" or IS_REHEARSAL else "no")

    @property
    def has_few(self) -> bool:
        """Is a network of a few blocks much less than the whole?"""
        return not self.model.startswith("tiny") or IS_REHEARSAL

    def released_batch(self) -> Setting:
        """With as many samples a call as the released loop has on this family."""
        found = LOOPS[self.algorithm].released_batch.get(self.architecture.kind.__name__, 1)
        return replace(self, batch=min(found, self.images))

    def recipe(self) -> Recipe:
        return from_dict(self.config("unused", self.batch)).algorithm

    def config(self, folder: str, rows: int, **model: Any) -> dict[str, Any]:
        """Of a run; rows: of a network call. model: more of its section."""
        algorithm = {"name": self.algorithm, "group_size": self.images}
        algorithm |= {"prompts_per_rollout": 1, "updates_per_rollout": 1}
        if self.algorithm == "tempflow_grpo":
            algorithm["num_seeds"] = 1
        algorithm |= RELEASED.get((self.architecture.kind.__name__, self.algorithm), {})
        if self.steps is not None:
            algorithm["num_inference_steps"] = self.steps
        options = {"path": "in memory", "gradient_checkpointing": self.checkpointing}
        return {
            "output_dir": folder,
            "model": options | dict(self.architecture.options) | model,
            "data": {"train_prompts": str(ROOT / "assets/digits-prompts/train.jsonl")},
            "reward": {"contenders:brightness": {"weight": 1.0}},
            "algorithm": algorithm,
            "lora": {"rank": 32, "alpha": 64},
            "train": {"steps": 1000, "max_batch": rows, "mixed_precision": self.mixed_precision},
        }
