"""The pipeline of a configuration, the same for training and for sampling."""

from __future__ import annotations

from typing import Any

import torch

from flowkern.models import load_model
from flowkern.train.config import Config

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(config: Config, device: torch.device | str) -> Any:
    """The adapter of model.path, in the precision and with the text tokens that are configured."""
    limits = {"max_sequence_length": config.model.max_sequence_length}
    return load_model(
        config.model.path,
        dtype=DTYPES[config.train.mixed_precision],
        device=device,
        **{name: value for name, value in limits.items() if value is not None},
    )
