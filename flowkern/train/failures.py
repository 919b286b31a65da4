"""Images that rewards could not score: how many of the last rollouts' a run goes on with."""

from __future__ import annotations

from collections.abc import Mapping

from flowkern.train.errors import RunError
from flowkern.train.metrics import Experience

ROLLOUTS = 10


class Failures:
    """Of the last `ROLLOUTS` rollouts, by their numbers: the same on every rank, and saved."""

    def __init__(self, most: float) -> None:
        """most: the share of their images that may be left out; before there are so many rollouts,
        of as many as those will have: one image of a run's first sixteen is no reason to stop."""
        self.most = most
        self._rollouts: dict[int, tuple[int, int]] = {}
        self._said: set[str] = set()

    def note(self, iteration: int, experience: Experience) -> list[str]:
        """A rollout, again where it is drawn again. Returns why rewards have no score of images, of
        each the first time. Raises RunError where too much is left out."""
        left_out, samples = experience.left_out, experience.samples
        rollouts = self._rollouts | {iteration: (left_out, samples)}
        self._rollouts = dict(sorted(rollouts.items())[-ROLLOUTS:])
        count, total = map(sum, zip(*self._rollouts.values(), strict=True))
        among = len(self._rollouts)
        whole = total * ROLLOUTS / among
        if left_out and left_out == samples:
            share = f"none of the {samples} {experience.unit} of a rollout has a score"
        elif count > self.most * whole:
            last = "rollout" if among == 1 else f"{among} rollouts"
            share = (
                f"{count} of the {total} {experience.unit} of the last {last} "
                f"{'has' if count == 1 else 'have'} no score, {count / whole:.1%} of what "
                f"{ROLLOUTS} rollouts draw, and train.max_failed_rewards is {self.most:g}"
            )
        else:
            new = [why for name, why in experience.reasons.items() if name not in self._said]
            self._said.update(experience.reasons)
            return new
        raise RunError("; ".join([share, *experience.reasons.values()]))

    def state_dict(self) -> dict[int, tuple[int, int]]:
        return self._rollouts

    def load_state_dict(self, state: Mapping[int, tuple[int, int]]) -> None:
        self._rollouts = dict(state)
