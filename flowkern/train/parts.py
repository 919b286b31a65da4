"""What a process keeps of a network's weights, in bytes, and what of them it has whole while it is
asked, as `sharding` splits them.

A unit is a repeated block, or all that is in none. The next one is gathered while one is asked, so
two are there at once, and the last unit throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

from torch import Tensor, nn

from flowkern.train.config import Config
from flowkern.train.loading import DTYPES
from flowkern.train.sharding import FITS, of_this_node

__all__ = ["Held", "held", "unshards"]

BYTES_PER_WEIGHT = {"float8": 2, "int8": 1, "nf4": 0.5 + 4 / 64}
"""Of a frozen linear layer in a block, by model.quantization: float8 for the way forward and back,
nf4 with a scale for 64 weights."""


@dataclass(frozen=True)
class Held:
    """Bytes of one process."""

    frozen: int
    """Weights that do not learn, and tables of positions."""
    trained: int
    """Weights that do: their gradients, each moment and each copy take as much."""
    gathered: int = 0
    """At most, in a call: whole weights beside the parts."""
    joined: int = 0
    """At most, in a backward pass: a unit's gradients, whole, and what is sent of them."""
    whole: int = 0
    """All weights that are split, gathered."""


def held(config: Config, network: nn.Module, blocks: Sequence[nn.Module], processes: int) -> Held:
    """Of a network that has its adapter; its dtypes are those in which it is asked."""
    kind, is_full = config.train.sharding, config.lora is None
    ways = {None: 1, "fsdp2": processes, "hsdp": of_this_node(processes)}[kind]
    parameters = list({id(p): p for p in network.parameters()}.values())
    buffers = {id(b): b for b in network.buffers()}.values()
    width = _width(config, blocks)

    def kept(p: Tensor) -> int:
        rows, *rest = p.shape or (1,)
        is_split = is_full or not p.requires_grad
        return int(width(p) * (ceil(rows / ways) * prod(rest) if is_split else p.numel()))

    frozen = sum(kept(p) for p in parameters if not p.requires_grad)
    frozen += sum(buffer.nbytes for buffer in buffers)
    trained = sum(kept(p) for p in parameters if p.requires_grad)
    if ways == 1:
        return Held(frozen, trained)
    asked = DTYPES[config.train.mixed_precision].itemsize

    def gathered(of: Iterable[Tensor]) -> int:
        split = [p for p in of if is_full or not p.requires_grad]
        return int(sum((asked if is_full else width(p)) * p.numel() for p in split))

    units = [list(block.parameters()) for block in blocks]
    inside = {id(p) for unit in units for p in unit}
    rest = [p for p in parameters if id(p) not in inside]
    # Gradients come as weights are gathered, and are sent in float32; an adapter's are whole.
    joined = max(map(gathered, [*units, rest])) * (1 + 4 / asked) if is_full else 0
    at_once = 2 * max(map(gathered, units)) + gathered(rest)
    return Held(frozen, trained, at_once, int(joined), gathered(parameters))


def _width(config: Config, blocks: Sequence[nn.Module]) -> Callable[[Tensor], float]:
    """Bytes of an element of a weight, as it is kept."""
    named = [pair for block in blocks for pair in block.named_modules()]
    kind = config.model.quantization
    small = {
        id(m.weight)
        for name, m in named
        if isinstance(m, nn.Linear) and "lora" not in name and not m.weight.requires_grad
        if kind in ("int8", "nf4") or (kind == "float8" and "norm" not in name)
    }

    def width(p: Tensor) -> float:
        if id(p) in small:
            return BYTES_PER_WEIGHT[kind]
        return 4 if config.lora is None else p.element_size()

    return width


def unshards(config: Config, whole: int, free: float | None) -> bool:
    """Are all weights gathered while samples are drawn? As `sharding.Sharded` decides. free: of a
    card, in bytes; None: of none."""
    option = config.train.rollout_unshard
    return option is True or (option == "auto" and free is not None and 0 < whole <= FITS * free)
