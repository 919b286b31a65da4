"""What validations say of a run: which step was the best, whether it goes on getting better, and
whether what is optimized rises while something that nobody optimizes falls.

All of it follows from the records of validation.jsonl, so a resumed run says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowkern.checks import ConfigError
from flowkern.train.validation_config import Judged

OPTIMIZED = "reward/mean"


@dataclass(frozen=True)
class Verdict:
    best: Mapping[str, Any] | None = None
    """The record with the best validation.metric, of those after the first step; None: there is
    none."""
    ends: str | None = None
    """Why the run may end."""
    alarm: str | None = None
    """Why it must."""


def verdict(records: Sequence[Mapping[str, Any]], options: Judged) -> Verdict:
    """Of a run whose last record is that of the validation just made.

    Raises ConfigError, naming the key, for one that a validation has not.
    """
    metric, sign = options.metric, 1 if options.mode == "max" else -1
    for key, name in [("metric", metric), *(("collapse", name) for name in options.collapse or ())]:
        if name is not None and name not in records[-1]:
            known = ", ".join(name for name in records[-1] if name != "step")
            raise ConfigError(f"validation.{key}: got {name!r}, but a validation has {known}")
    alarm = _collapse(records, options.collapse or {})
    if metric is None:
        return Verdict(alarm=alarm)
    scored = [record for record in records if _is_number(record.get(metric))]
    learned = [record for record in scored if record["step"] > 0]
    best = max(learned, key=lambda record: sign * record[metric], default=None)
    return Verdict(best, _ends(scored, options, sign), alarm)


def _ends(scored: Sequence[Mapping[str, Any]], options: Judged, sign: int) -> str | None:
    """A step is better than the best before it by more than min_delta; how long ago was one?"""
    if options.patience is None or not scored:
        return None
    best = scored[0]
    since = 0
    for record in scored[1:]:
        if sign * (record[options.metric] - best[options.metric]) > options.min_delta:
            best, since = record, 0
        else:
            since += 1
    if since < options.patience:
        return None
    better = "risen" if options.mode == "max" else "fallen"
    by = f" by more than {options.min_delta:g}" if options.min_delta else ""
    return (
        f"{options.metric} has not {better}{by} in {since} validations; the best is "
        f"{best[options.metric]:.4g} at step {best['step']}"
    )


def _collapse(records: Sequence[Mapping[str, Any]], margins: Mapping[str, float]) -> str | None:
    """What is optimized is above the first validation's, and a figure is a margin from its best."""
    first, last = records[0].get(OPTIMIZED), records[-1].get(OPTIMIZED)
    if not (_is_number(first) and _is_number(last)) or last <= first:
        return None
    for name, margin in margins.items():
        sign = 1 if margin > 0 else -1
        values = [record[name] for record in records if _is_number(record.get(name))]
        if not values or not _is_number(records[-1].get(name)):
            continue
        best, now = max(values, key=lambda value: sign * value), records[-1][name]
        if sign * (best - now) > abs(margin):
            moved = "fell" if sign > 0 else "rose"
            return (
                f"{OPTIMIZED} rose from {first:.4g} to {last:.4g} while {name} {moved} from "
                f"{best:.4g} to {now:.4g}, and validation.collapse allows {abs(margin):g}: what is "
                "optimized may be hacked"
            )
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
