"""AWM, advantage weighted matching (arXiv 2509.25050; code: scxue/advantage_weighted_matching).

Images of any solver, noised anew, are matched at a few noise levels, weighted with advantages; for
the released rollout's stochastic SA-Solver Flow-GRPO's SDE draws here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from flowkern import rl, rollout
from flowkern.checks import AT_LEAST_0, SHARE, Range
from flowkern.rl.matching import Grid, Levels, MatchingRecipe, shared_random


@dataclass(frozen=True, kw_only=True)
class AWM(MatchingRecipe):
    """The released defaults for GenEval, SD3.5-M on 512 x 512."""

    num_inference_steps: int = 14
    group_size: int = 24
    prompts_per_rollout: int = 72
    noise_level: Annotated[float, AT_LEAST_0] = 0.4
    """Of the SDE, from noise level .9 to .3, and DPM-Solver++ elsewhere; 0: that everywhere."""
    num_train_timesteps: Levels = 6
    """Noise levels per image to match at, one of each stratum of the grid."""
    timestep_fraction: Annotated[float, SHARE] = 0.9
    """The strata reach from the grid's second noise level over this share of its steps."""
    from_noise: bool = False
    """Do the strata begin at noise level 1 instead, as released for PickScore?"""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    """Of the squared errors, as in `matching_loss`, by the released names; `t2` is `t**2`."""
    ghuber_power: Annotated[float, Range(0.01, most=1)] = 0.25
    """p of `ghuber`, (M^p - 1e-10^p) / p, as released; 1/2 is twice `huber`, 1 is `t`."""
    ref_coef: Annotated[float, AT_LEAST_0] = 0.001
    """Of the squared distance to the reference's velocity; 0.003 for OCR, 1e-4 for PickScore."""
    ema_coef: Annotated[float, AT_LEAST_0] = 1.0
    """Of the squared distance to the velocity of a copy that trails the weights."""
    kl_weight: Literal["uniform", "elbo"] = "uniform"
    """Of ref_coef at a noise level, as released: `elbo` is 1 / (2 g^2), g of Flow-GRPO's SDE."""
    kl_ema_weight: Literal["uniform", "elbo"] = "uniform"
    """The same of ema_coef."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ghuber_power != 0.25 and self.weighting != "ghuber":
            raise ValueError(f"ghuber_power: got {self.ghuber_power}, expected weighting 'ghuber'")
        for name, of in (("kl_weight", "ref_coef"), ("kl_ema_weight", "ema_coef")):
            if getattr(self, name) == "elbo" and getattr(self, of) == 0:
                raise ValueError(f"{name}: got 'elbo', but {of} is 0; expected one above")

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        return {"ema": lambda n: min(0.3, 0.001 * n), "old": lambda n: 0.0}

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, steps, count = rollout.Plan(), self.num_inference_steps, self.num_train_timesteps
        sigmas, chance = grid(steps).tolist(), shared_random(seed, iteration)
        first, last = int(not self.from_noise), max(1, int(steps * self.timestep_fraction))
        bounds = [first + (last - first) * i // count for i in range(count + 1)]
        for member in range(self.group_size):
            node = plan.root(member)
            for sigma, following in pairwise(self.path(sigmas)):
                if self.noise_level > 0 and 0.3 <= sigma <= 0.9:
                    node = plan.draw(node, following, "flow_sde", self.noise_level, member)
                else:
                    node = plan.step(node, following, self.solver_order)
            leaf = plan.leaf(node)
            for low, high in pairwise(bounds):
                plan.match(leaf, sigmas[chance.randrange(low, max(high, low + 1))])
        return plan

    def objective(self, guidance: rollout.Guidance | None) -> rl.Matching:
        old = None if self.updates_per_rollout == 1 else "old"  # one is on policy, as released
        pulls = self.ref_coef, "ema", self.ema_coef, self.kl_weight, self.kl_ema_weight
        return rl.Matching("awm", self.weighting, self.ghuber_power, 1.0, old, *pulls)
