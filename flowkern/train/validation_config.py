"""The options of validations: how they are drawn, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from flowkern.checks import ABOVE_0, AT_LEAST_0, count
from flowkern.lookup import nearest
from flowkern.rl.recipe import Levels
from flowkern.train.fields import Section, Text

if TYPE_CHECKING:
    from flowkern.train.config import Rewards


class Judged(Section):
    """What follows from a validation."""

    metric: Text | None = None
    """Of validation.jsonl, as reward/mean or reward/JUDGE: the checkpoint of its best validation is
    kept whatever train.checkpoints_total_limit says, and named in best.json."""
    mode: Literal["max", "min"] = "max"
    """Which of it is best."""
    patience: Annotated[int | None, ABOVE_0] = None
    """End the run after so many validations without a better one; None: at train.steps."""
    min_delta: Annotated[float, AT_LEAST_0] = 0.0
    """By how much better it has to be, to count for validation.patience."""
    collapse: dict[Text, float] | None = None
    """Of figures that nobody optimizes, how far each may fall from its best while reward/mean is
    above the first validation's, else the run stops: {reward/JUDGE: 0.1}. A negative number: how
    far it may rise, as of a distance."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, default in (("mode", "max"), ("patience", None), ("min_delta", 0.0)):
            if getattr(self, name) != default and self.metric is None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, which validation.metric=null ignores"
                )
        if self.min_delta and self.patience is None:
            raise ValueError(
                f"min_delta: got {self.min_delta}, which validation.patience=null ignores"
            )
        if self.collapse == {}:
            raise ValueError("collapse: got {}, expected {reward/JUDGE: HOW FAR}, or null")
        for name, margin in (self.collapse or {}).items():
            if not margin:
                raise ValueError(f"collapse: got 0 for {name}, expected how far it may fall")
        return self


class ValidationConfig(Judged):
    steps: Annotated[int, count(10_000_000)] = 100
    """Optimizer steps between validations; one is always made at the start and at the end."""
    num_prompts: Annotated[int, count(2**16)] = 20
    """How many of data.test_prompts, the first, one image each."""
    num_images: Annotated[int, count(1000)] = 20
    """How many of these are shown in samples/step-N.png."""
    num_inference_steps: Levels = 40
    """Steps of the deterministic sampler."""
    guidance_scale: Annotated[float, AT_LEAST_0] = 4.5
    """Classifier-free guidance; up to 1 is none."""


ANSWERED = (
    "eval/success",
    "eval/success_greedy",
    "eval/malformed",
    "turns/mean",
    "turns/lost",
    "tool/failed",
    "unanswered",
    "tokens/prompt",
    "tokens/response",
)
"""What a validation of a planner has beside rewards, and the first two of each kind of question."""


def require_judges(options: Judged, is_validated: bool, reward: Rewards, task: str) -> None:
    """Raise ValueError for figures that no validation has, and for an optimized one as a judge.

    task: of the recipe. The figures of "flow", of images, and of "planner" are known by name; of a
    task of one's own those of rewards alone are, and the first validation shows the others.
    """
    scores = [f"reward/{name}" for name in (*reward.root, "mean")]
    lost = ["failed_rewards", *(f"failed_rewards/{name}" for name in reward.root)]
    asked = {"metric": [options.metric] if options.metric else [], "collapse": options.collapse}
    for key, name in ((key, name) for key, names in asked.items() for name in names or ()):
        if not is_validated:
            raise ValueError(
                f"validation.{key}: got {name}, but data.test_prompts is null: there is no "
                "validation"
            )
        known = {"flow": [*scores, *lost], "planner": [*scores, *ANSWERED]}.get(task, scores)
        is_open = task not in ("flow", "planner") and not name.startswith("reward/")
        is_one = {"flow": _is_entry, "planner": _is_of_a_kind}.get(task)
        if not (is_open or name in known or (is_one is not None and is_one(name, reward))):
            near = nearest(name, known)
            hint = f"; did you mean {near}?" if near else ""
            there = {
                "flow": [*scores, "or info/REWARD/ENTRY"],
                "planner": [*known, "or eval/success/KIND"],
            }.get(task, [*scores, "or a figure that is no reward's"])
            raise ValueError(f"validation.{key}: got {name}, expected {', '.join(there)}{hint}")
        if key == "collapse" and name in [f"reward/{one}" for one in (*reward.weights, "mean")]:
            raise ValueError(
                f"validation.collapse: got {name}, which is optimized; expected a judge, a reward "
                "with weight 0, or another figure"
            )


def _is_of_a_kind(name: str, reward: Rewards) -> bool:
    """Of questions of one kind. Which kinds there are, the questions say."""
    return any(name.startswith(f"{of}/") for of in ANSWERED[:2])


def _is_entry(name: str, reward: Rewards) -> bool:
    """Of what a reward reports beside: info/REWARD/ENTRY. Which it has, its first call shows."""
    first, _, rest = name.partition("/")
    whose, _, entry = rest.partition("/")
    return first == "info" and whose in reward.root and bool(entry)
