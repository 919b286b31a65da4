"""The run directory: begun anew or continued, and what a restart changes is told or refused.

Whatever is removed goes in an order that leaves, at every moment, a run that can be continued: the
names of checkpoints, the newest first; then their bytes; then the lines that speak of them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from flowkern.rl.algorithms import recipe
from flowkern.train import checkpoint, distributed, durable, events, tracking
from flowkern.train import tree as trees
from flowkern.train.config import Config, ConfigError, LoraConfig, sections, to_dict
from flowkern.train.data import SPLITS, digest_of
from flowkern.train.events import EVENTS
from flowkern.train.lock import Lock
from flowkern.train.teachers import digests
from flowkern.train.trackers import Trackers
from flowkern.train.tracking import flat
from flowkern.train.verdict import Verdict, verdict

METRICS, VALIDATION, CONFIG, SAMPLES = "metrics.jsonl", "validation.jsonl", "config.yaml", "samples"
FIXED = ("seed", "model.", "lora.", "algorithm.", "data.prompt_column")
"""Keys, or their beginnings, that stay for the whole of a run."""
FREE = ("output_dir", "train.resume_from_checkpoint", "train.overwrite_output_dir")
"""Keys that say how a process is started, and nothing about the run."""
OPTIMIZER, EIGHT_BITS = "train.optimizer", "adamw_8bit"
MEAN = "train.ema_decay"
PROMPTS = "prompts.json"  # of a checkpoint
HUB = "hub"  # what is uploaded


def rewards_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a curve is drawn of; the names are one text in all records."""
    found = {sys.intern(key): x for key, x in record.items() if key.startswith("reward/")}
    return found and {"step": record["step"], **found}


class RunDirectory:
    """The output_dir of a run while it is under way: claimed, prepared, written to, released."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.path, self.is_main = Path(config.output_dir), accelerator.is_main_process
        self.saved = self.logged = 0  # the steps of the newest checkpoint, of the last metrics
        self._taken: dict[str, tuple[Any, Any]] = {}
        self._lock: Lock | None = None
        self._weights = digests(config) if self.is_main else {}
        self._trackers = Trackers(accelerator)
        files = (self.path / METRICS, self.path / VALIDATION)
        self._curves = [durable.Growing(path, rewards_of) for path in files]

    # ---- beginning ----

    def claim(self) -> Path | None:
        """The checkpoint to continue from; what can be refused is refused here, before a change."""
        found = distributed.on_main(self.accelerator, self._claim)
        return None if found is None else Path(found)

    def prepare(
        self, found: Path | None, step: int, rewards: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Make the directory what it is at `step` of the checkpoint that was found, or anew.
        rewards: what is to be kept of them, as `served` has it."""
        if found is not None:
            self.logged = step
            self.saved = step if self._is_mine(found) else 0
        distributed.on_main(self.accelerator, lambda: self._prepare(found, step, rewards))
        if self.config.train.report_to:
            self._trackers.begin(flat(to_dict(self.config)))

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _claim(self) -> str | None:
        name = self.config.train.resume_from_checkpoint
        if self.config.train.push_to_hub:
            from flowkern.train.export import require_login

            require_login(self.config.train.hub_model_id, "train.hub_model_id")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
        except OSError as error:
            if error.errno is None:  # another run has it
                raise
            raise ConfigError(
                f"output_dir: {error.strerror}: {str(error.filename)!r:.300}"
            ) from error
        found = checkpoint.find_checkpoint(name, self.path) if name else None
        if found is None:
            return None
        prompts = self._prompts()
        with checkpoint.taking(found):
            self._taken = refuse_other_run(found, to_dict(self.config))
            stored = dict(json.loads((found / PROMPTS).read_bytes()))
        for key, digest in prompts.items():
            if stored.get(key) != digest:
                of = "prompts" if key.startswith("data.") else "weights"
                raise ConfigError(
                    f"{key}: holds other {of} than when the run that is resumed began; "
                    "expected the same, or a new output_dir"
                )
        return str(found)

    def _prepare(
        self, found: Path | None, step: int, rewards: Mapping[str, Mapping[str, str]]
    ) -> None:
        options, tree = self.config.train, to_dict(self.config)
        if found is not None and self._is_mine(found):
            resume(self.path, found, step, tree)
        else:
            is_restart = options.resume_from_checkpoint == "latest"
            begin(self.path, options.overwrite_output_dir, is_restart)
        durable.replace(self.path / CONFIG, dump(tree))
        taken = [
            f"{key}: {_shown(old)} until step {step}, {_shown(new)} from there"
            for key, (old, new) in self._taken.items()
        ]
        if found is not None:
            self.say("\n  ".join([f"resumed from {found}", *taken]))
        self.note(
            "begun" if found is None else "resumed",
            "; ".join(taken),
            environment=events.environment(self.accelerator, rewards),
        )

    def _is_mine(self, found: Path) -> bool:
        """Is it a checkpoint of this directory, and not of a run that is taken further here?"""
        return found.resolve().parent == self.path.resolve()

    def _prompts(self) -> dict[str, str | None]:
        """A digest of each file of prompts, or data set, wherever it lies; and of weights that a
        copy is read from."""
        prompts = {f"data.{which}": digest_of(self.config.data, which) for which in SPLITS}
        return prompts | self._weights

    # ---- what is written ----

    def save(self, step: int, fill: Callable[[Path | None], None], asks_all: bool = False) -> None:
        """checkpoint-`step` of what `fill` writes, whole or not at all; by the main process.
        asks_all: the others call it too, with None, for their parts."""
        if self.is_main:
            limit = self.config.train.checkpoints_total_limit
            kept = self._best_step() if limit is not None else None
            checkpoint.write(
                self.path, step, lambda directory: self._fill(directory, fill), limit, kept
            )
        elif asks_all:
            fill(None)
        self.saved = step

    def _fill(self, directory: Path, fill: Callable[[Path], None]) -> None:
        fill(directory)
        (directory / CONFIG).write_text(dump(to_dict(self.config)), "utf-8")
        (directory / PROMPTS).write_text(json.dumps(self._prompts()))

    def log(self, records: Sequence[dict[str, float]]) -> None:
        """A line of metrics per optimizer step."""
        for record in records:
            if self.is_main:
                durable.append_line(self.path / METRICS, record)
            self.logged = record["step"]
            self._trackers.log(record)

    def log_validation(self, step: int, figures: Mapping[str, float]) -> None:
        """A line that says that the validation is done; none where there are no figures."""
        if self.is_main and figures:
            durable.append_line(self.path / VALIDATION, {"step": step, **figures})
            grid = self.path / SAMPLES / f"step-{step}.png"
            self._trackers.log_validation(step, figures, grid)

    def verdict(self) -> Verdict | None:
        """What the validations so far say; None: there was none. On the main process."""
        records = durable.read_lines(self.path / VALIDATION)
        return verdict(records, self.config.validation) if records else None

    def note_best(self, record: Mapping[str, Any]) -> None:
        """best.json: the step whose checkpoint is kept, and why."""
        metric = self.config.validation.metric
        if self.is_main:
            found = {"step": record["step"], "metric": metric, "value": record[metric]}
            durable.replace(self.path / checkpoint.BEST, json.dumps(found) + "\n")

    def _best_step(self) -> int | None:
        if self.config.validation.metric is None:
            return None
        found = self.verdict()
        return found.best["step"] if found is not None and found.best is not None else None

    def is_validated(self, step: int) -> bool:
        """Is that line written? A run that was stopped before it makes up for it."""
        path = self.path / VALIDATION
        return distributed.on_main(
            self.accelerator, lambda: any(r["step"] == step for r in durable.read_lines(path))
        )

    def draw_curves(self) -> None:
        """reward_curve.png of what is on disk."""
        if self.is_main:
            lines = [file.records() for file in self._curves]
            optimized = self.config.reward.weights
            tracking.save_curves(self.path / "reward_curve.png", *lines, optimized=optimized)

    def publish(self) -> None:
        """Upload what was learned, where that is asked for. Raises RunError where it fails."""
        options = self.config.train
        if not (options.push_to_hub and self.is_main):
            return
        from flowkern.train.export import export, push

        found = self.path / HUB
        shutil.rmtree(found, ignore_errors=True)  # another's, where a run is begun anew
        place = self.path
        if (place / checkpoint.BEST).is_file():  # not where nothing was validated after a step
            place = checkpoint.best_of(place)
        export(place, found, name=options.hub_model_id)
        self.say(f"pushed to {push(found, options.hub_model_id, options.hub_private_repo)}")

    def say(self, message: str, event: str | None = None) -> None:
        """event: kept under that name, too."""
        if self.is_main:
            print(message, file=sys.stderr, flush=True)
            if event is not None:
                self.note(event, message)

    def note(self, event: str, said: str, **more: Any) -> None:
        """A line of what happened to the run; see `events`."""
        if self.is_main:
            events.note(self.path, event, self.logged, said, **more)


def require_place(config: Config) -> None:
    """Raise ConfigError, before a model is looked for, where no run can be begun; nothing is
    changed there. What a resume finds is looked at by `RunDirectory.claim`.
    """
    place, options = Path(config.output_dir), config.train
    durable.require_writable(place, "output_dir")
    if place.exists() and not place.is_dir():
        raise ConfigError(f"output_dir: {str(place)!r} is no directory")
    name = options.resume_from_checkpoint
    if name in (None, "latest"):
        is_restart = name is not None
        is_kept = is_restart and bool(checkpoint.checkpoints(place))
        _refuse_a_run(place, options.overwrite_output_dir or is_kept, is_restart)
    elif not Path(name).is_dir():
        checkpoint.find_checkpoint(name)  # says what is wrong


def _refuse_a_run(output_dir: Path, overwrite: bool, is_restart: bool) -> None:
    holds = checkpoint.checkpoints(output_dir) or (
        durable.read_lines(output_dir / METRICS) and not is_restart
    )
    if holds and not overwrite:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds a run already; continue it with "
            "train.resume_from_checkpoint=latest, replace it with train.overwrite_output_dir=true, "
            "or name another"
        )


def begin(output_dir: Path, overwrite: bool, is_restart: bool) -> None:
    """Make the directory one of a run that has no checkpoint yet.

    is_restart: the command continues whatever there is; a run that was killed before its first
    checkpoint is then begun again. Raises ConfigError where there is a run to be lost.
    """
    checkpoint.tidy(output_dir)
    _refuse_a_run(output_dir, overwrite, is_restart)
    checkpoint.discard(output_dir)
    shutil.rmtree(output_dir / SAMPLES, ignore_errors=True)
    for pattern in (
        METRICS,
        VALIDATION,
        EVENTS,
        checkpoint.BEST,
        "config-*.yaml",
        "reward_curve.png",
        "report.html",
    ):
        for path in output_dir.glob(pattern):
            path.unlink()


def resume(output_dir: Path, found: Path, step: int, tree: Mapping[str, Any]) -> None:
    """Make the directory as it was when the checkpoint `found` was written, at `step`: what came
    after it is dropped. The configuration until then stays as config-N.yaml if `tree` is another.
    """
    checkpoint.tidy(output_dir)
    checkpoint.discard(output_dir, after=step)
    for name, path in _numbered(output_dir, "config-*.yaml", r"config-(\d+)\.yaml"):
        if name > step:
            path.unlink()
    for name, path in _numbered(output_dir / SAMPLES, "step-*.png", r"step-(\d+)\.png"):
        if name > step:
            path.unlink()
    for name in (METRICS, VALIDATION):
        durable.truncate_lines(output_dir / name, step)
    (output_dir / checkpoint.BEST).unlink(missing_ok=True)  # said anew with the next validation
    earlier = output_dir / f"config-{step}.yaml"
    if changes(found, tree) and not earlier.exists():
        durable.replace(earlier, (found / CONFIG).read_bytes())


def _numbered(directory: Path, pattern: str, name: str) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(name, path.name), path) for path in directory.glob(pattern)]
    return [(int(match[1]), path) for match, path in matches if match]


def dump(tree: Mapping[str, Any]) -> str:
    """A configuration as it is stored."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def changes(found: Path, tree: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the configuration `tree` has otherwise than the checkpoint's: key -> (its, ours)."""
    its, ours = flat(trees.read_file(found / CONFIG)), flat(yaml.safe_load(dump(tree)))
    differing = {key: (its.get(key), ours.get(key)) for key in its | ours}
    return {
        key: (old, new)
        for key, (old, new) in differing.items()
        if old != new and key not in FREE and not _is_same_path(key, old, new)
    }


def _is_same_path(key: str, *values: Any) -> bool:
    is_path = key in ("model.path", "data.train_prompts", "data.test_prompts")
    if not (is_path or key.startswith("algorithm.")) or not all(type(x) is str for x in values):
        return False
    return len({Path(value).resolve() for value in values}) == 1


def refuse_other_run(found: Path, tree: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The `changes` that a resumed run takes over.

    Raises ConfigError for one that would make it another run.
    """
    taken = {}
    for key, (old, new) in changes(found, tree).items():
        if key == "lora":  # null on one side, a mapping on the other
            trains = "all weights" if new is None else "an adapter"
            raise ConfigError(
                f"lora: the run that is resumed trains {trains}; expected the same, or a new "
                "output_dir"
            )
        if key == FIXED[0] or key.startswith(FIXED[1:]):
            if old is None:  # the run is older than the option
                old = _default(key, tree)
            if new in (None, old):
                continue
            raise ConfigError(
                f"{key}: got {_shown(new, repr)}, but the run that is resumed has "
                f"{_shown(old, repr)}; expected the same, or a new output_dir"
            )
        if _shown(old) == _shown(new):  # the run is older than an option that is null
            continue
        if key == MEAN and "null" in (_shown(old), _shown(new)):
            raise ConfigError(
                f"{key}: got {_shown(new)}, but the run that is resumed has {_shown(old)}: a mean "
                "is kept from a run's beginning; expected the same, or a new output_dir"
            )
        if key == OPTIMIZER and EIGHT_BITS in (old, new):
            raise ConfigError(
                f"{key}: got {new!r}, but the run that is resumed has {old or 'adamw'!r}, whose "
                "moments have another form; expected the same, or a new output_dir"
            )
        taken[key] = (old, new)
    return taken


def _default(key: str, tree: Mapping[str, Any]) -> Any:
    """Of an option of the model, the adapter or the recipe of `tree`, as `flat` has it."""
    section, _, name = key.partition(".")
    if section == "algorithm":
        value = getattr(recipe(tree["algorithm"]["name"]), name, None)
    else:
        kinds = {"model": sections(tree).model_fields["model"].annotation, "lora": LoraConfig}
        field = kinds[section].model_fields.get(name) if section in kinds else None
        value = field and field.get_default(call_default_factory=True)
    return flat({name: value})[name]


def _shown(value: Any, of: Callable[[Any], str] = str) -> str:
    """A value of `flat`, as it is written in a configuration."""
    return "null" if value in (None, str(None)) else of(value)
