"""Trackers of accelerate: what a run writes into its directory, also to a board."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowkern.checks import ConfigError
from flowkern.train.errors import describe

GRIDS = "samples"
"""What sample grids are called there; figures of a validation begin with "validation/"."""


class Trackers:
    """Of the main process; none without train.report_to."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def begin(self, config: Mapping[str, Any]) -> None:
        """config: the run's, as plain values. Raises ConfigError where one cannot begin: no login,
        no network."""
        try:
            self.accelerator.init_trackers("flowkern", config=dict(config))
        except Exception as error:
            raise ConfigError(f"train.report_to: cannot begin: {describe(error):.300}") from error

    def log(self, record: Mapping[str, float]) -> None:
        """Of an optimizer step."""
        self.accelerator.log(dict(record), step=int(record["step"]))

    def log_validation(self, step: int, figures: Mapping[str, float], grid: Path) -> None:
        """grid: a picture of prompts, images and scores, where it is there; to trackers that take
        pictures."""
        if not figures or not self.accelerator.is_main_process:
            return
        self.accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step=step)
        for tracker in self.accelerator.trackers if grid.is_file() else ():
            _log_image(tracker, grid, step)


def _log_image(tracker: Any, path: Path, step: int) -> None:
    if tracker.name == "trackio":  # accelerate's has no way for pictures
        tracker.log({GRIDS: import_module("trackio").Image(str(path))}, step=step)
        return
    if not hasattr(tracker, "log_images"):
        return
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({GRIDS: pixels[None]}, step=step, **shape)
