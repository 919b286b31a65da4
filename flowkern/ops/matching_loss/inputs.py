"""What the matching losses take: the one list of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flowkern.ops._common.arguments import Noise

# Of each objective; kernels take the index.
WEIGHTINGS = {"awm": ("uniform", "t", "ghuber", "t2", "huber"), "nft": ("adaptive", "uniform")}
GHUBER_POWER = 0.25  # the published one, of which kernels take roots


class MatchingInputs(NamedTuple):
    """The arguments of `flowkern.matching_loss`, in their order, but for backend.

    As implementations take them, once they are checked. B samples, R velocity rows.
    """

    velocity: Tensor  # (R, *D)
    x0: Tensor  # (B, *D)
    sigma: Tensor  # (B,), in the dtype of the arithmetic, as advantage
    advantage: Tensor  # (B,)
    row: Tensor | None  # (B,) int64
    noise: Tensor | None  # (B, *D), or else what follows
    seed: int | None
    sample_id: Tensor | None  # (B,) int64
    step: int | Tensor | None  # or (B,) int64
    objective: str  # "awm" | "nft"
    weighting: str  # of WEIGHTINGS
    ghuber_power: float
    nft_beta: float
    old_velocity: Tensor | None  # (R, *D)
    velocity_ref: Tensor | None  # (R, *D)
    velocity_ema: Tensor | None  # (R, *D)
    ref_coef: float | Tensor  # or (B,), as advantage
    ema_coef: float | Tensor
    clip_low: float
    clip_high: float
    reduction: str  # "mean" | "sum" | "none"

    @property
    def source(self) -> Noise:
        return Noise.of(self.noise, self.seed, self.sample_id, self.step)

    @property
    def mixes(self) -> bool:
        """Whether nft's velocities are mixed of the new and the old one."""
        return self.nft_beta != 1 and self.old_velocity is not None
