"""The pipeline of a configuration, the same for training and for sampling."""

from __future__ import annotations

import torch

from flowkern.checks import ConfigError
from flowkern.models import Model, load_model
from flowkern.models.directory import cannot_be_loaded
from flowkern.train.config import Config, ModelConfig, Sampling

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS = {"path", "vae_dtype", "prompt_cache"}
OURS |= {"gradient_checkpointing", "attention_backend", "compile", "quantization"}
"""Options that are not the adapter's."""
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_pipeline(config: Config | Sampling, device: torch.device | str) -> Model:
    """The adapter of model.path, in the precision, the size and with the text tokens that are
    configured. A network whose own weights are trained is in float32, whatever it computes in; for
    drawing it is as others are. Where a training has a cache of prompts, text encoders are loaded
    when it lacks one. A network that is to be quantized or split stays on the host: not all of
    it may fit elsewhere before.

    Raises ConfigError, naming the key, for a directory that cannot be used, whatever its loader
    raises, and for a size that the model does not have.
    """
    options, dtype = config.model, DTYPES[config.train.mixed_precision]
    trains_all = config.lora is None and isinstance(config, Config)
    network = torch.float32 if trains_all else dtype
    is_small_there = options.quantization is not None or config.train.sharding is not None
    is_large = is_small_there and isinstance(config, Config)
    has_cache = options.prompt_cache is not None and isinstance(config, Config)
    try:
        return load_model(
            options.path,
            dtype={"default": dtype, "network": network, "vae": VAE_DTYPES[options.vae_dtype]},
            device={"default": device} | ({"network": "cpu"} if is_large else {}),
            text_encoders=not has_cache,
            **options.model_dump(exclude=OURS),
        )
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = cannot_be_loaded(options.path, error, list(ModelConfig.model_fields))
        raise ConfigError(f"model.{message}") from error
