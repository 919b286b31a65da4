"""The options of validations: how they are drawn, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from flowkern.checks import ABOVE_0, AT_LEAST_0, count
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


def require_judges(options: Judged, is_validated: bool, reward: Rewards) -> None:
    """Raise ValueError for figures that no validation has, and for an optimized one as a judge."""
    asked = {"metric": [options.metric] if options.metric else [], "collapse": options.collapse}
    for key, name in ((key, name) for key, names in asked.items() for name in names or ()):
        if not is_validated:
            raise ValueError(
                f"validation.{key}: got {name}, but data.test_prompts is null: there is no "
                "validation"
            )
        one = name.removeprefix("reward/")
        known = [*reward.root, "mean"]
        if one != name and one not in known:
            there = ", ".join(f"reward/{one}" for one in known)
            raise ValueError(f"validation.{key}: got {name}, expected one of {there}, or another")
        if key == "collapse" and one in (*reward.weights, "mean"):
            raise ValueError(
                f"validation.collapse: got {name}, which is optimized; expected a judge, a reward "
                "with weight 0, or another figure"
            )
