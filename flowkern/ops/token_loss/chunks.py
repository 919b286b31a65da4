"""The loop over chunks of tokens: a GEMM makes their logits, a row kernel overwrites these with
their gradient, and two GEMMs take it to the hidden states and the head. Nothing is computed twice.

A row kernel is a module with three functions, which triton_impl describes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern import torch_private as private

from .inputs import Head, Objective, Statistics, Tokens, spread

LEAST_ROWS = 256  # fewer, and each GEMM into the head's gradient reads and writes it for too little
ALIGNED = 16  # logits from row to row: GEMMs and kernels take them in whole vectors
LEAST_WEIGHT = 2.0**-100  # of the largest token's; a smaller one leaves no float16 anything
TILE = 1024  # rows of the head, or of its gradient, that a CPU's cache holds


class Made(NamedTuple):
    """What a pass over all tokens makes: each gradient, of hidden, weight and bias, is in a unit of
    its own (None: 1), in which 16 bits hold it.
    """

    statistics: Statistics
    gradients: tuple[Tensor | None, ...]
    unit: Tensor | None


class Wanted(NamedTuple):
    """Which gradients are."""

    hidden: bool
    weight: bool
    bias: bool


def chunk_rows(count: int, vocabulary: int, itemsize: int, budget_bytes: int) -> int:
    """Rows of a chunk: what the budget holds, but at least LEAST_ROWS; all chunks about as long."""
    most = max(LEAST_ROWS, budget_bytes // (_width(vocabulary) * itemsize))
    if count <= most:
        return max(1, count)
    chunks = -(-count // most)
    even = -(-count // chunks)
    for multiple in (128, 16):  # of what the tiles of a GEMM are made of
        if -(-even // multiple) * multiple <= most:
            return -(-even // multiple) * multiple
    return even


def _width(vocabulary: int) -> int:
    return -(-vocabulary // ALIGNED) * ALIGNED


def gemm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What GEMMs are made in, and logits kept in: float32, to which tiles of the head are brought
    in its cache, on a CPU that multiplies 16 bits no faster.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    return dtype if dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


@private.as_constant
def _multiplies_bfloat16() -> bool:
    """Without instructions for it a GEMM takes 4 to 100 times as long as in float32; with those of
    AVX-512 half as long on AMD's cores, but 1.5 times as long on Intel's.
    """
    has = torch.cpu.get_capabilities()
    is_amd = has.get("cpu_name", "").startswith("AMD")
    return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and is_amd)


def policy_pass(
    kernel: ModuleType, tokens: Tokens, head: Head, objective: Objective, wanted: Wanted
) -> Made:
    count, (tokens, index) = len(tokens.ids), tokens.weighted()
    hidden, unit = tokens.hidden, None
    if hidden.dtype == torch.float16:
        unit = _unit(tokens.token_weight)
        tokens = tokens._replace(token_weight=tokens.token_weight / unit)
    statistics = Statistics.empty(len(hidden), hidden.device)
    chunks = list(_chunks(hidden, head))
    learning = _learning(tokens.advantage, objective) if any(wanted) else []
    gradients = Gradients(hidden, head, wanted, len(chunks))
    with _workspace(hidden, head, chunks) as memory:
        for rows in chunks:
            logits = _logits(hidden[rows], head, memory)
            of_chunk = tokens.at(rows)
            kernel.policy_rows(logits, head, of_chunk, objective, statistics.at(rows), any(wanted))
            for run in learning:
                first, last = max(run.start, rows.start), min(run.stop, rows.stop)
                if first < last:
                    there = slice(first - rows.start, last - rows.start)
                    gradients.add(logits[there], slice(first, last))
    of_hidden, *of_head = gradients.finished()
    if of_hidden is not None and index is not None:
        of_hidden = spread(of_hidden, index, count)
    if unit is not None:
        statistics = statistics._replace(loss=statistics.loss * unit)
    return Made(statistics.spread(index, count), (of_hidden, *of_head), unit)


def _unit(token_weight: Tensor) -> Tensor:
    """A power of two that brings weights to between 32 and 64: float16 has no gradient of a logit
    below 6e-8, and a weight may be 1e-6. Slopes go up to 1,000 times that.
    """
    if not len(token_weight):
        return token_weight.new_ones(())
    largest = token_weight.abs().nan_to_num(0, 0).amax()  # one that is no number has its own row
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=LEAST_WEIGHT))) - 6)


def log_prob_pass(
    kernel: ModuleType, hidden: Tensor, head: Head, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,), and what the backward pass reads of them, (2, M): the largest logit
    and the logarithm of the sum.
    """
    log_prob = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
    normalizer = torch.empty(2, len(ids), dtype=torch.float32, device=ids.device)
    chunks = list(_chunks(hidden, head))
    with _workspace(hidden, head, chunks) as memory:
        for rows in chunks:
            logits = _logits(hidden[rows], head, memory)
            out = log_prob[rows], normalizer[:, rows]
            kernel.log_prob_rows(logits, head, hidden[rows], ids[rows], out)
    return log_prob, normalizer


def log_prob_gradients(
    kernel: ModuleType,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias: the logits are made again."""
    chunks = list(_chunks(hidden, head))
    gradients = Gradients(hidden, head, wanted, len(chunks))
    with _workspace(hidden, head, chunks) as memory:
        for rows in chunks:
            logits = _logits(hidden[rows], head, memory)
            given = normalizer[:, rows], grad[rows]
            kernel.gradient_rows(logits, head, hidden[rows], ids[rows], given)
            gradients.add(logits, rows)
    return gradients.finished()


def _chunks(hidden: Tensor, head: Head) -> Iterator[slice]:
    count = len(hidden)
    itemsize = gemm_dtype(hidden.device, hidden.dtype).itemsize
    size = chunk_rows(count, len(head.weight), itemsize, head.budget_bytes)
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def _logits(hidden: Tensor, head: Head, memory: Tensor) -> Tensor:
    """(rows, V) in `memory`, without softcap and temperature."""
    rows, vocabulary = len(hidden), len(head.weight)
    width = _width(vocabulary)
    logits = memory[: rows * width].view(rows, width)[:, :vocabulary]
    if logits.dtype != hidden.dtype:
        hidden = hidden.to(logits.dtype)
        for tile, weight in _tiles(head.weight, logits.dtype):
            torch.mm(hidden, weight.t(), out=logits[:, tile])
        return logits if head.bias is None else logits.add_(head.bias)
    if head.bias is None:
        return torch.mm(hidden, head.weight.t(), out=logits)
    return torch.addmm(head.bias, hidden, head.weight.t(), out=logits)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the head in another dtype, in memory that the next ones take."""
    memory = weight.new_empty(min(TILE, len(weight)), weight.shape[1], dtype=dtype)
    for begin in range(0, len(weight), TILE):
        tile = slice(begin, min(begin + TILE, len(weight)))
        yield tile, memory[: tile.stop - begin].copy_(weight[tile])


def _learning(advantage: Tensor, objective: Objective) -> list[slice]:
    """Runs of rows that have a gradient; what is short between two of them goes along."""
    if objective.needs_all:
        return [slice(0, len(advantage))]
    # On the host, as the loop is: a device is waited for once.
    (rows,) = advantage.ne(0).cpu().nonzero(as_tuple=True)
    if not len(rows):
        return []
    (gaps,) = (rows.diff() > LEAST_ROWS).nonzero(as_tuple=True)
    first, last = [rows[0], *rows[gaps + 1]], [*rows[gaps], rows[-1]]
    return [slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]


class Gradients:
    """Of hidden, weight and bias, summed over chunks; of the head in float32."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Wanted, chunks: int):
        self._inputs, self._weight = hidden, head.weight
        self._is_summed = chunks > 1 and hidden.dtype != torch.float32
        # Rows that nothing learns from keep their zeros.
        self.hidden = torch.zeros_like(hidden) if wanted.hidden else None
        self.weight = None
        self.bias = None
        if wanted.bias:
            size = len(head.weight)
            self.bias = torch.zeros(size, dtype=torch.float32, device=hidden.device)
        self._wants_weight = wanted.weight

    def add(self, slopes: Tensor, rows: slice) -> None:
        """slopes: the gradient of the logits of these rows."""
        if slopes.dtype == self._inputs.dtype:
            if self.hidden is not None:
                torch.mm(slopes, self._weight, out=self.hidden[rows])
            if self._wants_weight:
                self._add_weight(slopes.t(), self._inputs[rows])
        else:
            self._add_in_float32(slopes, rows)
        if self.bias is not None:
            self.bias += slopes.sum(0, dtype=torch.float32)

    def _add_in_float32(self, slopes: Tensor, rows: slice) -> None:
        """Of inputs in 16 bits; as `_logits` has made the logits."""
        inputs = self._inputs[rows].to(slopes.dtype)
        of_hidden, is_first = torch.zeros_like(inputs), self.weight is None
        if self._wants_weight and is_first:
            self.weight = torch.empty(self._weight.shape, dtype=slopes.dtype)
        for tile, weight in _tiles(self._weight, slopes.dtype):
            part = slopes[:, tile]
            if self.hidden is not None:
                torch.addmm(of_hidden, part, weight, out=of_hidden)
            if self._wants_weight:
                into = self.weight[tile]
                torch.addmm(into, part.t(), inputs, beta=0 if is_first else 1, out=into)
        if self.hidden is not None:
            self.hidden[rows] = of_hidden

    def _add_weight(self, slopes: Tensor, hidden: Tensor) -> None:
        is_first = self.weight is None
        if is_first:
            dtype = torch.float32 if self._is_summed else self._weight.dtype
            self.weight = torch.empty(self._weight.shape, dtype=dtype, device=hidden.device)
        if self.weight.dtype == hidden.dtype:
            torch.addmm(self.weight, slopes, hidden, beta=0 if is_first else 1, out=self.weight)
        elif hidden.is_cuda:
            if is_first:
                torch.mm(slopes, hidden, out_dtype=torch.float32, out=self.weight)
            else:
                torch.addmm(self.weight, slopes, hidden, out_dtype=torch.float32, out=self.weight)
        else:
            self._add_tiles(slopes, hidden, is_first)

    def _add_tiles(self, slopes: Tensor, hidden: Tensor, is_first: bool) -> None:
        """A CPU has no GEMM from 16 bits to float32: tiles of one are added while in its cache."""
        tile = hidden.new_empty(min(TILE, len(slopes)), hidden.shape[1])
        for begin in range(0, len(slopes), TILE):
            part = slopes[begin : begin + TILE]
            made = torch.mm(part, hidden, out=tile[: len(part)])
            into = self.weight[begin : begin + TILE]
            into.copy_(made) if is_first else into.add_(made)

    def finished(self) -> tuple[Tensor | None, ...]:
        if self._wants_weight and self.weight is None:  # nothing was learned from
            self.weight = torch.zeros_like(self._weight)
        return self.hidden, self.weight, self.bias


_kept = threading.local()


@contextmanager
def _workspace(hidden: Tensor, head: Head, chunks: list[slice]) -> Iterator[Tensor]:
    """Memory for the logits of a chunk. On a CPU fresh pages cost as much as a tenth of the GEMM
    that fills them, so a thread keeps its own; on a GPU torch's allocator keeps it.
    """
    rows = max((rows.stop - rows.start for rows in chunks), default=0)
    elements = rows * _width(len(head.weight))
    if hidden.device.type != "cpu":
        yield hidden.new_empty(elements)
        return
    dtype = gemm_dtype(hidden.device, hidden.dtype)
    size = elements * dtype.itemsize
    memory, _kept.memory = getattr(_kept, "memory", None), None  # one at a time may have it
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
    try:
        yield memory[:size].view(dtype)
    finally:
        _kept.memory = memory
