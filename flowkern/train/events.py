"""What happened to a run, a line each in events.jsonl: begun, resumed, done, stopped, failed;
unscored, where a reward first left images out; warned; with the first two, where: versions,
device, and the command.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowkern import __version__
from flowkern.train import durable

EVENTS = "events.jsonl"
PACKAGES = (
    "torch",
    "triton",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "pillow",
    "rapidocr",
)


def note(output_dir: Path, event: str, step: int, said: str = "", **more: Any) -> None:
    """Append one. Where the disk is full the run has said so already."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):
        durable.append_line(
            output_dir / EVENTS, {"step": step, "event": event, "at": at, "said": said, **more}
        )


def environment(
    accelerator: Accelerator, rewards: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Of this process, in plain values. rewards: what is known of each, as a commit by its id."""
    device = accelerator.device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
    packages = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    return {
        "command": command(),
        "processes": accelerator.num_processes,
        "device": f"{device.type}, {name}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "flowkern": __version__,
        **packages,
        **{
            f"reward.{name}": ", ".join(f"{key} {value}" for key, value in known.items())
            for name, known in rewards.items()
        },
    }


def command() -> str:
    """As it was typed, up to where the program lies."""
    program, *arguments = sys.argv
    name = Path(program).name
    words = ["flowkern"] if name in ("flowkern", "__main__.py") else ["python", program]
    return shlex.join([*words, *arguments])
