"""A run as one page of HTML, of what its directory has, whether it is over or under way.

The configuration is read as plain values: it may be another version's, and nothing that it names is
imported. Whatever comes from the run is text to the template, which escapes it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowkern import __version__
from flowkern.checks import ConfigError, counted
from flowkern.train import charts, durable
from flowkern.train import tree as trees
from flowkern.train.charts import Chart, Series, short
from flowkern.train.checkpoint import MANIFEST
from flowkern.train.lock import owner_of
from flowkern.train.prompts import Columns, read_prompts
from flowkern.train.record import (
    SAMPLES,
    Run,
    base_name,
    names,
    numbers,
)

TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="flowkern report">'
MOST_PICTURES = 24
BESIDE = ("unscored", "warned")
"""What is said while a run goes on."""
FAULTS = ("stopped", "failed", "resumed", *BESIDE)

TOGETHER = {
    r"ratio_(mean|min|max)": "Ratio of probabilities",
    r"ratio_mean/.+": "Ratio of probabilities, by noise level",
    r"pg_clipfrac_\w+": "Share that is clipped",
    r"pg_clipfrac/.+": "Share that is clipped, by noise level",
    r"kl(_\w+)?": "KL to the reference",
    r"timing_s/(?!step$).+": "Seconds per phase",
    r"nfe/(naive_)?sample": "Network rows, sampling",
    r"nfe/(naive_)?train": "Network rows, training",
}
"""What shares a chart, by patterns of whole names, and its title."""
FIRST = ("loss", "policy", "kl", "ratio", "pg_clipfrac", "grad_norm", "lr", "zero_std_ratio")
"""Beginnings of names, in the order that they are shown in."""
COST = ("timing_s/", "nfe/", "throughput/", "memory/")
"""Beginnings of names that stand beside the tables of time and rows."""


def write(run_dir: Path, output: Path) -> None:
    """The page of a run. Raises ConfigError for what is no run, and for an output that is something
    else already; OSError where it cannot be written.
    """
    if (run_dir / MANIFEST).is_file():
        run_of = str(run_dir.absolute().parent)
        raise ConfigError(f"run: {str(run_dir)!r} is a checkpoint; expected its run, {run_of!r}")
    run = Run.read(run_dir)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: got {str(output)!r}, expected a name in .html")
    if not output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {str(output.parent)!r}")
    if output.is_dir() or (output.exists() and MARK.encode() not in output.read_bytes()[:4096]):
        raise ConfigError(f"--output: {str(output)!r} is there, and no report; expected another")
    content = page(run)
    try:
        durable.replace(output, content)
    except OSError as error:
        raise OSError(f"{output} cannot be written: {error.strerror or error}") from error


def page(run: Run) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "counted": counted}
    others = other_charts(run)
    return environment.get_template("report.html.jinja").render(
        name=run.path.resolve().name,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        algorithm=run.option("algorithm.name"),
        model=base_name(run.option("model.path")),
        state=state(run),
        figures=figures(run),
        rewards=reward_charts(run),
        learning=[one for key, one in others if not key.startswith(COST)],
        cost=[one for key, one in others if key.startswith(COST)],
        phases=phases(run),
        rows=rows(run),
        pictures=pictures(run),
        prompts=prompts(run),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
        earlier=earlier(run),
        environment=where(run),
        faults=faults(run),
        size=charts,
    )


# ---- in short ----


def state(run: Run) -> str:
    kinds = [event.get("event") for event in run.events if event.get("event") not in BESIDE]
    last = kinds[-1] if kinds else None
    of = f"{run.step:,} of {counted(run.option('train.steps') or run.step, 'optimizer step')}"
    owner = owner_of(run.path)
    if owner is not None:
        return f"under way on {owner}: {of}"
    if last in ("begun", "resumed"):
        return f"ended without a word (killed?) after {of}"
    return f"{last} after {of}" if last else of


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, beside it)."""
    found = []
    for name, weight in ({"mean": 1.0} | run.weights).items():
        key, records = f"reward/{name}", run.validation
        drawn = numbers(records, key) or numbers(run.metrics, key)
        if drawn and not (name == "mean" and is_single(run)):
            kind = "held-out prompts" if numbers(records, key) else "training rollouts"
            role = f", {_role(weight)}" if name != "mean" else ", weighted sum"
            (_, first), (_, last) = drawn[0], drawn[-1]
            found.append((name.replace("_", " "), f"{first:.3g} → {last:.3g}", kind + role))
    if (best := run.best) is not None:
        beside = f"{best['metric']} {short(best['value'])}"
        found.append(("best checkpoint", f"step {best['step']:,}", beside))
    seconds = sum(value for _, value in numbers(run.metrics, "timing_s/step"))
    found.append(("time of steps", duration(seconds), "validation and checkpoints not counted"))
    if table := rows(run):
        _, here, released = table[-1]
        beside = f"{here / released:.2f} times the released loop's" if released else "in all"
        found.append(("network rows", f"{here:,}", beside))
    return found


def is_single(run: Run) -> bool:
    """Is the mean one reward, weighted?"""
    return sum(bool(weight) for weight in run.weights.values()) == 1


def _role(weight: float) -> str:
    return f"optimized, weight {weight:g}" if weight else "only reported"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- curves ----


def reward_charts(run: Run) -> list[Chart]:
    found = []
    for key in dict.fromkeys(names(run.metrics) + names(run.validation)):
        if not key.startswith("reward/") or (key == "reward/mean" and is_single(run)):
            continue
        name = key.removeprefix("reward/")
        weight = run.weights.get(name.partition("/")[0])
        note = "the weighted sum" if name == "mean" else ""
        series = [
            Series("training rollouts", numbers(run.metrics, key)),
            Series("held-out prompts", numbers(run.validation, key), is_dots=True),
        ]
        series = [one for one in series if one.points]
        note = note if weight is None else _role(weight)
        found.append(Chart(name.replace("_", " "), series, note))
    return sorted(found, key=lambda chart: "only reported" in chart.note)


def other_charts(run: Run) -> list[tuple[str, Chart]]:
    """(name of its first, chart) of all that is recorded and no reward."""
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(names(run.metrics) + names(run.validation)):
        if not key.startswith("reward/"):
            titles = (title for like, title in TOGETHER.items() if re.fullmatch(like, key))
            groups.setdefault(next(titles, key), []).append(key)
    found = []
    for title, keys in groups.items():
        drawn = [Series(legend(key), numbers(run.metrics, key)) for key in keys]
        drawn += [Series(legend(k), numbers(run.validation, k), is_dots=True) for k in keys]
        varies = any(len({value for _, value in one.points}) > 1 for one in drawn)
        if varies or not keys[0].startswith("nfe/"):  # else the table says it
            found.append((keys[0], Chart(title, [one for one in drawn if one.points])))
    return sorted(found, key=lambda one: _place(one[0]))


def _place(key: str) -> int:
    return next((i for i, first in enumerate(FIRST) if key.startswith(first)), len(FIRST))


def legend(key: str) -> str:
    """A name in a chart of several."""
    if key.startswith("nfe/"):
        return "released loop" if "naive" in key else "here"
    for first in ("timing_s/", "ratio_mean/", "pg_clipfrac/"):
        key = key.removeprefix(first)
    return key


# ---- time and network rows ----


def phases(run: Run) -> list[tuple[str, float, float]]:
    """(phase, seconds, share), over all optimizer steps."""
    keys = [n for n in names(run.metrics) if n.startswith("timing_s/") and n != "timing_s/step"]
    sums = {key: sum(value for _, value in numbers(run.metrics, key)) for key in keys}
    total = sum(sums.values()) or 1.0
    return [(key.removeprefix("timing_s/"), value, value / total) for key, value in sums.items()]


def rows(run: Run) -> list[tuple[str, int, int]]:
    """(phase, here, in the released loop), the sum last; 0 where that is not counted."""
    found = []
    for phase in ("sample", "train"):
        here, naive = (
            int(sum(value for _, value in numbers(run.metrics, f"nfe/{kind}{phase}")))
            for kind in ("", "naive_")
        )
        if here:
            found.append(({"sample": "sampling", "train": "training"}[phase], here, naive))
    if len(found) == 2:
        found.append(("both", found[0][1] + found[1][1], found[0][2] + found[1][2]))
    return found


# ---- pictures ----


def pictures(run: Run) -> list[tuple[int, str]]:
    """(step, a data URL) of some of samples/, from the first to the last."""
    matches = [re.fullmatch(r"step-(\d+)\.png", p.name) for p in (run.path / SAMPLES).glob("*.png")]
    steps = sorted(int(match[1]) for match in matches if match)
    count = min(len(steps), MOST_PICTURES)
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    found = [(step, _data_url(run.path / SAMPLES / f"step-{step}.png")) for step in chosen]
    return [(step, url) for step, url in found if url]


def _data_url(path: Path) -> str | None:
    """None for what is no picture."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "WEBP", quality=85)
    except OSError:
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def prompts(run: Run) -> list[str]:
    """Those of the pictures, where their file is still there."""
    path, count = run.option("data.test_prompts"), run.option("validation.num_images")
    if not isinstance(path, str) or type(count) is not int:
        return []
    try:
        found = read_prompts(path, columns=Columns(run.option("data.prompt_column")))
        return [prompt["prompt"] for prompt in found[:count]]
    except ConfigError:
        return []


# ---- where, and what happened ----


def earlier(run: Run) -> list[tuple[int, list[str]]]:
    """(step, what a configuration had otherwise until it), of config-N.yaml."""
    matches = [re.fullmatch(r"config-(\d+)\.yaml", path.name) for path in run.path.iterdir()]
    found, following = [], run.config
    for step in sorted((int(match[1]) for match in matches if match), reverse=True):
        try:
            old = trees.read_file(run.path / f"config-{step}.yaml")
        except ConfigError:
            continue
        found.append((step, list(_differences(old, following))))
        following = old
    return found[::-1]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""):
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}: {one}, then {other}"


def where(run: Run) -> dict[str, Any]:
    """Of the last process that trained."""
    found = [e["environment"] for e in run.events if isinstance(e.get("environment"), Mapping)]
    return dict(found[-1]) if found else {}


def faults(run: Run) -> list[tuple[str, int, str, str]]:
    """(event, step, said, when)."""
    found, before = [], None
    for event in run.events:
        kind = str(event.get("event"))
        step, at = int(event["step"]), str(event.get("at", ""))
        if kind == "resumed" and before in ("begun", "resumed"):
            found.append(("killed", step, "ended without a word before this resume", at))
        if kind in FAULTS:
            found.append((kind, step, str(event.get("said", "")), at))
        if kind == "done" and "ended early: " in str(event.get("said")):  # not: made longer later
            found.append(("ended early", step, str(event["said"]), at))
        before = before if kind in BESIDE else kind
    for key in names(run.metrics):
        total = sum(value for _, value in numbers(run.metrics, key))
        if re.search(r"fail|unscored|dropped", key) and total:
            found.append(("rewards", run.step, f"{key}: {short(total)} in all", ""))
    for key in dict.fromkeys(key for record in run.metrics for key in record):
        count = sum(key in record and record[key] is None for record in run.metrics)
        if count:
            said = f"{key} was not finite in {counted(count, 'step')}"
            found.append(("no number", run.step, said, ""))
    for name, count in run.broken.items():
        said = f"{name}: {counted(count, 'line')} without a record"
        found.append(("records", run.step, said, ""))
    return found
