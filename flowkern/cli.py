"""The flowkern command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowkern import __version__
from flowkern.checks import ConfigError
from flowkern.lookup import nearest
from flowkern.train.errors import RunError

ROLLOUTS = 300
OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w:-]+)*=")
OPTIONS = ("help", "traceback", "config", "algorithm")  # which are no keys
# What `pip install 'flowkern[train]'` brings, as it is imported.
EXTRAS = {"accelerate", "diffusers", "matplotlib", "peft", "PIL", "yaml", "safetensors"}
EXTRAS |= {"pydantic", "tqdm", "transformers"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a configuration that cannot be used, 1
    anything else, 128 + a signal. `--help` and what cannot be parsed raise SystemExit, as argparse
    does.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    if given[0] not in commands and not given[0].startswith("-"):
        near = nearest(given[0], commands)
        hint = f"; did you mean {near!r}?" if near else ""
        _fail(f"got {given[0]!r}, expected one of {', '.join(commands)}{hint}")
    options = parser.parse_args(_as_overrides(given))
    # Importing transformers otherwise warns of image processors that no pipeline here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.command(options)
    except (RunError, ValueError, OSError, FloatingPointError, ImportError) as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split())
        missing = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and missing in EXTRAS:
            message += "; training and sampling need: pip install 'flowkern[train]'"
        print(f"flowkern: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("flowkern: interrupted", file=sys.stderr)
        return 130


def _as_overrides(arguments: Sequence[str]) -> list[str]:
    """`--key.path=value` and `--key.path value` of a configuration as `key.path=value`."""
    if arguments[0] not in ("train", "demo", "cost"):
        return list(arguments)
    out, rest = [], iter(arguments)
    for argument in rest:
        name = argument.removeprefix("--")
        is_key = argument.startswith("--") and name and name.partition("=")[0] not in OPTIONS
        if is_key and "=" not in name:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                _fail(f"--{name}: expected a value: --{name} VALUE, or {name}=VALUE")
            name = f"{name}={value}"
        out.append(name if is_key else argument)
        if argument in ("--config", "--algorithm"):
            out += [value for value in [next(rest, None)] if value is not None]
    return out


def _fail(message: str, command: str = "flowkern") -> NoReturn:
    print(f"flowkern: {message}; see {command} --help", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _fail(message, self.prog)


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of its commands."""
    parser = _Parser(
        prog="flowkern",
        description="Reinforcement learning of flow-matching models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flowkern {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    train = commands.add_parser(
        "train",
        parents=[common],
        help="train from a configuration",
        allow_abbrev=False,
        description="Train from a configuration. Ctrl-C saves the last finished step and exits; a "
        "second Ctrl-C exits at once.",
        epilog="Several processes: torchrun --standalone --nproc_per_node N scripts/train.py "
        "CONFIG.yaml, with ACCELERATE_USE_CPU=true where there is no GPU.",
    )
    train.add_argument(
        "arguments",
        metavar="CONFIG.yaml [MORE.yaml ...] [key.path=value ...]",
        nargs="*",
        help="see configs/; files are merged from the first to the last (reward: replaced), then "
        "single keys are set, key.path=value or --key.path value, e.g. train.learning_rate=1e-3, "
        "train.resume_from_checkpoint=latest",
    )
    train.set_defaults(command=_train)

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="train on handwritten digits, two minutes on two CPU cores",
        description="Train a small pipeline on handwritten digits, which come with the package, "
        "into runs/ of the working directory.",
    )
    demo.add_argument("--algorithm", metavar="NAME", help="see flowkern cost for the names")
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
        "--config an override, key.path=value or --key.path value",
    )
    cost.add_argument("--config", metavar="CONFIG.yaml", help="count for this run")
    cost.set_defaults(command=_cost)
    return parser, commands.choices


def _train(options: argparse.Namespace) -> int:
    from flowkern.train.config import load_config

    files = [text for text in options.arguments if not OVERRIDE.match(text)]
    overrides = [text for text in options.arguments if OVERRIDE.match(text)]
    if not files:
        _fail("train: expected a CONFIG.yaml, as in configs/", "flowkern train")
    config = load_config(files, overrides)  # what is wrong there shows before the imports
    from flowkern.train.loop import Loop

    return Loop(config).run()


def _demo(options: argparse.Namespace) -> int:
    from flowkern import demo

    return demo.run(options.overrides, options.algorithm)


def _sample(options: argparse.Namespace) -> int:
    if not 1 <= options.num_images <= 1000:
        raise ConfigError(f"--num-images: got {options.num_images}, expected 1 to 1000")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: got {options.seed}, expected 0 to 2**63 - 1")
    from flowkern.train.checkpoint import checkpoints, find_checkpoint, taking
    from flowkern.train.config import load_sampling
    from flowkern.train.prompts import require_text
    from flowkern.train.tracking import picture_format

    try:
        require_text(options.prompt, "--prompt")
        picture_format(options.output, "--output")  # refused before the work, not after it
    except ValueError as error:
        raise ConfigError(str(error)) from None
    name = "latest" if checkpoints(options.checkpoint) else str(options.checkpoint)
    directory = find_checkpoint(name, options.checkpoint, key="checkpoint")
    config = load_sampling(directory / "config.yaml")
    sampler = _sampler(config.validation, options)  # what is wrong there shows before the imports
    import torch

    from flowkern.rollout import prompt_ids
    from flowkern.train.loading import load_pipeline
    from flowkern.train.lora import attach_lora
    from flowkern.train.tracking import save_grid, save_image
    from flowkern.train.validation import SAMPLE_ITERATION, sample_images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pipeline(config, device)
    averaged = directory / "ema"  # what was validated, where train.ema_decay is set
    with taking(directory, "checkpoint"):
        attach_lora(model, config.lora, averaged if averaged.is_dir() else directory)
    member = torch.arange(options.num_images, device=device)
    images = sample_images(
        model,
        [options.prompt] * options.num_images,
        prompt_ids(SAMPLE_ITERATION, torch.zeros_like(member)) + member,
        seed=options.seed,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        max_batch=config.train.max_batch,
    )
    if options.num_images == 1:
        save_image(options.output, images[0])
    else:
        save_grid(options.output, images, [""] * len(images), title=options.prompt)
    print(options.output)
    return 0


def _sampler(validation: Any, options: argparse.Namespace) -> Any:
    """The sampler of validation, with what the command line says of it."""
    from flowkern.train.fields import build

    given = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale")}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        return build(type(validation), validation.model_dump() | changed)
    except ConfigError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from None


def _cost(options: argparse.Namespace) -> int:
    from flowkern.rl.algorithms import name_of, names, recipe
    from flowkern.rl.cost import mean_cost
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
