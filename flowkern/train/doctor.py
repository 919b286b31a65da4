"""What a configuration is, and whether training sees the velocities that sampling saw, before the
first update.

A clip range compares probabilities of one step under two versions of the weights. What differs for
another reason eats it up: so the first rollout is replayed, through the run's own objects, and the
log-ratios that come out are held against the clip range. A finding names what they come from.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowkern.checks import ConfigError
from flowkern.ops._common.dispatch import backends
from flowkern.rl.distillation import Distillation
from flowkern.rl.objectives import TOLERATED, RatioClip, least_clipped
from flowkern.rl.recipe import Recipe
from flowkern.train import distributed, tracking
from flowkern.train.causes import Cause, causes_at_equal_batches, causes_at_other_batches
from flowkern.train.config import Config
from flowkern.train.data import prompts_of
from flowkern.train.flow import FlowTask
from flowkern.train.loading import DTYPES
from flowkern.train.loop import Loop
from flowkern.train.lora import layers
from flowkern.train.prompts import draw_prompts
from flowkern.train.replay import Compared, Replay

ELEMENTS = 65_536
"""Of the latents that papers' clip ranges are for where a recipe says nothing: 512 x 512 pixels."""


@dataclass(frozen=True)
class Level:
    """Of one noise level, in batches of one shape."""

    sigma: float
    choices: int
    ratio_min: float
    ratio_max: float
    log_ratio: float
    """The largest, by magnitude."""
    velocity_error: float
    """Of a velocity, the root mean square over that of the velocity; the largest."""


@dataclass(frozen=True)
class Finding:
    """What is off."""

    cause: str
    said: str
    shape: str
    """Of the batches in which it shows."""
    log_ratio: float
    share: float | None
    """Of the clip range; None: there is none."""


@dataclass(frozen=True)
class Report:
    facts: Mapping[str, Any]
    """In plain values."""
    clip: float | None
    """The least |log_ratio| that is clipped; None: the objective has no ratio."""
    shapes: Mapping[str, Sequence[Level]]
    """From the highest noise level down, by the shape of batches; see `Replay.shapes`."""
    findings: Sequence[Finding]
    notes: Sequence[str]

    @property
    def is_sound(self) -> bool:
        return not self.findings

    def share(self, shape: str) -> float | None:
        """The largest |log_ratio| of a shape over the clip range."""
        worst = max(level.log_ratio for level in self.shapes[shape])
        return worst / self.clip if self.clip else None

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON has them: what is not finite is None."""
        return {"is_sound": self.is_sound, **_plain(dataclasses.asdict(self))}


def doctor(config: Config) -> Report:
    """Load what a configuration names, and examine it on the device of its run. Writes nothing of
    the run. Of several processes each examines its own share of the prompts, through what wraps the
    network there, and all return the report of all.

    Raises ConfigError, naming the key, for what a training would refuse.
    """
    if config.algorithm.task != "flow":
        raise ConfigError(
            f"algorithm.name: its task is {config.algorithm.task!r}; doctor knows flow-matching "
            "models only"
        )
    count = config.algorithm.prompts_per_rollout
    prompts = prompts_of(config.data, "train_prompts")
    draw_prompts(len(prompts), count, config.seed, 0)  # refuses too many, as training does
    world = int(os.environ.get("WORLD_SIZE", 1))  # as launchers say, before there is a group
    distributed.share(count, 0, world, config.algorithm.updates_per_rollout)
    loop = Loop(smaller(config, world))
    report = together_of(distributed.together(loop.accelerator, lambda: examine(loop)))
    distributed.finish(loop.accelerator)
    return report


def smaller(config: Config, world: int = 1) -> Config:
    """One rollout, of as many prompts as fill a network call of sampling, or all of the run's, for
    each process: the calls that are looked at have the rows that they have there."""
    recipe, train = config.algorithm, config.train
    per_call = max(1, train.max_batch // (1 if recipe.guidance(0) is None else 2))
    own = recipe.prompts_per_rollout // world
    most = min(own, train.prompts_per_block or per_call, per_call)
    count = max(1, most // recipe.updates_per_rollout) * recipe.updates_per_rollout
    block = train.prompts_per_block and count
    return config.model_copy(
        update={
            "algorithm": dataclasses.replace(recipe, prompts_per_rollout=world * count),
            "train": train.model_copy(
                update={"steps": recipe.updates_per_rollout, "prompts_per_block": block}
            ),
        }
    )


def examine(loop: Loop) -> Report:
    """Of a run that has not begun. Nothing of it is changed."""
    task, config = loop.task, loop.config
    halves = 1 if task.guidance is None else 2
    if config.train.max_batch < halves:
        raise ConfigError(
            f"train.max_batch: got {config.train.max_batch}, expected at least {halves}: guidance "
            "takes two network calls"
        )
    clip = _clip(task.objective, task.model.describe()["elements"])
    task.begin(0)  # text of the one rollout
    loaded = tracking.peak_memory_gb(task.device)
    replay = Replay(loop)
    compared = replay.shapes()
    findings = _findings(replay, compared, clip)
    facts = _facts(task, replay)
    peak = tracking.peak_memory_gb(task.device)
    facts["memory"] = {"loaded_gb": loaded, "peak_gb": peak, "device_gb": _memory(task.device)}
    shapes = {shape: _levels(one) for shape, one in compared.items()}
    return Report(facts, clip, shapes, findings, _notes(task, facts))


def diagnosis(loop: Loop) -> Sequence[Finding]:
    """Of the rollout of a run under way, as its weights are. Nothing of it is changed."""
    replay = Replay(loop, loop.iteration)
    clip = _clip(loop.task.objective, loop.task.model.describe()["elements"])
    return _findings(replay, replay.shapes(), clip)


def together_of(reports: Sequence[Report]) -> Report:
    """What processes found, as one: of each noise level and each cause the worst."""
    first, *others = reports
    if not others:
        return first
    findings: dict[tuple[str, str], Finding] = {}
    for finding in (one for report in reports for one in report.findings):
        known = findings.setdefault((finding.cause, finding.shape), finding)
        if finding.log_ratio > known.log_ratio:
            findings[finding.cause, finding.shape] = finding
    shapes = {
        shape: [_worst(levels) for levels in zip(*(r.shapes[shape] for r in reports), strict=True)]
        for shape in first.shapes
    }
    memory = [report.facts["memory"] for report in reports]
    peak = max(memory, key=lambda one: one["peak_gb"])
    facts = {**first.facts, "memory": peak, "processes": len(reports)}
    return dataclasses.replace(first, facts=facts, shapes=shapes, findings=list(findings.values()))


def _worst(levels: Sequence[Level]) -> Level:
    return Level(
        levels[0].sigma,
        sum(level.choices for level in levels),
        min(level.ratio_min for level in levels),
        max(level.ratio_max for level in levels),
        max(level.log_ratio for level in levels),
        max(level.velocity_error for level in levels),
    )


def _clip(objective: Any, elements: int) -> float | None:
    """Of a log-ratio, on either side, the nearer."""
    if getattr(objective, "objective", None) == "nft" or isinstance(objective, Distillation):
        return None
    if isinstance(objective, RatioClip):
        return objective.least_clipped(elements)
    return least_clipped(objective.clip_low, objective.clip_high)


def _levels(compared: Compared) -> list[Level]:
    out = []
    for sigma in compared.sigma.unique().flip(0).tolist():
        at = compared.sigma == sigma
        log_ratio = compared.log_ratio[at]
        ratio = log_ratio.exp()
        out.append(
            Level(
                sigma,
                int(at.sum()),
                float(ratio.min()),
                float(ratio.max()),
                float(_size(log_ratio).max()),
                float(compared.error[at].max()),
            )
        )
    return out


def _size(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.abs().nan_to_num(nan=math.inf, posinf=math.inf)


def _findings(
    replay: Replay, compared: Mapping[str, Compared], clip: float | None
) -> list[Finding]:
    """At equal batches everything that is not exactly 1; elsewhere what takes much of the clip
    range. What is off at equal batches is off in all, and is looked for there."""

    def finding(cause: Cause, shape: str, log_ratio: float) -> Finding:
        share = log_ratio / clip if clip else None
        return Finding(cause.name, cause.said, shape, log_ratio, share)

    equal = compared["equal"]
    error = _size(equal.error)
    if error.max() > 0:
        row, worst = int(equal.row[error.argmax()]), float(_size(equal.log_ratio).max())
        call = next(call for call in replay.calls if (call.row == row).any())
        causes = causes_at_equal_batches(replay, call)
        return [finding(cause, "equal", worst) for cause in causes]
    worst = {shape: float(_size(one.log_ratio).max()) for shape, one in compared.items()}
    shape = max(worst, key=worst.__getitem__)
    if clip is None or worst[shape] <= TOLERATED * clip:
        return []
    row = int(compared[shape].row[_size(compared[shape].log_ratio).argmax()])
    causes = causes_at_other_batches(replay, row, _dtype(replay.task))
    if not causes:
        said = "a row is another in other batches, for none of the reasons that were tried"
        return [finding(Cause("unknown", said), shape, worst[shape])]
    # Rounding is everywhere; what explains the most is named, and what alone would be too much.
    named = [c for i, c in enumerate(causes) if i == 0 or c.log_ratio > TOLERATED * clip]
    return [finding(cause, shape, worst[shape]) for cause in named]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- what there is ----


def _facts(task: FlowTask, replay: Replay) -> dict[str, Any]:
    model, config = task.model, task.config
    about = model.describe()
    elements = about["elements"]
    clip_range = getattr(task.recipe, "clip_range", None)
    paper = _default(task.recipe, "clip_range")
    facts = {
        "family": about["pipeline"],
        "path": str(config.model.path),
        "device": str(task.device),
        "dtype": _dtype(task),
        "parameters": about["parameters"],
        "size": about["size"],
        "num_frames": about.get("num_frames"),
        "latent_shape": about["latent_shape"],
        "elements": elements,
        "guidance": about["guidance"],
        "guidance_scale": task.recipe.guidance_scale,
        "text_length": model.max_sequence_length,
        "lora": None,
        "trained": task.facts[0],
        "batch": {"sampling": replay.size * replay.halves, "training": replay.learn_size},
        "processes": 1,
        "backends": backends(task.device),
    }
    if config.lora is not None:
        total, hits = layers(model, config.lora)
        facts["lora"] = {"rank": config.lora.rank, "layers": total, "hits": hits}
    if clip_range is not None:
        of = getattr(task.recipe, "clip_elements", ELEMENTS)
        fits = paper and paper * math.sqrt(of / elements)
        said = {"configured": clip_range, "paper": paper, "elements": of, "fits": fits}
        facts["clip_range"] = said
    return facts


def _default(recipe: Recipe, name: str) -> Any:
    """The paper's, of an option."""
    return next((f.default for f in dataclasses.fields(recipe) if f.name == name), None)


def _dtype(task: FlowTask) -> str:
    """What the network computes in."""
    asked = task.config.train.mixed_precision
    own = task.model.describe()["dtype"]
    return own if asked == "no" else str(DTYPES[asked]).removeprefix("torch.")


def _memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def _notes(task: FlowTask, facts: Mapping[str, Any]) -> list[str]:
    notes, recipe = [], task.recipe
    if not isinstance(task.objective, RatioClip):
        notes.append(
            "this objective matches points of its images: its ratio, if it has one, is of two "
            "passes in training, and sampling is not replayed"
        )
    elif isinstance(task.objective, Distillation):
        notes.append("this objective has no ratio: it follows a teacher")
    elif recipe.updates_per_rollout == 1 and recipe.sampler is None:
        notes.append("one update per rollout: its ratio is taken as 1, and nothing is clipped")
    else:
        notes.append(
            f"the first of {recipe.updates_per_rollout} updates takes the ratio as 1; the others "
            'begin with what "training" shows'
        )
    clip = facts.get("clip_range")
    times = clip["configured"] / clip["fits"] if clip and clip["fits"] else 1.0
    if not 1 / 3 < times < 3:
        notes.append(
            f"algorithm.clip_range: {clip['configured']:.2g} is {times:.2g} times what the paper's "
            f"is for {facts['elements']:,} elements, {clip['fits']:.2g}"
        )
    return notes
