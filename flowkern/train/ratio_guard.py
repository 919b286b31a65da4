"""The first update of a rollout is made by the weights that sampled: its ratio to what sampling
said is 1, or training sees another network than sampling did, and the clip range means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flowkern.rl.objectives import LOG_RATIO, OFF, TOLERATED
from flowkern.train.errors import RunError, describe

if TYPE_CHECKING:
    from flowkern.train.loop import Loop


class RatioGuard:
    """Looks at the figures of a first update, before the weights move."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._has_warned = loop, False

    def look(self, found: Mapping[str, float]) -> None:
        """Raises RunError, or says once, where the ratio is not 1; the same on every rank."""
        loop = self._loop
        if not found.get(OFF) or (self._has_warned and loop.config.train.ratio_guard == "warn"):
            return
        beyond = f"{found[OFF]:.0%} of its choices"
        said = (
            f"the first update's ratio is not 1: |log ratio| is {found[LOG_RATIO]:.3g} in the "
            f"mean, and beyond {TOLERATED:g} of {loop.task.objective.bound} for {beyond}; "
            f"{self._cause()}"
        )
        if loop.config.train.ratio_guard == "warn":
            self._has_warned = True
            loop.directory.say(f"step {loop.global_step + 1}: {said}", "warned")
            return
        raise RunError(f"{said}; train.ratio_guard=warn goes on")

    def _cause(self) -> str:
        """As doctor finds it."""
        from flowkern.train.doctor import diagnosis

        try:
            findings = diagnosis(self._loop)
        except Exception as error:  # what is wrong may be wrong there, too
            return f"doctor could not look: {describe(error)}"
        said = "; ".join(f"{one.cause}: {one.said}" for one in findings)
        return f"doctor: {said or 'nothing is off when it is asked again'}"
