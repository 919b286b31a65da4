"""Recipes whose samples part at some steps and share what comes before: one tree per prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from flowkern import rl, rollout
from flowkern.checks import count
from flowkern.rl.recipe import ShiftedRecipe


@dataclass(frozen=True, kw_only=True)
class TreeRecipe(ShiftedRecipe):
    """Trains the drawn steps of a tree, with `rl.DepthCredit`."""

    branch_factor: Annotated[int, count(4096, least=2)] = 2
    """Into how many a state splits, its samples shared out evenly; fewer where it has fewer."""

    def check_splits(self, option: str, splits: Collection[int]) -> None:
        """Raises ValueError where the samples of a group do not all part."""
        if (most := self.branch_factor ** len(splits)) < self.group_size:
            raise ValueError(
                f"{option}: got {len(splits)} splits into {self.branch_factor}, which make {most} "
                f"samples; expected enough for group_size, {self.group_size}"
            )

    def parts(self, splits: Collection[int]) -> list[list[range]]:
        """After every step, the samples of each state."""
        states, after = [range(self.group_size)], []
        for i in range(self.num_inference_steps):
            if i in splits:
                states = [part for state in states for part in split(state, self.branch_factor)]
            after.append(states)
        return after

    def tree(
        self, sigmas: list[float], splits: Collection[int], levels: Mapping[int, float]
    ) -> rollout.Plan:
        """levels: of the steps that are drawn, the noise level; splits are among them.

        A step is trained where there is something to compare: after the first split.
        """
        plan, made = self.empty_plan(), {}
        root, after = plan.root(0), self.parts(splits)
        firsts = [[part.start for part in states for _ in part] for states in after]
        for sample in range(self.group_size):
            node = root
            for i, sigma in enumerate(sigmas[1:]):
                first = firsts[i][sample]  # a state has the noise of the first of its samples
                if (i, first) not in made and i in levels:
                    sde, trained = (self.sde_type, levels[i], first), len(after[i]) > 1
                    made[i, first] = plan.draw(node, sigma, *sde, is_trained=trained)
                elif (i, first) not in made:
                    made[i, first] = plan.step(node, sigma)
                node = made[i, first]
            plan.leaf(node)
        return plan

    def credit(self) -> rl.DepthCredit:
        return self.group_credit(rl.DepthCredit, eps=1e-8, unbiased=True)


def split(samples: range, factor: int) -> list[range]:
    """Into parts that differ by one at most, none of them empty."""
    number = min(factor, len(samples))
    size, more = divmod(len(samples), number)
    starts = [samples.start + k * size + min(k, more) for k in range(number + 1)]
    return [range(a, b) for a, b in pairwise(starts)]
