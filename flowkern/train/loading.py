"""The pipeline of a configuration, the same for training and for sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flowkern.checks import ConfigError
from flowkern.models import load_model
from flowkern.train.config import Config, ModelConfig, Sampling

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(config: Config | Sampling, device: torch.device | str) -> Any:
    """The adapter of model.path, in the precision and with the text tokens that are configured.

    Raises ConfigError, naming the key, for a directory that cannot be used, whatever its loader
    raises, and for a size that the model does not have.
    """
    options = config.model
    limits = {"max_sequence_length": options.max_sequence_length}
    try:
        model = load_model(
            options.path,
            dtype=DTYPES[config.train.mixed_precision],
            device=device,
            **{name: value for name, value in limits.items() if value is not None},
        )
        model.latent_shape(options.height, options.width)
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loaders raise of every kind, some without a word of the file
        message = " ".join(str(error).split())
        keys = [f.name for f in dataclasses.fields(ModelConfig)]
        if not message.startswith(tuple(f"{key}: " for key in keys)):
            message = f"path: {options.path!r} cannot be loaded: {type(error).__name__}: {message}"
        raise ConfigError(f"model.{message}") from error
    return model
