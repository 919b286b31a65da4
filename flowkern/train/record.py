"""What the directory of a run has, as plain values, whether the run is over or under way.

Its configuration may be another version's, and nothing that it names is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowkern.checks import ConfigError
from flowkern.lookup import is_hub_id
from flowkern.train import durable
from flowkern.train import tree as trees
from flowkern.train.checkpoint import BEST
from flowkern.train.events import EVENTS

METRICS, VALIDATION, CONFIG, SAMPLES = "metrics.jsonl", "validation.jsonl", "config.yaml", "samples"


class Run(NamedTuple):
    """What a directory has."""

    path: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    broken: Mapping[str, int]
    """Lines that are no records, by file."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises ConfigError for what is no run."""
        if not path.is_dir():
            raise ConfigError(f"run: there is no folder {str(path)!r}; expected an output_dir")
        if not any((path / name).is_file() for name in (CONFIG, METRICS)):
            raise ConfigError(
                f"run: {str(path)!r} has neither {CONFIG} nor {METRICS}; expected the output_dir "
                "of a training"
            )
        lines = {n: durable.read_lines(path / n) for n in (METRICS, VALIDATION, EVENTS)}
        counts = {
            name: sum(bool(line.strip()) for line in (path / name).read_bytes().split(b"\n"))
            for name in lines
            if (path / name).is_file()
        }
        broken = {n: count - len(lines[n]) for n, count in counts.items() if count > len(lines[n])}
        config = trees.read_file(path / CONFIG) if (path / CONFIG).is_file() else {}
        return cls(path, config, *lines.values(), broken)

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def option(self, key: str) -> Any:
        """Of a dotted key; None where there is none."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards, by name: 0 for a judge."""
        rewards = self.option("reward")
        rewards = rewards if isinstance(rewards, Mapping) else {}
        options = {name: one if isinstance(one, Mapping) else {} for name, one in rewards.items()}
        return {name: one.get("weight", 1.0) for name, one in options.items()}

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The step, metric and value that best.json has; None: there is none that can be read."""
        try:
            found = json.loads((self.path / BEST).read_bytes())
            kinds = {"step": int, "metric": str, "value": float}
            return {name: kind(found[name]) for name, kind in kinds.items()}
        except (OSError, ValueError, LookupError, TypeError):
            return None


def numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of what is a number."""
    found = [(record["step"], record.get(name)) for record in records]
    return [
        (step, value)
        for step, value in found
        if type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(step)
    ]


def names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all records, in the order that they come in."""
    found = dict.fromkeys(key for record in records for key in record)
    return [name for name in found if name != "step" and numbers(records, name)]


def base_name(path: Any) -> str | None:
    """Of a model: its id on the hub, or the last folder of where it lay."""
    if not isinstance(path, str):
        return None
    return path if is_hub_id(path) else Path(path).name
