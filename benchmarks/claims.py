"""docs/claims.md: the papers' headlines beside what was measured here.

    python benchmarks/claims.py

Headlines and their sources are those of claims.md.jinja, a line each, which says what they are held
to: the runs of benchmarks/algorithms.py and benchmarks/agent.py, from their JSON alone, or plans,
counted as `flowkern cost` does. What was not run yet says so.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import harness
from algorithm_runs import JUDGED
from jinja2 import Environment, StrictUndefined
from plot_algorithms import LEVELS, by_name, column, common_level, to_reach

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE, PAGE = ROOT / "benchmarks/claims.md.jinja", ROOT / "docs/claims.md"
RUNS = ROOT / "benchmarks/results/intel-xeon-processor-2-threads/algorithms.json"
PLANNERS = ROOT / "benchmarks/results/agent"
ENOUGH = 0.8  # of what is claimed beyond nothing: reproduced
DRIFT = 1.05  # times the base's distance: none
COUNTED = range(12, 300, 25)  # windows move every 25 of the papers' 300 rollouts
YES, PART, MEAN, NO = "reproduces", "in direction only", "in the mean only", "does not"
UNTOLD, UNASKED = "cannot be told", "cannot be asked"
OPEN, LATER = "not asked", "not measured yet"
SEVERAL = {YES: "reproduce", NO: "do not"}
"""As it is said of several headlines."""
Verdict = tuple[str, str]
"""What was measured, and what that makes of the headline."""
Runs = list[dict]


class Claims:
    """The cells of a line behind its headline; `verdicts` has them by algorithm."""

    def __init__(self, result: dict, planners: dict[str, list[dict]]) -> None:
        self.result, self.planners = result, planners
        self.by_name = by_name(result["runs"])
        self.verdicts: list[tuple[str, str]] = []

    def line(self, name: str, found: Verdict, cost: tuple[str, str, str], why: str = "") -> str:
        self.verdicts.append((name, found[1]))
        return " | ".join((found[0], *cost, found[1] + (f": {why}" if why else "")))

    def runs(
        self, measure: Callable[..., Verdict], name: str, other: str | None = None,
        claimed: float | None = None, why: str = "",
    ) -> str:  # fmt: skip
        """Runs of one algorithm, or beside another's."""
        groups = [self.by_name.get(one, []) for one in (name, other) if one]
        if not all(groups):
            return self.line(name, ("", LATER), ("", "", "A"))
        seeds = "/".join(dict.fromkeys(str(len(runs)) for runs in groups))
        keys = "forward_equivalents", "seconds"
        costs = [[mean(ends(runs, key)) for key in keys] for runs in groups]
        cost = "; ".join(f"{count / 1000:.0f}k, {seconds:.0f} s" for count, seconds in costs)
        return self.line(name, measure(*groups, claimed), (seeds, cost, "A"), why)

    def cheaper(self, name: str, other: str, claimed: float, why: str = "") -> str:
        """An iteration with the papers' number of steps, by count and in seconds."""
        costs = {cost["name"]: cost for cost in self.result.get("iterations", [])}
        if not costs.keys() >= {name, other}:
            return self.line(name, ("", LATER), ("", "", "B"))
        keys, pair = ("forward_equivalents_run", "seconds"), (costs[name], costs[other])
        saved = [1 - pair[0][key] / pair[1][key] for key in keys]
        text = f"{percent(saved[0])} less by count, {percent(saved[1])} less time"
        cost = "; ".join(f"{one[keys[0]] / 1000:.1f}k, {one[keys[1]]:.1f} s" for one in pair)
        return self.line(name, (text, judged(min(saved), claimed)), ("1", cost, "B"), why)

    def counted(
        self, name: str, other: str, claimed: float | None = None, why: str = "",
        is_factor: bool = False, loops: bool = False,
        ours: dict | None = None, theirs: dict | None = None,
    ) -> str:  # fmt: skip
        """What an image takes at the papers' settings; loops: in the released loops, too."""
        texts, gains = [], []
        for is_released in (False, True)[: 1 + loops]:
            us = per_image(name, ours or {}, is_released)
            them = per_image(other, theirs or {}, is_released)
            texts.append(f"{us:.1f} against {them:.1f}, {percent(1 - us / them)} less")
            gains.append(them / us - 1 if is_factor else 1 - us / them)
            texts[-1] += f" ({them / us:.1f} times)" if not loops else ""
        verdict = judged(min(gains), claimed and claimed - is_factor)
        found = "; released ".join(texts), verdict
        return self.line(name, found, ("", "", "C"), why)

    def planner(self, changed: str, claimed: str | None = None) -> str:
        """The demo before and after, or beside what was changed in it."""
        seeds, demo = self.planners[changed], self.planners["main"]
        first, last, best = (
            [run["evaluations"][i]["eval/success"] for run in runs]
            for runs, i in ((seeds, 0), (seeds, -1), (demo[: len(seeds)], -1))
        )
        low, verb = (first, "to") if changed == "main" else (last, "in place of")
        text = f"right answers {spread(low)} {verb} {spread(best)}"
        verdict = (text, UNASKED if claimed else judged(min(best) - max(low), None))
        spent = f"{mean(run['seconds_of_training'] for run in seeds):.0f} s"
        return self.line("agentflow", verdict, (str(len(seeds)), spent, "D"), claimed or "")

    def open(self, name: str, why: str) -> str:
        return self.line(name, ("", OPEN), ("", "", ""), why)

    def summary(self) -> str:
        counts = Counter(verdict for _, verdict in self.verdicts)
        order = (YES, PART, MEAN, NO, UNTOLD, UNASKED, OPEN, LATER)
        found = [(verdict, counts[verdict]) for verdict in order if counts[verdict]]
        return ", ".join(
            f"{n} {verdict if n == 1 else SEVERAL.get(verdict, verdict)}" for verdict, n in found
        )


def judged(got: float, claimed: float | None, is_ahead: bool = True) -> str:
    """Of what was got, where 0 is nothing; `is_ahead`: with each seed. No number claimed: None."""
    if got <= 0:
        return NO
    return MEAN if not is_ahead else PART if got < ENOUGH * (claimed or 0) else YES


def faster(us: Runs, them: Runs, claimed: float | None) -> Verdict:
    """What both take to the highest reward that all their seeds pass."""
    if (level := common_level(us, them)) is None:
        return f"they share no level of reward from {share(LEVELS[0], 2)} on", UNTOLD
    keys = "forward_equivalents", "seconds"
    ours, theirs = ([[to_reach(run, level, key) for run in g] for key in keys] for g in (us, them))
    factors = [mean(b) / mean(a) for a, b in zip(ours, theirs, strict=True)]
    counts = " against ".join(f"{mean(taken[0]) / 1000:.0f}k" for taken in (ours, theirs))
    text = f"to {share(level, 2)}: {factors[0]:.1f} times by count ({counts}), "
    text += f"{factors[1]:.1f} in time"
    return text, judged(factors[0] - 1, claimed and claimed - 1, max(ours[0]) < min(theirs[0]))


def higher(us: Runs, them: Runs, _: None) -> Verdict:
    """Rewards at the end of an equal budget."""
    ours, theirs = ends(us, "reward"), ends(them, "reward")
    text = f"reward {spread(ours)} against {spread(theirs)}"
    return text, judged(mean(ours) - mean(theirs), None, min(ours) > max(theirs))


def as_high(us: Runs, them: Runs, _: None) -> Verdict:
    """The same, where it is enough that the seeds overlap."""
    text, _ = higher(us, them, None)
    return text, YES if max(ends(us, "reward")) >= min(ends(them, "reward")) else NO


def holds(us: Runs, them: Runs, _: None) -> Verdict:
    """Distances to real images at the end, where the reward is no lower."""
    ours, theirs = ends(us, "distance"), ends(them, "distance")
    rewards = [mean(ends(runs, "reward")) for runs in (us, them)]
    verdict = judged(mean(theirs) - mean(ours), None, max(ours) < min(theirs))
    text = f"distance {spread(ours, 2)} against {spread(theirs, 2)}, "
    text += f"at reward {share(rewards[0])} against {share(rewards[1])}"
    return text, UNTOLD if rewards[0] < rewards[1] and verdict != NO else verdict


def gains(us: Runs, is_unasked: bool | None) -> Verdict:
    """From the untrained model to the end: does the judge follow, and do the images drift?"""
    start, judge, reward, distance = (us[0]["curve"][0], *(ends(us, key) for key in SCORES))
    text = f"reward {share(start['reward'])} to {spread(reward)}, judge {share(start['judge'])} to "
    text += f"{spread(judge)}, distance {start['distance']:.2f} to {spread(distance, 2)}"
    followed = mean(judge) - start["judge"] - JUDGED * (mean(reward) - start["reward"])
    is_kept = followed >= 0 and mean(distance) <= DRIFT * start["distance"]
    return text, UNASKED if is_unasked else YES if is_kept else NO


SCORES = "judge", "reward", "distance"
MEASURES = {measure.__name__: measure for measure in (faster, higher, as_high, holds, gains)}


def ends(runs: Runs, key: str) -> list[float]:
    return [column(run, key)[-1] for run in runs]


def share(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def spread(values: list[float], digits: int = 3) -> str:
    """A mean, and the range over seeds."""
    found = [share(value, digits) for value in (mean(values), min(values), max(values))]
    return found[0] if len(values) == 1 else f"{found[0]} ({found[1]} to {found[2]})"


def per_image(name: str, options: dict, is_released: bool) -> float:
    """Forward-equivalents of an image that is rewarded, guidance and copies of the weights too."""
    from flowkern.rl.algorithms import flow_recipe
    from flowkern.rl.cost import network_calls
    from flowkern.rl.plans import cost_of, plans_of
    from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

    recipe, calls, images = flow_recipe(name)(**options), 0.0, 0.0
    for i in COUNTED:
        ours = cost_of(plans_of(recipe, sd3_sigmas, i, 0))
        cost = recipe.released(i, 0) if is_released else ours
        sample, updates = network_calls(recipe, cost, i)
        calls += sample + sum(updates) + 2 * recipe.prompts_per_rollout * cost.train
        images += recipe.prompts_per_rollout * cost.images
    return calls / images


def page(claims: Claims) -> str:
    made = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = made.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        claims=claims, enough=ENOUGH, judged=JUDGED, drift=DRIFT, **claims.result, **MEASURES
    )


def recorded() -> Claims:
    names = "main", "final_turn"
    seeds = {name: harness.recorded(PLANNERS / f"{name}.json", "seeds")["seeds"] for name in names}
    return Claims(
        harness.recorded(RUNS, "runs", "settings", "machine", "seconds", "iterations"), seeds
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(page(recorded()), encoding="utf-8")
