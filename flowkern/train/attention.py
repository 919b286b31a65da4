"""model.attention_backend: refused before a model is looked for, set, and tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowkern.checks import ConfigError
from flowkern.models import Model
from flowkern.train.config import ModelConfig, Precision
from flowkern.train.loading import DTYPES

KEY = "model.attention_backend"


def require_attention(options: ModelConfig, is_here: bool = True) -> None:
    """Raise ConfigError for a backend that a training cannot have, or that is not installed.

    is_here: training would be on this machine; otherwise what is installed does not matter.
    """
    if options.attention_backend is None:
        return
    from flowkern.models.attention_backend import require, require_name  # imports diffusers

    try:
        (require if is_here else require_name)(options.attention_backend, is_trained=True)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def set_attention(
    model: Model, name: str, precision: Precision, device: torch.device, is_trained: bool = True
) -> str:
    """Set it in a model, and try it alone; returns what was done, in a line.

    Raises ConfigError for one that is not for this network, this device or this precision.
    """
    from flowkern.models.attention_backend import try_backend

    own = getattr(torch, model.describe()["dtype"])
    dtype = own if precision == "no" else DTYPES[precision]
    try:
        count = model.set_attention_backend(name)
        try_backend(name, device, dtype, is_trained)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    return f"attention through {name}, {count} modules"


@contextmanager
def of_attention(name: str | None) -> Iterator[None]:
    """What the backend raises inside, as that it takes no mask, is said in a line."""
    try:
        yield
    except Exception as error:
        if name is None or isinstance(error, torch.OutOfMemoryError):
            raise
        from flowkern.models.attention_backend import is_of_backend

        if not is_of_backend(error):
            raise
        message = f"{KEY}: got {name!r}, but {' '.join(str(error).split()):.300}"
        raise ConfigError(message) from error
