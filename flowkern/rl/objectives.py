"""Objectives: from velocity functions and a batch of a rollout to a loss.

R rows of the network, B choices (B >= R where siblings share a row), *D one latent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowkern.ops.matching_loss import add_noise, matching_loss
from flowkern.ops.policy_loss import PolicyLoss, policy_loss
from flowkern.rollout.batches import PointBatch, StepBatch
from flowkern.rollout.engine import Guidance, Velocity, guided

TOLERATED = 0.25
"""Of the clip range: in other batches than sampling's, rounding may take this much of it."""


def least_clipped(low: float, high: float) -> float:
    """The least |log ratio| that is clipped, on either side."""
    return min(-math.log1p(-low) if low < 1 else math.inf, math.log1p(high))


LOG_RATIO, OFF = "replay/log_ratio", "replay/off"
"""Of the first update of a rollout: mean |log ratio|, and the share beyond what is tolerated."""


class Parts(NamedTuple):
    """Means over some of a batch's choices."""

    names: tuple[str, ...]
    pairs: Tensor
    """(names, 2): sum and how many, detached."""


@dataclass(frozen=True)
class Outcome:
    """What an objective says of B choices."""

    loss: Tensor
    """Summed over them, differentiable."""
    statistics: Mapping[str, Tensor]
    """(B,) each, detached, by the name that their mean is reported under."""
    parts: Sequence[Parts] = ()
    """Of some of them: the same names in every batch of an optimizer step's, on every rank."""

    def nothing(self) -> Outcome:
        """Of no choice, for a call of the network that is made because other processes make one:
        wrappers see its gradient, which is zero."""
        parts = [Parts(part.names, torch.zeros_like(part.pairs)) for part in self.parts]
        return Outcome(self.loss * 0, {n: x[:0] for n, x in self.statistics.items()}, parts)


def statistics_of(ratio: Tensor, higher: Tensor, lower: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """Of every objective of this room, in the order of a record."""
    clipped = {"pg_clipfrac_higher": higher, "pg_clipfrac_lower": lower}
    return {"ratio_mean": ratio, **clipped, "kl": kl}


class Objective(Protocol):
    """A loss with what it needs beside the velocity that learns."""

    @property
    def anchors(self) -> tuple[str, ...]:
        """Other weights whose velocity is needed, without gradient: "reference", or a copy's."""
        ...

    def calls(self, is_on_policy: bool = False, current: Collection[str] = ()) -> int:
        """Of the network for each site, those of the anchors and of guidance included.

        is_on_policy: with the weights that sampled, and what sampling kept. current: the copies
        that are known to equal the weights, and are left out.
        """
        ...

    @property
    def together(self) -> int:
        """Of those, how many are of one batch."""
        ...

    @property
    def keeps_uncond(self) -> bool:
        """Does it take the unconditional half of guidance from the rollout, on policy?"""
        ...

    @property
    def needs_all(self) -> bool:
        """Does a site whose advantages are zero still teach something?"""
        ...

    @property
    def compares(self) -> bool:
        """Does what a site learns depend on the others of its group, so that they have to be in
        one batch?"""
        ...

    def __call__(self, batch: Any, velocity: Velocity, anchors: Mapping[str, Velocity]) -> Outcome:
        """The summed loss of a batch, with the statistics of its choices.

        anchors: of the names in `anchors`; a copy that equals the weights may be left out.
        """
        ...


@dataclass(frozen=True)
class RatioClip:
    """The clipped likelihood ratio of drawn edges, with a KL to an anchor where kl_coef > 0."""

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0
    """Of a choice, times its weight where credit gives one."""
    ratio: str = "sde"
    """ "sde" | "guard", as in `policy_loss`."""
    guidance: Guidance | None = None
    uncond_gradient: bool = False
    """Does the unconditional half of guidance learn too?"""
    backend: str | None = None
    anchor: str = "reference"
    """The weights that the KL is to: the reference, or a copy."""

    def least_clipped(self, elements: int) -> float:
        """The least |log ratio| that may be clipped, of latents of so many elements."""
        return least_clipped(self.clip_low, self.clip_high)

    @property
    def bound(self) -> str:
        """What `least_clipped` is of, in words."""
        return "the clip range"

    @property
    def anchors(self) -> tuple[str, ...]:
        return (self.anchor,) if self.kl_coef > 0 else ()

    def calls(self, is_on_policy: bool = False, current: Collection[str] = ()) -> int:
        own, theirs = (1 if g is None else 2 for g in (self.guidance, self.anchor_guidance))
        anchors = len({*self.anchors} - {*current})
        return own + theirs * anchors - (is_on_policy and self.keeps_uncond)

    @property
    def anchor_guidance(self) -> Guidance | None:
        """Of the anchor's velocity."""
        return self.guidance

    @property
    def together(self) -> int:
        return 1 if self.guidance is None or not self.uncond_gradient else 2

    @property
    def compares(self) -> bool:
        return False

    @property
    def keeps_uncond(self) -> bool:
        return self.guidance is not None and not self.uncond_gradient

    @property
    def needs_all(self) -> bool:
        return self.kl_coef > 0

    def __call__(
        self, batch: StepBatch, velocity: Velocity, anchors: Mapping[str, Velocity]
    ) -> Outcome:
        """Where the unconditional half of guidance has no gradient it is run without, or is what
        sampling kept. To an anchor that equals the weights the KL is 0, and so is its gradient.
        """
        more: dict[str, Any] = {"step_weight": batch.weight}
        if self.anchors and self.anchor in anchors:
            more["velocity_ref"] = self.said_by(anchors[self.anchor], batch)
            more["kl_coef"] = of_choices(self.kl_coef, batch)
        v, guide = self.ask(velocity, batch, batch.uncond)
        out = self._loss(batch, v, batch.old_velocity, **guide, **more)
        statistics = statistics_of(out.ratio, out.clipped_high, out.clipped_low, out.kl)
        return Outcome(out.loss, statistics, self.replayed(batch, v, guide))

    @torch.no_grad()
    def said_by(self, anchor: Velocity, batch: StepBatch) -> Tensor:
        """(R, *D): the velocity of an anchor, guided."""
        v, guide = replace(self, guidance=self.anchor_guidance).ask(anchor, batch, None)
        return guided(v, **guide)

    def _loss(
        self, batch: StepBatch, velocity: Tensor, old_velocity: Tensor | None, **more: Any
    ) -> PolicyLoss:
        """The clipped ratio of a velocity to an old one, on the steps of a batch."""
        return policy_loss(
            velocity,
            batch.x_t,
            batch.x_next,
            batch.coefficients,
            batch.advantage,
            row=batch.row,
            old_velocity=old_velocity,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio=self.ratio,
            reduction="sum",
            backend=self.backend,
            **more,
            **(batch.key if batch.x_next is None else {}),
        )

    @torch.no_grad()
    def replayed(
        self, batch: StepBatch, velocity: Tensor, guide: Mapping[str, Any]
    ) -> Sequence[Parts]:
        """Where the weights are those that sampled: |log ratio| to what sampling said, whose ratio
        would be 1, and the share that is not close enough."""
        if batch.sampled is None:
            return ()
        guide = {name: value for name, value in guide.items() if name != "uncond_gradient"}
        out = self._loss(batch, velocity, batch.sampled, **guide)
        size = out.ratio.float().log().abs()
        off = ~(size <= TOLERATED * self.least_clipped(velocity[0].numel()))
        sums = torch.stack([size.sum(), off.sum().to(size)])
        return [Parts((LOG_RATIO, OFF), torch.stack([sums, torch.full_like(sums, len(size))], 1))]

    def ask(
        self, velocity: Velocity, batch: StepBatch, uncond: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """A velocity with the guidance arguments of a step, which are none without guidance.

        uncond: (R, *D), the unconditional half where it is known.
        """
        where, on_host = (batch.x_t, batch.sigma), batch.on_host
        if self.guidance is None:
            return velocity(*where, batch.prompt, on_host), {}
        no_prompt = torch.full_like(batch.prompt, self.guidance.uncond)
        if self.uncond_gradient and torch.is_grad_enabled():  # in one call, as wrappers need it
            both = torch.cat([batch.prompt, no_prompt])
            twice = (torch.cat([x, x]) for x in where)
            v, uncond = velocity(*twice, both, on_host.twice(self.guidance.uncond)).chunk(2)
            v, guide = self.guidance.combined(v, uncond, batch.sigma)
            return v, guide | ({"uncond_gradient": True} if guide else {})
        if uncond is None:
            with torch.no_grad():
                uncond = velocity(*where, no_prompt, on_host.without_prompt(self.guidance.uncond))
        v = velocity(*where, batch.prompt, on_host)
        return self.guidance.combined(v, uncond, batch.sigma)


@dataclass(frozen=True)
class Matching:
    """Advantage-weighted matching of the forward process over the leaves; see `matching_loss`.

    The statistic "kl" is the mean squared distance to the reference velocity. The weights learn
    without guidance, whatever sampling has.
    """

    objective: str
    """ "awm" | "nft"."""
    weighting: str | None = None
    """As `matching_loss` has them, with its default; as these two."""
    ghuber_power: float = 0.25
    nft_beta: float = 1.0
    old: str | None = None
    """The copy of the weights that is the old policy; None: the current ones, detached."""
    ref_coef: float = 0.0
    ema: str | None = None
    """The copy of the weights that ema_coef pulls to."""
    ema_coef: float = 0.0
    kl_weight: str = "uniform"
    """ "uniform" | "elbo": of ref_coef at a noise level. kl_ema_weight: of ema_coef."""
    kl_ema_weight: str = "uniform"
    clip_low: float = 1.0
    clip_high: float = 1.0
    backend: str | None = None
    ref_guidance: Guidance | None = None
    """Of the reference's velocity that ref_coef pulls to; the weights themselves have none."""

    @property
    def anchors(self) -> tuple[str, ...]:
        reference = "reference" if self.ref_coef > 0 else None
        ema = self.ema if self.ema_coef > 0 else None
        return tuple(dict.fromkeys(name for name in (self.old, reference, ema) if name))

    @property
    def pulls_to(self) -> str:
        """Among the answers, what ref_coef is of."""
        return "reference" if self.ref_guidance is None else "guided reference"

    def calls(self, is_on_policy: bool = False, current: Collection[str] = ()) -> int:
        asked = 1 + len({*self.anchors} - {*current})
        if self.ref_guidance is None or not self.ref_coef:
            return asked
        return asked + (2 if "reference" in current else 1)

    @property
    def together(self) -> int:
        return 1

    @property
    def keeps_uncond(self) -> bool:
        return False

    @property
    def compares(self) -> bool:
        return False

    @property
    def needs_all(self) -> bool:
        # Two opposite pulls, and not none, are what nft makes of an advantage of zero.
        return self.objective == "nft" or self.ref_coef > 0 or self.ema_coef > 0

    def __call__(
        self, batch: PointBatch, velocity: Velocity, anchors: Mapping[str, Velocity]
    ) -> Outcome:
        x_t, v = self.answers(batch, velocity, anchors)
        ref, ema = self.ref_coef, self.ema_coef if self.ema in v else 0.0
        out = matching_loss(
            velocity(x_t, batch.sigma, batch.prompt, batch.on_host),
            batch.x0,
            batch.sigma,
            batch.advantage,
            objective=self.objective,
            weighting=self.weighting,
            ghuber_power=self.ghuber_power,
            nft_beta=self.nft_beta,
            old_velocity=v.get(self.old),
            velocity_ref=v.get(self.pulls_to),
            velocity_ema=v.get(self.ema) if self.ema_coef > 0 else None,
            ref_coef=of_choices(_at(batch.sigma, ref, self.kl_weight), batch),
            ema_coef=_at(batch.sigma, ema, self.kl_ema_weight),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            reduction="sum",
            backend=self.backend,
            **batch.key,
        )
        return Outcome(
            out.loss, statistics_of(out.ratio, out.clipped_high, out.clipped_low, out.ref)
        )

    @torch.no_grad()
    def answers(
        self, batch: PointBatch, velocity: Velocity, anchors: Mapping[str, Velocity]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The noised images (B, *D), and what the anchors say of them, without gradient."""
        x_t = add_noise(batch.x0, batch.sigma, **batch.key, backend=self.backend)
        where = x_t, batch.sigma, batch.prompt, batch.on_host
        found = {n: ask(*where) for n, ask in anchors.items() if n in self.anchors}
        if self.ref_guidance is not None and self.ref_coef > 0:
            ask = anchors.get("reference", velocity)  # left out, it equals the weights
            v = found["reference"] if "reference" in found else ask(*where)
            found[self.pulls_to] = self._guided(ask, v, x_t, batch)
        return x_t, found

    def _guided(self, ask: Velocity, v: Tensor, x_t: Tensor, batch: PointBatch) -> Tensor:
        """v: (B, *D), the conditional half."""
        none, on_host = self.ref_guidance.uncond, batch.on_host
        no_prompt = torch.full_like(batch.prompt, none)
        uncond = ask(x_t, batch.sigma, no_prompt, on_host.without_prompt(none))
        v, guide = self.ref_guidance.combined(v, uncond, batch.sigma)
        return guided(v, **guide)


def of_choices(coefficient: float | Tensor, batch: StepBatch | PointBatch) -> float | Tensor:
    """That of a KL, (B,) where credit weighs the choices, and 0.0 where there is none."""
    is_none = isinstance(coefficient, float | int) and not coefficient
    return coefficient if is_none or batch.kl_weight is None else coefficient * batch.kl_weight


def _at(sigma: Tensor, coefficient: float, weight: str) -> float | Tensor:
    """An anchor's coefficient, of each noise level where it is "elbo": over 2 std^2, with AWM's
    std = .7 sqrt(sigma / (1 - min(sigma, .99)))."""
    if weight == "uniform" or not coefficient:
        return coefficient
    return coefficient * (1 - sigma.clamp(max=0.99)) / (2 * 0.7**2 * sigma)


def by_level(out: Outcome, sigma: Tensor, levels: Mapping[float, Tensor]) -> Parts:
    """ratio_mean and pg_clipfrac at each noise level.

    sigma: (B,), of the choices. levels: as they are on the device, by what they are called.
    """
    there = torch.stack([*levels.values()])
    found = out.statistics
    clipped = found["pg_clipfrac_higher"].float() + found["pg_clipfrac_lower"]
    is_at = there[:, None] == sigma
    values = torch.stack([found["ratio_mean"].float(), clipped])
    sums = torch.where(is_at, values[:, None], 0.0).sum(2).flatten()
    count = is_at.sum(1).to(sums).repeat(2)
    names = [f"{name}/{level:.3f}" for name in ("ratio_mean", "pg_clipfrac") for level in levels]
    return Parts(tuple(names), torch.stack([sums, count], 1))
