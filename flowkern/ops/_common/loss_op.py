"""A loss as one op: what every loss is to torch follows from the NamedTuple of its inputs.

From it come the op that compilers see, with its schema, its fake kernel and its gradient, and the
eager path past the dispatcher, which costs as much as kernels do at image size.

An implementation is forward(inputs, records), which returns the fields of the loss's result, the
slopes (B, n) that the backward pass multiplies, and what it keeps for it where `records`: a tensor
that becomes the gradient, or None; and backward(grad, slopes, inputs, kept), which returns the
gradient of the first input and gets None for what `forward_only` names. The reference is one
function of inputs: torch differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import ModuleType
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from flowkern import torch_private as private

from .autograd import EagerGradient
from .dispatch import (
    Impl,
    choose,
    is_tracing,
    is_transformed,
    lazily,
    native_why_not,
    no_objection,
    triton_why_not,
)
from .native_calls import direct
from .outputs import apart


class Halves:
    """Fields of a loss's inputs, apart as tensors and as settings: so autograd and ops take them.

    A field is a tensor, a setting (int, float, str), or either of them: then it has a place in both
    halves, and is None in one.
    """

    def __init__(self, inputs: type[NamedTuple], without: Sequence[str] = ()):
        self._new = partial(tuple.__new__, inputs)  # _make, without its frame
        hints = {k: hint for k, hint in get_type_hints(inputs).items() if k not in without}
        kinds = {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}
        self.tensors = [name for name, kind in kinds.items() if Tensor in kind]
        self.settings = [name for name, kind in kinds.items() if kind - {Tensor, type(None)}]
        names = [*self.tensors, *self.settings]
        self.schema = [f"{_schema(kinds[name], True)} {name}" for name in self.tensors]
        for name in self.settings:
            suffix = "_value" if name in self.tensors else ""
            self.schema.append(f"{_schema(kinds[name], False)} {name}{suffix}")
        self.tensors_at = tuple(map(inputs._fields.index, self.tensors))
        self.settings_at = tuple(map(inputs._fields.index, self.settings))
        self._tensors_of = itemgetter(*self.tensors_at)
        self._settings_of = itemgetter(*self.settings_at)
        self._either = [
            (at, self.settings.index(name))
            for at, name in enumerate(self.tensors)
            if name in self.settings
        ]
        self._in_order = itemgetter(
            *[names.index(name) if name in names else len(names) for name in inputs._fields]
        )

    def split(self, inputs: tuple) -> tuple[list, list]:
        tensors, settings = [*self._tensors_of(inputs)], [*self._settings_of(inputs)]
        for tensor, setting in self._either:
            if isinstance(tensors[tensor], Tensor):
                settings[setting] = None
            else:
                tensors[tensor] = None
        return tensors, settings

    def join(self, values: list) -> NamedTuple:
        """The inputs from their tensors and then their settings, with None for what is left out."""
        values.append(None)
        for tensor, setting in self._either:
            if values[tensor] is None:
                values[tensor] = values[len(self.tensors) + setting]
        return self._new(self._in_order(values))


def _schema(kind: set, as_tensor: bool) -> str:
    if as_tensor:
        return "Tensor" if kind == {Tensor} else "Tensor?"
    (setting,) = kind - {Tensor, type(None)}
    return setting.__name__ + ("?" if len(kind) > 1 else "")


class LossOp:
    """A loss of `inputs`, among them advantage (B,) and reduction; the first is differentiated.

    result:       NamedTuple: loss, statistics (B,), and two bools (B,)
    slopes:       how many of each sample the backward pass multiplies
    forward_only: the inputs that the backward pass does not read
    kept:         of others, what it reads in their place: functions of the inputs, which may be
                  those of a call that nobody has checked
    """

    def __init__(
        self,
        name: str,
        inputs: type[NamedTuple],
        result: type[NamedTuple],
        native: ModuleType,
        reference: Callable,
        slopes: int,
        forward_only: Sequence[str],
        kept: Mapping[str, Callable[[NamedTuple], Tensor | None]],
    ):
        triton = f"flowkern.ops.{name}.triton_impl"
        self.impls = (
            Impl("native", native.forward, native_why_not),
            Impl("triton", lazily(triton, "forward"), triton_why_not),
            Impl("reference", reference, no_objection),
        )
        self.forwards = {impl.name: impl.call for impl in self.impls}
        self.backwards = {"native": native.backward, "triton": lazily(triton, "backward")}
        self._result, self._slopes = result, slopes
        self._new = partial(tuple.__new__, inputs)
        self._resulting = partial(tuple.__new__, result)
        self._native_name = name.removesuffix("_loss") + "_forward"
        self._all, self._kept = Halves(inputs), Halves(inputs, without=forward_only)
        self._changes = [(self._kept.tensors.index(field), of) for field, of in kept.items()]

        @private.as_constant
        def best(device, dtype, backend, transformed) -> str:
            return choose(self.impls, device, dtype, backend, transformed).name

        self.best = best
        self._register(name)

    def straight(self, backend: str | None, given: tuple) -> NamedTuple | None:
        """The result of the arguments as they were given, in one crossing to the kernels; None
        where these must be looked at first (native_calls). given: in the order of the inputs.
        """
        kernels = direct(backend, given[0])
        if kernels is None:
            return None
        output = getattr(kernels, self._native_name)(*given, torch.is_grad_enabled())
        if output is None:
            return None
        return self._with_gradient(output, given, "native")

    def __call__(self, inputs: NamedTuple, dtype: torch.dtype, backend: str | None) -> NamedTuple:
        """The result of checked inputs; dtype: of the arithmetic."""
        kernel = self.best(inputs[0].device, dtype, backend, is_transformed())
        if kernel == "reference":
            return self._result(*self.forwards[kernel](inputs))
        if is_tracing(*inputs):
            first, *others = self.op_arguments(inputs, kernel)
            others = [x.detach() if isinstance(x, Tensor) else x for x in others]
            return self._result(*self._op(first, *others)[:-1])
        output = self.forwards[kernel](inputs, torch.is_grad_enabled())
        return self._with_gradient(output, inputs, kernel)

    def op_arguments(self, inputs: NamedTuple, kernel: str) -> tuple:
        """What torch.ops.flowkern.<name> takes; spelled out, since compilers look into it."""
        tensors = [inputs[at] for at in self._all.tensors_at]
        settings = [inputs[at] for at in self._all.settings_at]
        return (
            *[x if isinstance(x, Tensor) else None for x in tensors],
            *[None if isinstance(x, Tensor) else x for x in settings],
            kernel,
        )

    def _with_gradient(self, output: tuple, inputs: tuple, kernel: str) -> NamedTuple:
        """The result of what a forward pass returned; what it kept, backward writes over."""
        first, (*fields, slopes, kept) = inputs[0], output
        if first.requires_grad and torch.is_grad_enabled():
            tensors, settings = self.keep(inputs)
            how = self._backward, settings, kernel
            loss = EagerGradient.apply(first, (fields[0], (slopes, *tensors), how, kept))
            fields = loss, *fields[1:]
        return self._resulting(fields)

    def keep(self, inputs: NamedTuple) -> tuple[list, list]:
        """What the backward pass takes after the gradient and the slopes: inputs, and no more."""
        tensors, settings = self._kept.split(inputs)
        inputs = self._new(inputs)
        for at, of in self._changes:
            if tensors[at] is not None:
                tensors[at] = of(inputs)
        return tensors, settings

    def _backward(self, grad, saved, settings, kernel: str, kept: Tensor | None) -> Tensor:
        slopes, *values = saved
        values += settings
        return self.backwards[kernel](grad, slopes, self._kept.join(values), kept)

    def _register(self, name: str) -> None:
        def forward(*halves):
            *halves, kernel = halves
            inputs = self._all.join(halves)
            if kernel == "reference":
                return self.forwards[kernel](inputs)
            return self.forwards[kernel](inputs, False)[:-1]  # an op must not write over its inputs

        outputs = len(self._result._fields) + 1
        takes = ", ".join([*self._all.schema, "str kernel"])
        gives = ", ".join(["Tensor"] * outputs)
        self._op = torch.library.custom_op(
            f"flowkern::{name}", apart(forward), mutates_args=(), schema=f"({takes}) -> ({gives})"
        )
        takes = ", ".join(["Tensor grad", "Tensor slopes", *self._kept.schema, "str kernel"])
        backward = torch.library.custom_op(
            f"flowkern::{name}_backward",
            lambda grad, *halves: self._backward(grad, halves[:-1], (), halves[-1], None),
            mutates_args=(),
            schema=f"({takes}) -> Tensor",
        )

        def set_up(ctx, inputs, output) -> None:
            *halves, kernel = inputs
            tensors, settings = self.keep(self._all.join(halves))
            ctx.save_for_backward(output[-1], *tensors)
            ctx.settings = *settings, kernel
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # no zeros for the gradients that these do not have

        def gradients(ctx, grad, *_) -> tuple:
            first = backward(grad, *ctx.saved_tensors, *ctx.settings)
            return first, *[None] * len(self._all.schema)

        self._op.register_fake(self._fake)
        self._op.register_autograd(gradients, setup_context=set_up)
        backward.register_fake(lambda grad, slopes, first, *_: first.new_empty(first.shape))

    def _fake(self, *halves) -> tuple[Tensor, ...]:
        inputs = self._all.join([*halves[:-1]])
        like = inputs.advantage
        loss = like.new_empty(like.shape if inputs.reduction == "none" else ())
        statistics = [torch.empty_like(like) for _ in self._result._fields[1:-2]]
        clipped = [torch.empty_like(like, dtype=torch.bool) for _ in range(2)]
        return loss, *statistics, *clipped, like.new_empty((*like.shape, self._slopes))
