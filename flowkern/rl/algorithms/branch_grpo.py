"""BranchGRPO (arXiv 2509.06040; github.com/Fredreic1849/BranchGRPO, FLUX.1-dev on 720 x 720).

All samples of a prompt grow from one noise and part at some of the drawn steps. A step's advantage
compares the mean reward of the samples that it leads to with those of the other steps of its depth.

Released, the noise at splits is multiplied by 4 while its density is not, the last edge is trained
although the image is the clean prediction before it, and the optimizer moves after 12 edges of a
device. Here all noise is the SDE's, and updates share out prompts. Pruning, off as released, and
weights by the probability of a path, off too, are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowkern import rollout
from flowkern.rl.recipe import Grid, NoiseLevel, SdeType
from flowkern.rl.trees import TreeRecipe


@dataclass(frozen=True, kw_only=True)
class BranchGRPO(TreeRecipe):
    """The released defaults for HPS-v2.1."""

    num_inference_steps: int = 20
    group_size: int = 16
    prompts_per_rollout: int = 16
    updates_per_rollout: int = 4
    noise_level: NoiseLevel = 0.3
    sde_type: SdeType = "dance_sde"
    clip_range: float = 1e-3
    """As released, for 129,600 latent elements."""
    clip_elements = 129_600
    split_steps: list[int] = field(default_factory=lambda: [0, 3, 6, 9])
    """The steps at which every state splits, counted from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        splits, last = self.split_steps, self.num_inference_steps - 2
        if len({*splits}) < len(splits) or not all(0 <= i <= last for i in splits):
            raise ValueError(
                f"split_steps: got {splits}, expected different steps from 0 to {last}"
            )
        self.check_splits("split_steps", splits)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        drawn = range(self.num_inference_steps - 1)  # the last step is the clean prediction
        levels = {i: self.sde(i)[1] for i in drawn}
        return self.tree(self.levels(grid), self.split_steps, levels)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        states = [len(after) for after in self.parts(self.split_steps)]
        return rollout.Cost(1 + sum(states[:-1]), sum(states), self.group_size)
