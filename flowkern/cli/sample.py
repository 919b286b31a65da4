"""flowkern sample: images and videos from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "sample",
        parents=[common],
        help="draw images or videos from a checkpoint",
        description="Draw images or videos from a checkpoint with the deterministic sampler.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N, or a run: its latest")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--output",
        type=Path,
        default="sample.png",
        metavar="PATH",
        help="a .png, .webp or .jpg; a video plays in a .png or .webp (default: %(default)s)",
    )
    parser.add_argument("--num-images", type=int, default=1, help="a grid if more than 1")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--num-inference-steps", type=int, help="default: as in validation")
    parser.add_argument("--guidance-scale", type=float, help="default: as in validation")
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="of diffusers, as native; default: the run's"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except ConfigError as error:
        key, flag = "model.attention_backend", "--attention-backend"
        if not str(error).startswith(key):
            raise
        if options.attention_backend is None:  # the run's, made on another machine maybe
            raise ConfigError(f"{error}; {flag} NAME draws through another") from error
        raise ConfigError(f"{flag}{str(error).removeprefix(key)}") from error


def _run(options: argparse.Namespace) -> int:
    if not 1 <= options.num_images <= 1000:
        raise ConfigError(f"--num-images: got {options.num_images}, expected 1 to 1000")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: got {options.seed}, expected 0 to 2**63 - 1")
    from flowkern.train.checkpoint import checkpoints, find_checkpoint
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
    return _draw(options, config, directory, sampler)


def _draw(options: argparse.Namespace, config: Any, directory: Path, sampler: Any) -> int:
    """With the checkpoint of a directory and its configuration."""
    import torch

    from flowkern.rollout import prompt_ids
    from flowkern.train.attention import of_attention, set_attention
    from flowkern.train.checkpoint import taking
    from flowkern.train.loading import load_pipeline
    from flowkern.train.tracking import picture_format, save_grid, save_image
    from flowkern.train.trained import attach_trained
    from flowkern.train.validation import (
        SAMPLE_ITERATION,
        Sampler,
        require_guidance,
        sample_images,
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = options.attention_backend
    if attention is None:
        attention = config.model.attention_backend
    if (kind := config.model.quantization) is not None:
        print(f"model.quantization: {kind} was for training; drawn unquantized", file=sys.stderr)
    model = load_pipeline(config, device)
    require_guidance(model, sampler.guidance_scale, "--guidance-scale")
    if attention is not None:
        set_attention(model, attention, config.train.mixed_precision, device, is_trained=False)
    averaged = directory / "ema"  # what was validated, where train.ema_decay is set
    with taking(directory, "checkpoint"):
        attach_trained(model, config.lora, averaged if averaged.is_dir() else directory)
    model.prepare([options.prompt, model.guidance.negative_prompt])
    is_video = model.frame_rate is not None and options.num_images == 1  # several are a grid
    try:
        picture_format(options.output, "--output", is_video)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    member = torch.arange(options.num_images, device=device)
    with of_attention(attention):
        images = sample_images(
            model,
            [options.prompt] * options.num_images,
            prompt_ids(SAMPLE_ITERATION, torch.zeros_like(member)) + member,
            Sampler(sampler.num_inference_steps, sampler.guidance_scale),
            seed=options.seed,
            max_batch=config.train.max_batch,
        )
    if options.num_images == 1:
        save_image(options.output, images[0], model.frame_rate)
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
