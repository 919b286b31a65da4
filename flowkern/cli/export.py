"""flowkern export: what a run learned, as diffusers and peft load it, with a card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "export",
        parents=[common],
        help="what a run learned, for diffusers, with a model card; to the hub where asked",
        description="Write what a checkpoint learned into a new folder, as diffusers and peft load "
        "it, with a model card; the running mean of the weights where the run validated it.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N, or a run: its latest")
    parser.add_argument("--best", action="store_true", help="of a run, that of its best.json")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a new folder; default: export-N in the run's"
    )
    parser.add_argument(
        "--merged", action="store_true", help="the whole pipeline, with what was learned in it"
    )
    parser.add_argument(
        "--push-to-hub", action="store_true", help="upload the folder; takes a login"
    )
    parser.add_argument("--hub-model-id", metavar="OWNER/NAME", help="where to")
    parser.add_argument("--private", action="store_true", help="a repository that is made for it")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    if options.push_to_hub != (options.hub_model_id is not None):
        raise ConfigError("--push-to-hub: expected --hub-model-id OWNER/NAME beside it, or neither")
    if options.private and not options.push_to_hub:
        raise ConfigError("--private: expected --push-to-hub beside it")
    from flowkern.train.checkpoint import best_of
    from flowkern.train.export import export, push, require_login
    from flowkern.train.quiet import quiet

    if options.push_to_hub:
        require_login(options.hub_model_id, "--hub-model-id")
    quiet()
    place = best_of(options.checkpoint) if options.best else options.checkpoint
    directory = export(place, options.output, options.merged, options.hub_model_id)
    print(directory)
    if options.push_to_hub:
        print(push(directory, options.hub_model_id, options.private))
    return 0
