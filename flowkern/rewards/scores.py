"""What a reward returned, as numbers: the one place that knows what may be returned."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["real_numbers", "scores_and_info"]


def scores_and_info(found: Any) -> tuple[Any, Mapping[Any, Any]]:
    """The scores that a reward returned, and what it reports beside, which may be nothing."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        return found
    return found, {}


def real_numbers(found: Any, count: int) -> Tensor:
    """(count,) float64 of a tensor, an array or a list, never its own memory.

    Raises ValueError saying what it is instead.
    """
    if isinstance(found, list | tuple):
        items = [item.item() if hasattr(item, "item") else item for item in found]
        for i, item in enumerate(items):
            if not isinstance(item, Real):
                raise ValueError(f"{item!r:.80} in place {i} of a {type(found).__name__}")
        value = torch.tensor([float(item) for item in items], dtype=torch.float64)
    elif isinstance(found, Tensor):
        value = found.detach()
        if value.is_complex():
            raise ValueError(f"a tensor of {value.dtype}")
    elif hasattr(found, "__array__"):
        array = np.asarray(found)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of {array.dtype}")
        value = torch.from_numpy(array.astype(np.float64))
    else:
        raise ValueError("None" if found is None else f"a {type(found).__name__}")
    if value.shape != (count,):
        raise ValueError(f"shape {tuple(value.shape)}")
    return value.to(torch.float64, copy=True)
