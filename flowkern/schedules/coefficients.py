"""Edges as ops take them: a table of step coefficients, in any number of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor

from flowkern.checks import is_integer, shown
from flowkern.torch_private import num_modes

MAX_HISTORY = 3
# An edge in the table. `sigma` serves return_x0 (x0 = x_t - sigma velocity).
COLUMNS = ("a", "b", "std", "k", "c", "h1", "h2", "h3", "sigma")
_TABLES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Coefficients:
    """Step coefficients of an edge, or of several: of a grid, or one per sample. See `COLUMNS`.

    `c[i]` is one edge and broadcasts over a batch; `c[index_tensor]` gives one per sample.
    Built and validated by the functions of this module; ops read the edges on the device, never on
    the host. A table of one's own is (S, 9) or (9,) of real floating-point numbers, finite, with
    std >= 0; its values are looked at on the CPU, elsewhere that would wait for the device.
    """

    def __init__(self, table: Tensor, num_history: int = 0):
        _check_table(table)
        if not (is_integer(num_history) and 0 <= num_history <= MAX_HISTORY):
            raise ValueError(
                f"num_history: expected an integer from 0 to {MAX_HISTORY}, got {num_history!r}"
            )
        if not torch.compiler.is_compiling() and table.is_inference():
            with lasting():
                table = table.clone()
        self._set(table, int(num_history))

    @classmethod
    def _checked(cls, table: Tensor, num_history: int) -> Coefficients:
        """Edges of a table that has been looked at."""
        made = cls.__new__(cls)
        made._set(table, num_history)
        return made

    def _set(self, table: Tensor, num_history: int) -> None:
        self.table = table.contiguous().resolve_neg()  # kernels read edges by address
        self.num_history = num_history  # earlier x0 predictions the edges weigh; ops check it
        self._converted: dict[tuple, Coefficients] = {}

    a = property(lambda self: self.table[..., 0])
    b = property(lambda self: self.table[..., 1])
    std = property(lambda self: self.table[..., 2])
    k = property(lambda self: self.table[..., 3])
    c = property(lambda self: self.table[..., 4])
    history = property(
        lambda self: self.table[..., 5 : 5 + MAX_HISTORY],
        doc="Weights on earlier x0 predictions, most recent first.",
    )
    sigma = property(lambda self: self.table[..., 8])

    def __len__(self) -> int:
        if self.table.ndim == 1:
            raise TypeError("a single edge has no length; it broadcasts over the batch")
        return self.table.shape[0]

    def __getitem__(self, index) -> Coefficients:
        """`int`: one edge. Slice or index tensor (B,): several."""
        if self.table.ndim == 1:
            raise TypeError("a single edge cannot be indexed")
        if isinstance(index, bool):
            raise TypeError(f"index: expected an integer, a slice or a tensor, got {index}")
        if isinstance(index, Integral):  # tensors take it too, but their error names no grid
            if not -len(self) <= index < len(self):
                raise IndexError(f"step {index} is out of range for {len(self)} edges")
        elif isinstance(index, Tensor) and (
            index.is_floating_point() or index.dtype == torch.uint8
        ):
            raise TypeError(f"index: expected integers, got {index.dtype}")
        with lasting():
            table = self.table[index]
            if table.ndim not in (1, 2) or table.shape[-1] != len(COLUMNS):
                got = (
                    f"a tensor {tuple(index.shape)}" if isinstance(index, Tensor) else shown(index)
                )
                raise IndexError(f"index: expected an integer, a slice or a tensor (B,), got {got}")
            return self._checked(table, self.num_history)

    def to(self, device=None, dtype: torch.dtype | None = None) -> Coefficients:
        """The same edges on `device` in `dtype`; converted once and remembered."""
        device = torch.device(device) if device is not None else self.table.device
        dtype = dtype or self.table.dtype
        if dtype not in _TABLES:
            raise TypeError(f"dtype: expected a real floating-point dtype, got {dtype}")
        if self.table.device == device and self.table.dtype == dtype:
            return self
        if torch.compiler.is_compiling():
            return self._checked(self.table.to(device, dtype), self.num_history)
        # By version too: a table edited in place is converted again.
        key = (device, dtype, None if self.table.is_inference() else self.table._version)
        if key not in self._converted:
            with lasting():
                self._converted[key] = Coefficients(self.table.to(device, dtype), self.num_history)
        return self._converted[key]

    def without_normalizer(self) -> Coefficients:
        """c = 0, k as it is: log-probabilities without -log std - log sqrt(2 pi), as MixGRPO's."""
        with lasting():
            table = self.table.clone()
            table[..., 4] = 0.0
            return self._checked(table, self.num_history)

    def tempered(self) -> Coefficients:
        """k = 1, c = 0: the negative mean square, as CPS has it and SGLang's no_const."""
        with lasting():
            table = self.table.clone()
            table[..., 3], table[..., 4] = 1.0, 0.0
            return self._checked(table, self.num_history)

    def __reduce__(self):
        return Coefficients, (self.table, self.num_history)

    def __repr__(self) -> str:
        edges = "single edge" if self.table.ndim == 1 else f"{len(self)} edges"
        return f"Coefficients({edges}, {self.table.dtype}, {self.table.device})"


def lasting() -> AbstractContextManager:
    """Around what makes edges: those of a rollout in inference mode also serve training."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def _check_table(table: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype not in _TABLES:
        got = getattr(table, "dtype", type(table).__name__)
        raise TypeError(f"table: expected a tensor of real floating-point numbers, got {got}")
    if table.layout != torch.strided:
        raise TypeError(f"table: expected a strided tensor, got {table.layout}")
    if table.ndim not in (1, 2) or table.shape[-1] != len(COLUMNS):
        raise ValueError(
            f"table: expected shape (S, {len(COLUMNS)}) or ({len(COLUMNS)},), "
            f"got {tuple(table.shape)}"
        )
    is_traced = torch.compiler.is_compiling() or num_modes() > 0
    if table.device.type != "cpu" or type(table) is not Tensor or is_traced or not table.numel():
        return
    if not bool(table.isfinite().all()):
        raise ValueError(f"table: expected finite numbers, got {shown(table.tolist())}")
    std = table[..., COLUMNS.index("std")]
    if bool((std < 0).any()):
        raise ValueError(f"table: expected std >= 0, got {shown(std.tolist())}")


def checked(table: Tensor, num_history: int = 0, name: str = "sigma") -> Coefficients:
    """Edges that were computed, and may be beyond what the kernels compute with; name: the argument
    that is said to be the cause."""
    finite = torch.isfinite(table.float()).all(-1)
    if not bool(finite.all()):
        row = table[~finite][0] if table.ndim > 1 else table
        values = zip(COLUMNS[:-1], row.tolist(), strict=False)
        said = ", ".join(f"{column} {value:g}" for column, value in values if value)
        raise ValueError(
            f"{name}: expected coefficients that float32 holds, got {said} from sigma {row[-1]:g}"
        )
    return Coefficients(table, num_history)


def stacked(
    a: Tensor,
    b: Tensor,
    std: Tensor,
    sigma: Tensor,
    tempered: bool = False,
    history: Sequence[Tensor] = (),
) -> Tensor:
    """The table (..., 9), with the k and c of the Gaussian, 0 where std is; no value is read."""
    zero = torch.zeros_like(std)
    if tempered:
        k, c = torch.ones_like(std), zero
    else:
        is_still = std.logical_not()
        k = torch.where(is_still, zero, (2 * std * std).reciprocal())
        c = torch.where(is_still, zero, -(torch.log(std) + _HALF_LOG_2PI))
    weights = [*history, *[zero] * (MAX_HISTORY - len(history))]
    return torch.stack([a, b, std, k, c, *weights, sigma], dim=-1)
