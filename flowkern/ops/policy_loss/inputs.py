"""What the policy loss takes: the one list of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flowkern.ops._common.arguments import Noise


class PolicyInputs(NamedTuple):
    """The arguments of `flowkern.policy_loss`, in their order, but for backend.

    As implementations take them, once they are checked. B samples, R velocity rows.
    """

    velocity: Tensor  # (R, *D)
    x_t: Tensor  # (R, *D)
    x_next: Tensor | None  # (B, *D); None: drawn again
    c_rows: Tensor  # (B, columns), or (columns,) for all; its dtype is that of the arithmetic
    advantage: Tensor  # (B,)
    row: Tensor | None  # (B,) int64
    old_velocity: Tensor | None  # (R, *D)
    old_log_prob: Tensor | None  # (B,)
    noise: Tensor | None  # (B, *D), or else what follows, where x_next is None
    seed: int | None
    sample_id: Tensor | None  # (B,) int64
    step: int | Tensor | None  # or (B,) int64
    velocity_uncond: Tensor | None  # (R, *D)
    guidance_scale: float
    velocity_ref: Tensor | None  # (R, *D)
    kl_coef: float | Tensor  # or (B,)
    step_weight: Tensor | None  # (B,)
    clip_low: float
    clip_high: float
    ratio: str  # "sde" | "guard"
    reduction: str  # "mean" | "sum" | "none"

    @property
    def source(self) -> Noise:
        return Noise.of(self.noise, self.seed, self.sample_id, self.step)

    @property
    def has_kl(self) -> bool:
        return isinstance(self.kl_coef, Tensor) or self.kl_coef != 0
