"""What calls take on a device, found without one: on the meta device every tensor has a shape and
no values, so a network of any size is asked and differentiated, and its kernels are looked at.

Attention is one fused kernel that keeps no N x N scores, but for torch's "math", and autocast is as
CUDA has it, whose rules the meta device has not: what is multiplied is of 16 bits, norms and powers
are float32.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

from flowkern import torch_private as private
from flowkern.models import attention

__all__ = ["Kernel", "Taken", "dry_run", "dry_run_of_blocks"]


class Kernel(NamedTuple):
    operations: float
    """Of products and attention; nothing that is computed again within an attention."""
    bytes: int
    """That it reads and writes."""


@dataclass(frozen=True)
class Taken:
    """What a call took."""

    kernels: Mapping[Kernel, int]
    """How many of each."""
    peak: int
    """Bytes at most, of what it made: what was there before is not among them."""

    @property
    def operations(self) -> float:
        return sum(kernel.operations * count for kernel, count in self.kernels.items())


def dry_run(
    call: Callable[[], Any], dtype: torch.dtype | None = None, keeps_scores: bool = False
) -> Taken:
    """Run a call whose tensors are on the meta device. dtype: of autocast; None: there is none.
    keeps_scores: attention is torch's "math", in many kernels, which keeps them."""
    ledger = _Ledger()
    with ledger, _Precision(dtype, keeps_scores):
        found = call()
        del found
    return Taken(ledger.kernels, ledger.peak)


def dry_run_of_blocks(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    call: Callable[[], Any],
    dtype: torch.dtype | None = None,
    keeps_scores: bool = False,
) -> Taken:
    """The same, of a network whose `blocks` repeat: two of each sort are run, and for every sort a
    third, from which the others follow. Not from the second: what comes into a network's first
    block needs no gradient, so less of it is kept."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and {*m} & {*blocks}]
    sorts: dict[Any, list[nn.Module]] = {}
    for each in lists:
        for block in each:
            sizes = tuple(tuple(p.shape) for p in block.parameters())
            sorts.setdefault((id(each), type(block), sizes), []).append(block)
    first = {block for alike in sorts.values() for block in alike[:KEPT]}

    def run(more: set[nn.Module]) -> Taken:
        with _cut(network, lists, first | more):
            return dry_run(call, dtype, keeps_scores)

    base = run(set())
    kernels, peak = Counter(base.kernels), base.peak
    for alike in sorts.values():
        if (others := len(alike) - KEPT) > 0:
            more = run({alike[KEPT]})
            peak += others * (more.peak - base.peak)
            for kernel in {*more.kernels, *base.kernels}:
                kernels[kernel] += others * (more.kernels[kernel] - base.kernels[kernel])
    return Taken(kernels, peak)


@contextmanager
def _cut(network: nn.Module, lists: list[nn.ModuleList], kept: set[nn.Module]) -> Iterator[None]:
    """With these blocks alone."""
    whole = [(each, dict(each._modules)) for each in lists]
    try:
        for each, blocks in whole:
            left = [block for block in blocks.values() if block in kept]
            each._modules.clear()
            each.extend(left)
        yield
    finally:
        for each, blocks in whole:
            each._modules.clear()
            each._modules.update(blocks)


KEPT = 2
"""Blocks of a sort that are run by themselves."""


class _Ledger(TorchDispatchMode):
    """Writes down each kernel, and how much is alive."""

    seen: ClassVar[dict[Any, Callable[[], tuple[Any, Kernel]]]] = {}
    """What makes the answer of a call again, where all of it is new: blocks repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, form = tree_flatten((args, kwargs or {}))
        key = func, str(form), *map(_like, given)
        if key in self.seen:
            out, kernel = self.seen[key]()
            self._write(tree_leaves(out), kernel)
            return out
        out = func(*args, **(kwargs or {}))
        places = {_place(x): x.nbytes for x in given if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in made if _place(x) not in places]
        is_in_place = func._schema.is_mutable
        if fresh or is_in_place:
            counted = flop_registry.get(func._overloadpacket)
            operations = counted(*args, **(kwargs or {}), out_val=out) if counted else 0
            if func._overloadpacket is FLASH_BACKWARD:
                operations *= 4 / 5  # of its five products one makes the scores again
            written = sum(x.nbytes for x in (made if is_in_place else fresh))
            kernel = Kernel(operations, written + sum(places.values()))
            self._write(fresh, kernel)
            if len(fresh) == len(made) and not is_in_place and all(x.is_meta for x in made):
                leaves, form = tree_flatten(out)
                shapes = [_like(x) if isinstance(x, Tensor) else x for x in leaves]
                self.seen[key] = partial(_again, shapes, form, kernel)
        return out

    def _write(self, fresh: Sequence[Any], kernel: Kernel) -> None:
        self.kernels[kernel] += 1
        for x in fresh:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.peak = max(self.peak, self.alive)

    def _drop(self, size: int) -> None:
        self.alive -= size


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _like(x: Any) -> Any:
    """By what a kernel tells it from others."""
    return _Shape(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)


def _again(shapes: Sequence[Any], form: Any, kernel: Kernel) -> tuple[Any, Kernel]:
    made = [
        torch.empty_strided(s.size, s.stride, dtype=s.dtype, device="meta")
        if isinstance(s, _Shape)
        else s
        for s in shapes
    ]
    return tree_unflatten(made, form), kernel


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, torch.bmm}
PRODUCTS |= {Tensor.__matmul__, torch.baddbmm, attention.plain}
EXACT = {F.layer_norm, F.group_norm, F.softmax, F.mse_loss, torch.softmax, torch.pow, torch.rsqrt}
EXACT |= {torch.sum, Tensor.softmax, Tensor.pow, Tensor.sum}
HAS_EXACT_RMS = TorchVersion(torch.__version__) >= (2, 12)
"""Does autocast have rms_norm in float32, as from torch 2.12 on (pytorch/pytorch#174824)?"""


class _Precision(TorchFunctionMode):
    """Autocast, and attention as one kernel."""

    def __init__(self, dtype: torch.dtype | None, keeps_scores: bool) -> None:
        super().__init__()
        self.dtype, self.keeps_scores = dtype, keeps_scores
        self.weights: dict[Tensor, Tensor] = {}
        """Those that learn, cast once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, is_rms = kwargs or {}, func is F.rms_norm
        if func is Tensor.backward:  # within which blocks may be computed again
            with self:
                return private.run_backward(args[0])
        if self.dtype is not None and func in PRODUCTS:
            args, kwargs = tree_map(self._narrow, (args, kwargs))
        elif self.dtype is not None and (func in EXACT or (is_rms and HAS_EXACT_RMS)):
            args, kwargs = tree_map(_wide, (args, kwargs))
        if func is attention.plain:
            return (_scores if self.keeps_scores else _attention)(*args, **kwargs)
        return (_rms_norm if is_rms else func)(*args, **kwargs)

    def _narrow(self, x: Any) -> Any:
        if not _has_floats(x) or x.dtype == self.dtype:
            return x
        if not (isinstance(x, nn.Parameter) and x.requires_grad):
            return x.to(self.dtype)
        if x not in self.weights:
            self.weights[x] = x.to(self.dtype)
        return self.weights[x]


def _wide(x: Any) -> Any:
    return x.float() if _has_floats(x) else x


def _has_floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _scores(query: Tensor, key: Tensor, value: Tensor, *masks: Any, **more: Any) -> Tensor:
    """In float32 whatever comes in."""
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, *masks, **more)[0]


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel that keeps what came in, as CUDA has it, where input and weight are of one dtype:
    a layer norm reads, writes and keeps as much. The meta device would do it in eight."""
    if weight is not None and weight.dtype != x.dtype:
        return F.rms_norm(x, shape, weight, eps)
    return torch.native_layer_norm(x, shape, weight, None, eps or 0.0)[0]
