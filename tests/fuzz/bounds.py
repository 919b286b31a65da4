"""How far float32 arithmetic may lie from the truth: running error analysis (Wilkinson, 1963).

A `Bounded` is a value in float64 with a bound on the error of any float32 evaluation of it. Every
operation hands on the errors of its operands and adds its own rounding:

    x + y:   e_x + e_y                        + U |x + y|
    x y:     |x| e_y + |y| e_x + e_x e_y      + U |x y| + TINY    (a product can underflow)
    mean:    mean(e) + SUM_ROUNDINGS U mean|x|
    f(x):    the largest |f(x +- e_x) - f(x)| + 4 U |f(x)|        (f monotone in each argument)

U = 2^-24 is half a unit in the last place. A sum in any order errs by its depth in roundings of
the sum of magnitudes; the kernels' lanes, chunks and trees and torch's cascades stay below
SUM_ROUNDINGS. So the bound holds for every backend, in whatever order it sums, and is a few units
in the last place of the magnitudes of the terms: nothing is tuned. Where an intermediate value may
leave the range of float32 the bound is infinite: there nothing is promised but no crash. NaN and
infinity in the data are values like others, without an error: what they reach is not finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

U, TINY = 2.0**-24, 2.0**-149
SUM_ROUNDINGS = 64
LARGEST = torch.finfo(torch.float32).max


class Bounded:
    def __init__(self, value: Tensor, error: Tensor | None = None):
        self.value = value.double()
        self.error = torch.zeros_like(self.value) if error is None else error

    @staticmethod
    def _settled(value: Tensor, error: Tensor, is_data: Tensor, size: Tensor) -> Bounded:
        """Without an error where `is_data` (what came in is not finite); else unknown where `size`
        is out of range.
        """
        is_known = size <= LARGEST
        error = torch.where(is_known, error, torch.inf).masked_fill(is_data, 0.0)
        return Bounded(torch.where(is_known | is_data, value, 0.0), error)

    def _rounded(self, other: Bounded, value: Tensor, error: Tensor, roundings: float = 1):
        error = error + roundings * U * (value.abs() + error)
        is_data = ~(self.value.isfinite() & other.value.isfinite())
        return Bounded._settled(value, error, is_data, value.abs() + error)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(other, self.value + other.value, self.error + other.error)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self + -other

    def __mul__(self, other: Bounded | float) -> Bounded:
        if not isinstance(other, Bounded):
            other = Bounded(torch.full_like(self.value, other))
        x, y = self.value.abs(), other.value.abs()
        error = x * other.error + y * self.error + self.error * other.error
        error = error + TINY * ((x * y > 0) | (error > 0))
        return self._rounded(other, self.value * other.value, error)

    __rmul__ = __mul__

    def __truediv__(self, other: Bounded) -> Bounded:
        return self * monotone(torch.reciprocal, other)

    def __getitem__(self, index) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def abs(self) -> Bounded:
        return Bounded(self.value.abs(), self.error)

    def reshape(self, *shape: int) -> Bounded:
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def permute(self, *order: int) -> Bounded:
        return Bounded(self.value.permute(order), self.error.permute(order))

    def sum(self, dim: int = 0) -> Bounded:
        magnitude = (self.value.abs() + self.error).sum(dim)
        error = self.error.sum(dim) + SUM_ROUNDINGS * U * magnitude
        is_data = ~self.value.isfinite().all(dim)
        return Bounded._settled(self.value.sum(dim), error, is_data, magnitude + error)

    def mean(self) -> Bounded:
        """(B, *D) -> (B,): over the elements of a sample; 0 where there are none."""
        flat = Bounded(self.value.flatten(1), self.error.flatten(1))
        return flat.sum(1) * (1 / max(1, flat.value.shape[1]))

    def scattered(self, index: Tensor, count: int) -> Bounded:
        """The sums of the samples of each of `count` rows."""
        into = lambda x: x.new_zeros(count, *x.shape[1:]).index_add_(0, index, x)  # noqa: E731
        value = into(self.value)
        magnitude, error = into(self.value.abs()), into(self.error)
        error = error + SUM_ROUNDINGS * U * (magnitude + error)
        is_data = into((~self.value.isfinite()).double()) > 0
        return Bounded._settled(value, error, is_data, magnitude + error)

    def within(self, dtype: torch.dtype) -> Bounded:
        """Rounded once more, to the dtype it is stored in."""
        if dtype in (torch.float32, torch.float64):
            return self
        about = torch.finfo(dtype)
        size = self.value.abs() + self.error
        error = self.error + about.eps / 2 * size + about.tiny * about.eps / 2
        return Bounded(
            self.value, torch.where(size * (1 + about.eps) < about.max, error, torch.inf)
        )

    def disagrees(self, got: Tensor, tighter: float = 1.0) -> Tensor:
        """Where `got` is not this: beyond the bound, or finite where this is not."""
        got, value = got.double(), self.value
        near = ((got - value).abs() <= self.error * tighter) | self.error.isinf()
        return torch.where(value.isfinite(), ~near, got.isfinite())


def monotone(function: Callable[..., Tensor], *arguments: Bounded) -> Bounded:
    """`function`, monotone in each argument: its error is largest at a corner of theirs."""
    value = function(*[a.value for a in arguments])
    ends = [(a.value - a.error, a.value + a.error) for a in arguments]
    corners = [(function(*c) - value).abs() for c in itertools.product(*ends)]
    error = torch.stack(corners).amax(0) + 4 * U * value.abs()
    is_nan = torch.stack([a.value.isnan() for a in arguments]).any(0)
    is_known = torch.stack([a.value.isfinite() for a in arguments]).all(0)
    size = torch.where(is_known, value.abs() + error, torch.inf)  # of infinity: who knows
    return Bounded._settled(value, error, is_nan, size)


def where(condition: Tensor, x: Bounded, y: Bounded) -> Bounded:
    return Bounded(
        torch.where(condition, x.value, y.value), torch.where(condition, x.error, y.error)
    )


def unless_zero(factor: Bounded, x: Bounded) -> Bounded:
    """factor x; where the factor is 0 it says nothing about what is not finite in x.

    A kernel does not read what it multiplies by 0; autograd makes NaN of 0 times infinity.
    """
    unsaid = (factor.value == 0) & ~(x.value.isfinite() & x.error.isfinite())
    product = factor * x
    nothing = torch.zeros_like(product.value)
    return where(unsaid, Bounded(nothing, torch.full_like(nothing, torch.inf)), product)
