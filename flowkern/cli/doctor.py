"""flowkern doctor: what a configuration is, and whether its ratio is 1 before the first update."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkern.checks import ConfigError, counted
from flowkern.cli.environment import environment, in_lines
from flowkern.cli.estimate import show as show_estimate
from flowkern.cli.train import OVERRIDE
from flowkern.lookup import nearest

if TYPE_CHECKING:
    from rich.table import Table

    from flowkern.train.config import Config
    from flowkern.train.doctor import Report

SAID = {
    "equal": "batches as in sampling",
    "training": "batches as in training",
    "alone": "each row alone",
    "mixed": "beside prompts of other lengths",
}


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="look a configuration over: sizes, and the ratio before the first update",
        description="Load a configuration and its model, say what they are, and replay the first "
        "rollout as training would: is its ratio 1 before the first update, in which batches, and "
        "how far off beside the clip range? Where it is off, what for. Nothing of the run is "
        "written. Without CONFIG: versions, devices, backends, packages, for a bug report. Exit "
        "status: 0 sound, 1 off, 2 a configuration that cannot be used.",
    )
    parser.add_argument(
        "arguments",
        metavar="CONFIG.yaml [MORE.yaml ...] [key.path=value ...]",
        nargs="*",
        help="as of train; none: what there is here",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="memory and time, from configurations alone: no weights are read, and nothing is run",
    )
    parser.add_argument("--card", help="with --estimate: seconds on it, and does it fit? h200, ...")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="with --estimate: of each of so many, with what train.sharding leaves it",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there, too")
    parser.set_defaults(command=run, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    files = [text for text in options.arguments if not OVERRIDE.match(text)]
    overrides = [text for text in options.arguments if OVERRIDE.match(text)]
    if options.json is not None and os.environ.get("RANK", "0") == "0":  # of several processes
        _require_writable(options.json)
    for name in ("card", "processes"):
        if getattr(options, name) is not None and not options.estimate:
            raise ConfigError(f"--{name}: expected --estimate beside it")
    if options.processes is not None and options.processes < 1:
        raise ConfigError(f"--processes: got {options.processes}, expected at least 1")
    if not options.arguments and not options.estimate:
        found = environment()
        print(*in_lines(found), sep="\n")
        _write(options.json, found)
        return 0
    if not files:
        options.fail("doctor: expected a CONFIG.yaml, as in configs/")
    from flowkern.train.config import load_config

    config = load_config(files, overrides)
    if options.estimate:
        return _estimate(config, options)
    import torch

    from flowkern.train.doctor import doctor
    from flowkern.train.errors import RunError
    from flowkern.train.quiet import quiet

    quiet()
    try:
        report = doctor(config)
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with train.max_batch={config.train.max_batch}; a smaller one, "
            "model.gradient_checkpointing=true or train.mixed_precision=bf16 may help"
        ) from None
    if os.environ.get("RANK", "0") == "0":  # of several processes
        show(report)
        _write(options.json, report.to_dict())
    return 0 if report.is_sound else 1


def _estimate(config: Config, options: argparse.Namespace) -> int:
    from flowkern.train.cards import CARDS
    from flowkern.train.estimate import estimate

    if options.card is not None and options.card not in CARDS:
        near = nearest(options.card.lower(), CARDS)
        hint = f"; did you mean {near!r}?" if near else ""
        known = ", ".join(CARDS)
        raise ConfigError(f"--card: got {options.card!r}, expected one of {known}{hint}")
    card = CARDS.get(options.card)
    found = estimate(config, card, options.processes or 1)
    show_estimate(found, options.card, card)
    _write(options.json, found.to_dict())
    return 1 if card is not None and found.peak > card.memory * 1e9 else 0


def _require_writable(path: Path) -> None:
    """Before the work, which takes minutes. Raises ConfigError; a file is as it was."""
    if not path.parent.is_dir():
        raise ConfigError(f"--json: there is no folder {str(path.parent)!r}")
    try:
        if path.is_fifo():  # its reader would take this for the end
            return
        is_new = not os.path.lexists(path)
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--json: {str(path)!r} cannot be written: {error.strerror}") from None


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def show(report: Report) -> None:
    """For people."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.print(_facts(report))
    console.print(_ratios(report))
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for finding in report.findings:
        share = "" if finding.share is None else f", {finding.share:.2g} times the clip range"
        console.print(
            f"off: {finding.cause}, in {SAID[finding.shape]}: |log_ratio| up to "
            f"{finding.log_ratio:.1e}{share}: {finding.said}",
            markup=False,
            style="bold red",
        )
    if report.is_sound:
        sound = "training sees what sampling saw"
        sound = sound if report.clip is None else "the ratio is 1 before the first update"
        console.print(f"OK: {sound}", style="bold green")


def _facts(report: Report) -> Table:
    from rich.table import Table

    facts = report.facts
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    height, width = facts["size"]
    frames = f" x {counted(facts['num_frames'], 'frame')}" if facts["num_frames"] else ""
    shape = " x ".join(map(str, facts["latent_shape"]))
    rows = {
        "model": f"{facts['family']}, {facts['parameters']:,} weights, {facts['dtype']} on "
        f"{facts['device']}",
        "size": f"{height} x {width} px{frames}; latents {shape}",
        "D": f"{facts['elements']:,} elements of a latent",
        "guidance": f"{facts['guidance']}, guidance_scale {facts['guidance_scale']:g}",
        "text": counted(facts["text_length"], "token"),
        "training": facts["trained"],
        "clip range": _clip_range(report),
        "batches": f"{counted(facts['batch']['sampling'], 'row')} in sampling, "
        f"{facts['batch']['training']} in training"
        + (f", in each of {facts['processes']} processes" if facts["processes"] > 1 else ""),
        "backends": "; ".join(
            name if reason is None else f"no {name}: {reason}"
            for name, reason in facts["backends"].items()
        ),
        "memory": _memory(facts["memory"]),
    }
    for name, said in rows.items():
        if said:
            table.add_row(name, said)
    return table


def _clip_range(report: Report) -> str:
    clip = report.facts.get("clip_range")
    if clip is None:
        return "" if report.clip is None else f"|log_ratio| {report.clip:.2g}"
    said = f"{clip['configured']:.2g}"
    if clip["fits"]:
        said += (
            f"; the paper's {clip['paper']:.2g} for {clip['elements']:,} elements goes with "
            "1 / sqrt(D): "
            f"{clip['fits']:.2g} here"
        )
    return said


def _memory(memory: dict[str, float | None]) -> str:
    said = f"{memory['peak_gb']:.2f} GB at most, {memory['loaded_gb']:.2f} until loaded"
    if memory["device_gb"]:
        said += f"; the device has {memory['device_gb']:.0f}"
    return said


def _ratios(report: Report) -> Table:
    from rich.table import Table

    shown = "|log_ratio|" if report.clip is not None else "difference of a velocity, of 1"
    table = Table(title=f"before the first update: the largest {shown}", title_justify="left")
    table.add_column("sigma", justify="right")
    table.add_column("choices", justify="right")
    table.add_column("ratio", justify="right")
    for shape in report.shapes:
        table.add_column(f"{shape}", justify="right")
    by_level = {
        shape: {level.sigma: level for level in levels} for shape, levels in report.shapes.items()
    }
    for level in report.shapes["equal"]:
        ratio = max(level.ratio_min, level.ratio_max, key=lambda ratio: abs(ratio - 1))
        at = [levels[level.sigma] for levels in by_level.values()]
        found = [one.velocity_error if report.clip is None else one.log_ratio for one in at]
        row = [f"{level.sigma:.4f}", str(level.choices), f"{ratio:.7g}", *map(_short, found)]
        table.add_row(*row)
    if report.clip:
        table.add_section()
        shares = [f"{report.share(shape):.2%}" for shape in report.shapes]
        table.add_row("of the clip", "", "", *shares)
    return table


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
