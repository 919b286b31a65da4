"""The repeated blocks of a network, compiled: sampling and training run one graph.

A compiler fuses a graph that keeps values for a backward pass otherwise than one that keeps none,
and in 16 bits the two answer differently: by up to .016 on an H200 (docs/gpu.md), with emulated
casts, too. So where nothing learns a block runs as it does where something learns, and what it
answers is cut off at once: its values are freed block by block. One graph serves one number of
rows; fewer are filled up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowkern import torch_private as private

__all__ = ["BACKEND", "Compiled", "repeated"]

BACKEND = "inductor"
RECOMPILES = 64
"""Graphs of one function, at most; torch's 8 are fewer than a network's sorts of blocks take."""

Call = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(x_t (B, *D), sigma (B,), parts of B rows) -> velocity (B, *D)"""


def repeated(network: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks of which a network has many; names: of their classes, where the network does not
    say it by `_repeated_blocks`.

    Raises ValueError where there are none.
    """
    said = [getattr(type(module), "_repeated_blocks", None) for module in network.modules()]
    names = next(filter(None, said), names)
    found = [module for module in network.modules() if type(module).__name__ in names]
    if not found:
        kind = type(getattr(network, "base_model", network)).__name__
        raise ValueError(f"{kind} does not say which of its blocks repeat")
    return found


class Compiled:
    """Blocks that are compiled in place: their names stay. `ask` is how their network is called."""

    def __init__(self, blocks: Sequence[nn.Module], rows: int) -> None:
        """rows: of every call."""
        self.blocks, self.rows, self._is_cut = blocks, rows, False
        self._graphs, self._begin = private.count_graphs(), time.monotonic()
        private.allow_graphs(RECOMPILES)
        # Casts that fusing would skip are made, as without a compiler.
        options = {"emulate_precision_casts": True} if BACKEND == "inductor" else None
        for block in blocks:
            compiled = torch.compile(
                block.forward, fullgraph=True, dynamic=False, backend=BACKEND, options=options
            )
            block.forward = partial(self._forward, compiled)

    def _forward(self, compiled: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
        out = compiled(*inputs, **more)
        return _cut(out) if self._is_cut else out

    def ask(self, call: Call, x_t: Tensor, sigma: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """What `call` answers; with a gradient where gradients are on.

        Raises ValueError for more rows than the blocks are compiled for.
        """
        count = len(x_t)
        if count > self.rows:
            raise ValueError(f"x_t: got {count} rows, expected at most {self.rows}")
        if count < self.rows:
            on_host = torch.arange(self.rows).clamp(max=count - 1)
            row = on_host.to(x_t.device, non_blocking=True)
            x_t, sigma = x_t[row], sigma[row]
            parts = {n: part[on_host if part.is_cpu else row] for n, part in parts.items()}
        if torch.is_grad_enabled():
            return call(x_t, sigma, dict(parts))[:count]
        self._is_cut = True
        try:
            with torch.enable_grad():
                return call(x_t, sigma, dict(parts)).detach()[:count]
        finally:
            self._is_cut = False

    @property
    def graphs(self) -> int:
        """Compiled so far, each with what it has for the way back."""
        return private.count_graphs() - self._graphs

    @property
    def seconds(self) -> float:
        """Since they began."""
        return time.monotonic() - self._begin


def _cut(out: Any) -> Any:
    """Without what led to it; it asks for a gradient if it did, so that the next block sees what it
    sees in training."""
    if isinstance(out, tuple | list):
        return type(out)(_cut(each) for each in out)
    return out.detach().requires_grad_(out.requires_grad) if isinstance(out, Tensor) else out
