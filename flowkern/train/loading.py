"""The pipeline of a configuration, the same for training and for sampling."""

from __future__ import annotations

import torch

from flowkern.checks import ConfigError
from flowkern.models import Model, load_model
from flowkern.train.config import Config, ModelConfig, Sampling

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(config: Config | Sampling, device: torch.device | str) -> Model:
    """The adapter of model.path, in the precision, the size and with the text tokens that are
    configured.

    Raises ConfigError, naming the key, for a directory that cannot be used, whatever its loader
    raises, and for a size that the model does not have.
    """
    options = config.model
    try:
        return load_model(
            options.path,
            dtype=DTYPES[config.train.mixed_precision],
            device=device,
            **options.model_dump(exclude={"path", "gradient_checkpointing"}),
        )
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loaders raise of every kind, some without a word of the file
        message = " ".join(str(error).split())
        keys = list(ModelConfig.model_fields)
        if not message.startswith(tuple(f"{key}: " for key in keys)):
            message = f"path: {options.path!r} cannot be loaded: {type(error).__name__}: {message}"
        raise ConfigError(f"model.{message}") from error
