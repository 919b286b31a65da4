"""Other versions of the trained weights: an old policy, an anchor, the mean that is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowkern import torch_private
from flowkern.checks import ConfigError
from flowkern.split import own_part, part_of, swap

REFERENCE = "reference"
"""The weights from which training started: those without their adapters, or a copy that is never
updated."""


class Copies:
    """Running means of the trained weights, by name; they begin as the weights are."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Iterable[str],
        moved: Callable[[], None] = lambda: None,
        on_host: Collection[str] = (),
    ) -> None:
        """moved: told when the parameters have other values than their optimizer gave them.
        on_host: copies that lie in the host's memory, and are on the device a tensor at a time; of
        weights that are not split."""
        self._parameters, self._moved, self._on_host = list(parameters), moved, frozenset(on_host)
        self._copies = {
            name: [_hosted(p) if name in on_host else p.detach().clone() for p in parameters]
            for name in names
        }
        self._fixed = {REFERENCE}
        self._current = set(self._copies) - {REFERENCE}  # which is asked for what it is

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def is_current(self, name: str) -> bool:
        """Is the copy known to be equal to the weights?"""
        return name in self._current

    def weights_moved(self) -> None:
        """To be told after every optimizer step."""
        self._current.clear()

    def fill(self, name: str, load: Callable[[], None]) -> None:
        """Give a copy what `load` gives the weights, once and for all."""
        self._fixed.add(name)
        self._current.discard(name)
        with self.using(name):
            load()

    def is_finite(self, name: str) -> bool:
        """Of weights that are split: is this process's part?"""
        return all(bool(x.isfinite().all()) for x in map(own_part, self._copies[name]))

    @torch.no_grad()
    def update(self, name: str, decay: float) -> None:
        """copy = decay copy + (1 - decay) weights, computed where the weights are."""
        if name in self._on_host:
            for weight, other in zip(self._parameters, self._copies[name], strict=True):
                here = other.to(weight.device, non_blocking=True)
                torch_private.lerp_all([here], [weight], 1 - decay)
                other.copy_(here)
        else:
            torch_private.lerp_all(self._copies[name], self._parameters, 1 - decay)
        if decay == 0:
            self._current.add(name)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run the network with a copy's weights; None: with its own. Not around a live graph."""
        if name is None or self.is_current(name):
            yield
            return
        self._swap(name)
        try:
            yield
        finally:
            self._swap(name)

    def _swap(self, name: str) -> None:
        exchange = _swap_with_host if name in self._on_host else swap
        for weight, other in zip(self._parameters, self._copies[name], strict=True):
            exchange(weight, other)
        self._moved()

    def state_dict(self) -> dict[str, Any]:
        """Without the reference, which the model is loaded with, and what was read."""
        return {"copies": self._moving(), "current": sorted(self._current)}

    def _moving(self) -> dict[str, list[Tensor]]:
        return {name: copy for name, copy in self._copies.items() if name not in self._fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To be called while the reference is what the model was loaded with."""
        stored_copies, self._current = state["copies"], set(state["current"])
        here = self._moving()
        if stored_copies.keys() != here.keys():
            raise ConfigError(
                f"train.resume_from_checkpoint: has the weight copies {sorted(stored_copies)}, "
                f"expected {sorted(here)}, those of this configuration"
            )
        for name, copy in here.items():
            for tensor, stored in zip(copy, stored_copies[name], strict=True):
                tensor.copy_(part_of(stored, tensor))


def _hosted(weight: Tensor) -> Tensor:
    copy = weight.detach().to("cpu", copy=True)
    return copy.pin_memory() if weight.is_cuda else copy


@torch.no_grad()
def _swap_with_host(weight: Tensor, other: Tensor) -> None:
    here = other.to(weight.device, copy=True)
    other.copy_(weight)
    weight.data.copy_(here)


@dataclass(frozen=True)
class Weights:
    """The trained modules by name, and their other versions."""

    modules: Mapping[str, nn.Module]
    """Themselves, with adapters, for passes without gradients."""
    trained: Mapping[str, nn.Module]
    """As gradients need them: wrapped for several processes."""
    copies: Copies
    sampler: str | None = None
    """The version that draws a rollout; None: themselves, and no optimizer step follows before the
    next one."""

    @property
    def have_sampled(self) -> bool:
        """Are they known to be those that drew the rollout?"""
        return self.sampler is None or self.is_current(self.sampler)

    def is_current(self, name: str) -> bool:
        """Is that version known to be equal to the weights?"""
        return self.copies.is_current(name)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run the modules with a copy's weights, with REFERENCE's, or (None) with their own."""
        with ExitStack() as stack:
            if name == REFERENCE and REFERENCE not in self.copies:
                for module in self.modules.values():
                    stack.enter_context(module.disable_adapter())
            else:
                stack.enter_context(self.copies.using(name))
            yield
