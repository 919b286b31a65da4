"""flowkern sample: images and videos from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkern.checks import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from flowkern.train.draw import Asked

MODEL = ("height", "width", "num_frames", "negative_prompt")
"""Options that are the model's, and may be others than the run's."""
ATTENTION = "attention_backend"
SAMPLER = ("num_inference_steps", "guidance_scale")
MOST = 1000  # images of a prompt


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "sample",
        parents=[common],
        help="draw images or videos from a checkpoint, beside the base model's",
        description="Draw images or videos from a checkpoint with the deterministic sampler.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N, or a run: its latest")
    parser.add_argument("--best", action="store_true", help="of a run, that of its best.json")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="of prompts, as data.train_prompts",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default="sample.png",
        metavar="PATH",
        help="a .png, .webp or .jpg, a grid of several; a video plays in a .png, .webp or .mp4 "
        "(pip install 'flowkern[video]'); a name without an ending: a folder with a file for each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="beside each what the base model draws"
    )
    parser.add_argument("--num-images", type=int, default=1, help="of a prompt and a seed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the noise; or several")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of what was learned; 0: the base model"
    )
    parser.add_argument(
        "--trained-steps",
        type=int,
        metavar="K",
        help="what was learned draws the first K steps, and the base model the rest: a reward is "
        "often hacked in the last ones",
    )
    parser.add_argument("--num-inference-steps", type=int, help="default: as in validation")
    parser.add_argument("--guidance-scale", type=float, help="default: as in validation")
    parser.add_argument("--negative-prompt", help="default: the run's")
    for side in ("height", "width", "num-frames"):
        parser.add_argument(f"--{side}", type=int, metavar="N", help="default: the run's")
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="of diffusers, as native; default: the run's"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except ConfigError as error:
        key = str(error).partition(":")[0]
        name = key.removeprefix("model.")
        if key == name or name not in (*MODEL, ATTENTION):
            raise
        if getattr(options, name) is not None:
            raise ConfigError(f"{_flag(name)}{str(error).removeprefix(key)}") from error
        if name != ATTENTION:
            raise
        # The run's, made on another machine maybe.
        raise ConfigError(f"{error}; {_flag(name)} NAME draws through another") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(options: argparse.Namespace) -> int:
    _check(options)
    from flowkern.rl.algorithms import PLANNERS
    from flowkern.train.checkpoint import best_of, chosen
    from flowkern.train.config import load_sampling
    from flowkern.train.durable import require_writable
    from flowkern.train.prompts import read_prompts, require_text
    from flowkern.train.tracking import picture_format
    from flowkern.train.tree import read_file

    try:  # refused before the work, not after it
        for name in ("prompt", "negative_prompt"):
            require_text(getattr(options, name) or "", _flag(name))
        if options.output.suffix:
            picture_format(options.output, "--output", None)
        require_writable(options.output, "--output")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    directory = chosen(best_of(options.checkpoint) if options.best else options.checkpoint)
    algorithm = read_file(directory / "config.yaml").get("algorithm")
    if isinstance(algorithm, dict) and algorithm.get("name") in PLANNERS:
        raise ConfigError(
            f"checkpoint: {str(directory)!r} is of a language model, and draws nothing"
        )
    config = load_sampling(directory / "config.yaml")
    # What is wrong there shows before the imports.
    sampler = _changed(config.validation, options, SAMPLER)
    model = _changed(config.model, options, MODEL)
    if options.attention_backend is not None:
        model = model.model_copy(update={ATTENTION: options.attention_backend})
    if options.trained_steps is not None and options.trained_steps > sampler.num_inference_steps:
        raise ConfigError(
            f"--trained-steps: got {options.trained_steps}, expected 1 to "
            f"--num-inference-steps, {sampler.num_inference_steps}"
        )
    if options.negative_prompt is not None and sampler.guidance_scale <= 1:
        raise ConfigError(
            f"--negative-prompt: --guidance-scale is {sampler.guidance_scale:g}, which asks for no "
            "guidance; expected it above 1"
        )
    prompts = [options.prompt]
    if options.prompts is not None:
        prompts = [prompt["prompt"] for prompt in read_prompts(options.prompts, "--prompts")]
    from flowkern.train.draw import Asked
    from flowkern.train.validation import Sampler

    asked = Asked(
        prompts,
        Sampler(sampler.num_inference_steps, sampler.guidance_scale),
        options.seed,
        options.num_images,
        options.strength,
        options.trained_steps,
        config.train.max_batch,
    )
    return _draw(options, config.model_copy(update={"model": model}), directory, asked)


def _check(options: argparse.Namespace) -> None:
    """What shows without a checkpoint."""
    if not 1 <= options.num_images <= MOST:
        raise ConfigError(f"--num-images: got {options.num_images}, expected 1 to {MOST}")
    for seed in options.seed:
        if not 0 <= seed < 2**63:
            raise ConfigError(f"--seed: got {seed}, expected 0 to 2**63 - 1")
    if not -10 <= options.strength <= 10:
        raise ConfigError(f"--strength: got {options.strength}, expected -10 to 10")
    if options.trained_steps is not None and options.trained_steps < 1:
        raise ConfigError(f"--trained-steps: got {options.trained_steps}, expected 1 or more")
    output = options.output
    if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {str(output)!r} is there; expected a new folder")


def _check_name(output: Path, asked: Asked, is_video: bool | None) -> None:
    """Does what is drawn fit what its file is to be? is_video: None: that is not known yet."""
    from flowkern.train.tracking import picture_format

    if len(asked.prompts) * asked.each > 1:  # several are a grid
        is_video = False
    if output.suffix:
        try:
            picture_format(output, "--output", is_video)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _changed(section: Any, options: argparse.Namespace, names: tuple[str, ...]) -> Any:
    """A section of the run's configuration, with what the command line says of it."""
    from flowkern.train.fields import build

    given = {name: getattr(options, name) for name in names}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        return build(type(section), section.model_dump() | changed)
    except ConfigError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from None


def _draw(options: argparse.Namespace, config: Any, directory: Path, asked: Asked) -> int:
    """With the checkpoint of a directory and its configuration."""
    import torch

    from flowkern.train.attention import of_attention, set_attention
    from flowkern.train.checkpoint import taking
    from flowkern.train.draw import draw, draws_videos
    from flowkern.train.loading import load_pipeline
    from flowkern.train.quiet import quiet
    from flowkern.train.trained import Blend
    from flowkern.train.validation import require_guidance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quiet()
    attention = config.model.attention_backend
    if (kind := config.model.quantization) is not None:
        print(f"model.quantization: {kind} was for training; drawn unquantized", file=sys.stderr)
    _check_name(options.output, asked, draws_videos(config.model))
    model = load_pipeline(config, device)
    require_guidance(model, asked.sampler.guidance_scale, "--guidance-scale")
    if attention is not None:
        set_attention(model, attention, config.train.mixed_precision, device, is_trained=False)
    averaged = directory / "ema"  # what was validated, where train.ema_decay is set
    with taking(directory, "checkpoint"):
        blend = Blend(model, config.lora, averaged if averaged.is_dir() else directory)
    model.prepare([*asked.prompts, model.guidance.negative_prompt])
    _check_name(options.output, asked, model.frame_rate is not None)
    with of_attention(attention):
        images = {"trained": draw(model, blend, asked, device)}
        if options.compare:
            images = {"base": draw(model, blend, asked.base, device), **images}
    _write(options.output, asked, images, model.frame_rate)
    print(options.output)
    return 0


def _write(output: Path, asked: Asked, images: dict[str, Tensor], rate: float | None) -> None:
    """images: by whose they are, in the order that they are shown in."""
    import torch

    from flowkern.train.tracking import save_grid, save_image

    count, names = len(asked.prompts) * asked.each, list(images)
    if not output.suffix:
        for i in range(count):
            for name in names:
                whose = f"-{name}" if len(names) > 1 else ""
                stem = f"{i // asked.each:04d}-{i % asked.each}{whose}"
                save_image(output / f"{stem}{'.webp' if rate else '.png'}", images[name][i], rate)
    elif count == 1 and (rate or len(names) == 1):  # videos side by side play together
        save_image(output, torch.cat([one[0] for one in images.values()], dim=-1), rate)
    else:
        shown = torch.stack(list(images.values()), 1).flatten(0, 1)
        texts = asked.prompts if len(asked.prompts) > 1 else [""]
        prompts = [text for text in texts for _ in range(asked.each)]
        captions = [
            " ".join(filter(None, [f"{name}:" if text else name, text])) if len(names) > 1 else text
            for text in prompts
            for name in names
        ]
        columns = 2 * min(count, 2) if len(names) > 1 else None
        title = "" if len(asked.prompts) > 1 else asked.prompts[0]
        save_grid(output, shown, captions, title=title, columns=columns)
