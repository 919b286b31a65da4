"""flowkern report: a run as one page of HTML."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "report",
        parents=[common],
        help="a run as one page: curves, samples, time, configuration, faults",
        description="Write one HTML file that shows a run, over or under way: curves, samples over "
        "steps, time per phase, network rows, configuration, environment, faults. It needs no "
        "network and no other file.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the output_dir of a training")
    parser.add_argument(
        "--output", type=Path, metavar="PAGE.html", help="default: report.html in RUN_DIR"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from flowkern.train.report import write

    output = options.output or options.run / "report.html"
    write(options.run, output)
    print(output)
    return 0
