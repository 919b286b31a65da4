"""What a reward takes and returned: the one place that knows which scores are numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["real_numbers", "scores_and_info", "takes_group"]


def takes_group(reward: Any) -> bool:
    """Does it score an image among those of its prompt: has it a keyword `group`? A reward whose
    signature is another's has an attribute of this name.
    """
    said = getattr(reward, "takes_group", None)
    if said is not None:
        return bool(said)
    is_code = inspect.isfunction(reward) or inspect.ismethod(reward)
    call = reward if is_code else type(reward).__call__
    try:
        return "group" in inspect.signature(call).parameters
    except (TypeError, ValueError):  # of C
        return False


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
