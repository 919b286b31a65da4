"""The flowkern command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flowkern.train.errors import RunError

ROLLOUTS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    # Importing transformers otherwise warns of image processors that no pipeline here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.command(options)
    except (RunError, ValueError, OSError, FloatingPointError, ImportError) as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, ImportError):
            message += "; training and sampling need: pip install 'flowkern[train]'"
        print(f"flowkern: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flowkern: interrupted before anything was trained", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowkern", description="Reinforcement learning of flow-matching models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    train = commands.add_parser(
        "train",
        parents=[common],
        help="train from a configuration",
        description="Train from a configuration. Ctrl-C saves the last finished step and exits; a "
        "second Ctrl-C exits at once.",
        epilog="Several processes: torchrun --standalone --nproc_per_node N scripts/train.py "
        "CONFIG.yaml, with ACCELERATE_USE_CPU=true where there is no GPU.",
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="see configs/")
    train.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        help="e.g. train.learning_rate=1e-3, train.resume_from_checkpoint=latest",
    )
    train.set_defaults(command=_train)

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="train on handwritten digits, two minutes on two CPU cores",
        description="Train a small pipeline on handwritten digits, which come with the package, "
        "into runs/ of the working directory.",
    )
    demo.add_argument("--algorithm", metavar="NAME", help="of configs/digits (default: flow-grpo)")
    demo.add_argument("overrides", metavar="key.path=value", nargs="*", help="as of train")
    demo.set_defaults(command=_demo)

    sample = commands.add_parser(
        "sample",
        parents=[common],
        help="draw images from a checkpoint",
        description="Draw images from a checkpoint with the deterministic sampler.",
    )
    sample.add_argument("checkpoint", type=Path, help="a checkpoint-N, or a run: its latest")
    sample.add_argument("--prompt", required=True)
    sample.add_argument(
        "--output",
        type=Path,
        default="sample.png",
        metavar="PATH",
        help="a .png or .jpg (default: %(default)s)",
    )
    sample.add_argument("--num-images", type=int, default=1, help="a grid if more than 1")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    sample.add_argument("--num-inference-steps", type=int, help="default: as in validation")
    sample.add_argument("--guidance-scale", type=float, help="default: as in validation")
    sample.set_defaults(command=_sample)

    cost = commands.add_parser(
        "cost",
        parents=[common],
        help="count network calls",
        description="Network calls and images per prompt, guidance not counted: of algorithms at "
        "their papers' defaults, or of a configuration. Where rollouts differ, those of the first "
        f"and the mean of {ROLLOUTS}, as many as papers' runs have (of all, in a shorter run).",
    )
    cost.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="an algorithm, or your own as module:Class (default: all that are here); with "
        "--config an override, key.path=value",
    )
    cost.add_argument("--config", metavar="CONFIG.yaml", help="count for this run")
    cost.set_defaults(command=_cost)
    return parser


def _train(options: argparse.Namespace) -> int:
    from flowkern.train.config import load_config

    config = load_config(options.config, options.overrides)  # wrong keys show before the imports
    from flowkern.train.trainer import Trainer

    return Trainer(config).run()


def _demo(options: argparse.Namespace) -> int:
    from flowkern import demo

    return demo.run(options.overrides, options.algorithm)


def _sample(options: argparse.Namespace) -> int:
    if options.num_images < 1:
        raise ValueError(f"--num-images: got {options.num_images}, expected at least 1")
    import torch

    from flowkern.rollout import prompt_ids
    from flowkern.train.checkpoint import checkpoints, find_checkpoint
    from flowkern.train.config import load_config
    from flowkern.train.loading import load_pipeline
    from flowkern.train.lora import attach_lora
    from flowkern.train.prompts import require_text
    from flowkern.train.tracking import picture_format, save_grid, save_image
    from flowkern.train.validation import SAMPLE_ITERATION, sample_images

    require_text(options.prompt, "--prompt")
    picture_format(options.output, "--output")  # refused before the work, not after it
    is_run = bool(checkpoints(options.checkpoint))
    directory = find_checkpoint("latest" if is_run else str(options.checkpoint), options.checkpoint)
    config = load_config(directory / "config.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pipeline(config, device)
    averaged = directory / "ema"  # what was validated, where train.ema_decay is set
    attach_lora(model, averaged if averaged.is_dir() else directory)
    member = torch.arange(options.num_images, device=device)
    steps, scale = options.num_inference_steps, options.guidance_scale
    images = sample_images(
        model,
        [options.prompt] * options.num_images,
        prompt_ids(SAMPLE_ITERATION, torch.zeros_like(member)) + member,
        seed=options.seed,
        num_inference_steps=config.validation.num_inference_steps if steps is None else steps,
        guidance_scale=config.validation.guidance_scale if scale is None else scale,
        max_batch=config.train.max_batch,
        size=(config.model.height, config.model.width),
    )
    if options.num_images == 1:
        save_image(options.output, images[0])
    else:
        save_grid(options.output, images, [""] * len(images), title=options.prompt)
    print(options.output)
    return 0


def _cost(options: argparse.Namespace) -> int:
    from flowkern.rl.algorithms import mean_cost, name_of, names, recipe
    from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

    if options.config is None:
        recipes = {}
        for name in options.names or names():
            kind = recipe(name)
            recipes[name] = kind()
            recipes |= {f"{name}, {form}": kind(**more) for form, more in kind.forms.items()}
        rollouts, seed = ROLLOUTS, 0
    else:
        from flowkern.train.config import load_config

        config = load_config(options.config, options.names)
        recipes = {name_of(config.algorithm): config.algorithm}
        rollouts = min(ROLLOUTS, config.train.steps // config.algorithm.updates_per_rollout)
        seed = config.seed
    rows = [("", "sampling", "released", "saved", "training", "released", "images")]
    for name, algorithm in recipes.items():
        first, mean = (mean_cost(algorithm, sd3_sigmas, range(n), seed) for n in (1, rollouts))
        found = {name: first} | ({f"  mean of {rollouts}": mean} if mean != first else {})
        for label, (ours, theirs) in found.items():
            saved = f"{1 - ours.sample / theirs.sample:.0%}"
            counts = (ours.sample, theirs.sample, ours.train, theirs.train, ours.images)
            sampling, naive, *rest = (f"{count:.1f}".removesuffix(".0") for count in counts)
            rows.append((label, sampling, naive, saved, *rest))
    print("Network calls and images per prompt, guidance not counted. Released: the authors' loop.")
    _print_table(rows)
    return 0


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the head; the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *numbers in rows:
        texts = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([label.ljust(widths[0]), *texts]))
