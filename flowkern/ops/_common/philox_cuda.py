"""Philox normals by the native CUDA kernel (csrc/sde_step)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, native_cuda
from .arguments import Noise


def cuda_normal(shape: Sequence[int], key: Noise, stream: int, device: torch.device) -> Tensor:
    out = torch.empty(tuple(shape), device=device)
    if out.numel():
        native.cuda().fill_philox(
            native_cuda.queue(out), shape[0], math.prod(shape[1:]), out.data_ptr(),
            native_cuda.key(key, stream),
        )  # fmt: skip
    return out
