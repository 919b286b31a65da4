"""Group matching objectives: what an image learns depends on all that it is compared with.

A group is what is compared at one noise level, and lies in one batch, so its sums are sums over
rows of that batch. Velocities are asked for once; `matching_loss` passes over them twice: without
gradient for the statistics that the group is weighed by, then with what each image weighs as its
advantage.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.ops.matching_loss import MatchingLoss, matching_loss
from flowkern.rl.objectives import Matching, Outcome, of_choices, statistics_of
from flowkern.rollout.batches import PointBatch
from flowkern.rollout.engine import Velocity

Velocities = Mapping[str, Tensor]
"""(B, *D) of anchors, without those that equal the weights."""


class Weighed(NamedTuple):
    """(B,) each, detached."""

    advantage: Tensor
    """What the gradient of the mean squared error is multiplied with."""
    said: MatchingLoss
    """The velocity compared with the old one."""


@dataclass(frozen=True)
class GroupMatching(Matching):
    """The squared error d of each image's velocity, weighed by its group.

    objective, weighting: those of `matching_loss` whose log-likelihood is -d.
    """

    @property
    def compares(self) -> bool:
        return True

    @abstractmethod
    def weigh(self, batch: PointBatch, v: Tensor, others: Velocities) -> Weighed:
        """What every image weighs, of the detached velocity (B, *D)."""

    def __call__(
        self, batch: PointBatch, velocity: Velocity, anchors: Mapping[str, Velocity]
    ) -> Outcome:
        x_t, others = self.answers(batch, velocity, anchors)
        v = velocity(x_t, batch.sigma, batch.prompt, batch.on_host)
        with torch.no_grad():
            advantage, said = self.weigh(batch, v.detach(), others)
        more = {"velocity_ref": others.get(self.pulls_to) if self.ref_coef > 0 else None}
        more["ref_coef"] = of_choices(self.ref_coef, batch)
        out = self.matched(batch, v, advantage, reduction="sum", **more)
        found = statistics_of(said.ratio, said.clipped_high, said.clipped_low, out.ref)
        return Outcome(out.loss, found)

    def matched(
        self, batch: PointBatch, v: Tensor, advantage: Tensor | None = None, **more
    ) -> MatchingLoss:
        """`matching_loss` of the batch's points."""
        advantage = batch.advantage if advantage is None else advantage
        how = {"objective": self.objective, "weighting": self.weighting, "reduction": "none"}
        points = batch.x0, batch.sigma, advantage
        return matching_loss(v, *points, backend=self.backend, **how | more, **batch.key)


def total(value: Tensor, group: Tensor) -> Tensor:
    """(B,): of each row the sum over its group, (B,) numbers; in one order of adding, always."""
    return ((group[:, None] == group) * value).sum(1)


def centred(value: Tensor, group: Tensor) -> Tensor:
    """(B,), less the mean of its group."""
    return value - total(value, group) / total(torch.ones_like(value), group)


@dataclass(frozen=True)
class GroupPreference(GroupMatching):
    """DGPO: -log sigmoid(-s) with s = beta_dpo / group_size sum(A (d - d_against)) over the group,
    over beta_dpo / group_size; so A d with the weight sigmoid(s). An image beyond the clip range,
    by exp(d_old - d), has no gradient.
    """

    beta_dpo: float = 100.0
    group_size: int = 16
    against: str = "reference"
    """The weights that d_against is of."""

    @property
    def anchors(self) -> tuple[str, ...]:
        names = self.old, self.against, "reference" if self.ref_coef > 0 else None
        return tuple(dict.fromkeys(name for name in names if name))

    def weigh(self, batch: PointBatch, v: Tensor, others: Velocities) -> Weighed:
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        said = self.matched(batch, v, old_velocity=others.get(self.old), **clip)
        farther = -self.matched(batch, v, old_velocity=others.get(self.against)).log_ratio
        per_image = self.beta_dpo / self.group_size * batch.advantage * farther
        weight = total(per_image, batch.group).sigmoid()
        advantage = (weight * batch.advantage).masked_fill(said.clipped_low | said.clipped_high, 0)
        return Weighed(advantage, said)


@dataclass(frozen=True)
class CenteredReward(GroupMatching):
    """CRD: limit / crd_beta (crd_beta r - R)^2, where r = l_old - l is the implicit reward and R =
    (1 + A) / 2 the reward, both less the mean of their group; that of r has no gradient. l is d,
    or d over the detached mean absolute error.
    """

    crd_beta: float = 1.0
    adaptive_logp: bool = True
    limit: float = 5.0
    """What advantages were clamped at, before they were divided by it."""

    @property
    def needs_all(self) -> bool:
        return True  # an image of the mean reward pulls its implicit reward to the mean

    def weigh(self, batch: PointBatch, v: Tensor, others: Velocities) -> Weighed:
        old = others.get(self.old)
        said = self.matched(batch, v, old_velocity=old)
        implicit, per_error = said.log_ratio, 1.0
        if self.adaptive_logp:
            scaled = self._scaled(batch, v)
            implicit = (scaled if old is None else self._scaled(batch, old)) - scaled
            per_error = torch.where(said.matching > 0, scaled / said.matching, 0.0)
        reward = (0.5 + 0.5 * batch.advantage).clamp(0, 1)
        short = centred(reward, batch.group) - self.crd_beta * centred(implicit, batch.group)
        said = said._replace(ratio=torch.ones_like(said.ratio))  # nothing is clipped by it
        return Weighed(2 * self.limit * short * per_error, said)

    def _scaled(self, batch: PointBatch, v: Tensor) -> Tensor:
        """(B,): mean squared error over mean absolute error, as NFT weighs what it goes towards."""
        all_of_it = torch.ones_like(batch.advantage)
        how = {"objective": "nft", "weighting": "adaptive"}
        return self.matched(batch, v, all_of_it, **how).matching / batch.sigma
