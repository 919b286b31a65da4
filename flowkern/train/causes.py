"""Why a velocity of training is not the one of sampling: found by switching one thing at a time and
asking again.

At equal batches the difference is 0 or it is not. All switches are thrown together; then each is
taken back, the most general first, and stays back where the difference remains 0 without it. What
is left is what it takes. At other batches one row is asked in batches that differ in one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkern.train.flow import NETWORK
from flowkern.train.replay import Answer, Call, Replay

TRIES = 2  # a kernel that sums in any order may come out equal once


@dataclass(frozen=True)
class Cause:
    name: str
    said: str
    """In a sentence, with what was switched."""
    log_ratio: float | None = None
    """What it makes of one, where it was measured apart."""


class Bench:
    """One call of sampling, and the same one in training."""

    def __init__(self, replay: Replay, call: Call) -> None:
        self.replay, self.call = replay, call
        self.stored = replay.stored(call)
        """The states that training has."""
        self.bare: nn.Module = replay.loop.weights.modules[NETWORK]
        self.trained: nn.Module = replay.trained
        self.keeps_gradients, self.seed = True, None
        self.autocast = self._autocast()

    def difference(self) -> float:
        """The largest, of a velocity, in any of a few tries; of what is not finite, infinity."""
        found = [(self._trained() - self._sampled()).abs().max() for _ in range(TRIES)]
        worst = float(torch.stack(found).max())
        return worst if worst == worst else float("inf")

    def _sampled(self) -> Tensor:
        with self._seeded(), torch.no_grad():
            return self.replay.again(self.call, self.call.x_t)

    def _trained(self) -> Tensor:
        with self._seeded(), torch.set_grad_enabled(self.keeps_gradients):
            return self.replay.again(self.call, self.stored, self.trained)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        device = self.call.x_t.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield

    def _autocast(self) -> tuple[bool, torch.dtype]:
        """Whether sampling is under autocast inside of the network, and to what dtype."""
        kind, seen = self.call.x_t.device.type, []

        def look(*_) -> None:
            seen.append((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))

        with hooked(self.bare, look):
            self._sampled()
        return seen[-1]

    def rounded_to(self) -> str | None:
        """The dtype that makes the states of sampling those that training has."""
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(self.call.x_t.to(dtype).to(self.stored.dtype), self.stored):
                return str(dtype).removeprefix("torch.")
        return None


# ---- switches, each a state without one cause ----


@contextmanager
def hooked(network: nn.Module, before: Callable[..., None]) -> Iterator[None]:
    """Called before each of its layers."""
    layers = [module for module in network.modules() if not any(module.children())]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed(things: Sequence[object], name: str, value: object) -> Iterator[None]:
    """An attribute of each."""
    before = [getattr(thing, name) for thing in things]
    for thing in things:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, old in zip(things, before, strict=True):
            setattr(thing, name, old)


def active_dropout(network: nn.Module) -> dict[str, nn.Module]:
    """Its layers that draw at every call."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    }


def recomputing(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if getattr(m, "gradient_checkpointing", False) is True]


def _own_states(bench: Bench) -> AbstractContextManager:
    return changed([bench], "stored", bench.call.x_t)


def _no_dropout(bench: Bench) -> AbstractContextManager:
    return changed(list(active_dropout(bench.trained).values()), "training", False)


def _no_recomputation(bench: Bench) -> AbstractContextManager:
    return changed(recomputing(bench.trained), "gradient_checkpointing", False)


@contextmanager
def _same_autocast(bench: Bench) -> Iterator[None]:
    """That of sampling, set before every layer, whoever changes it outside of the network."""
    kind = bench.call.x_t.device.type
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def put(state: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(kind, state[0])
        torch.set_autocast_dtype(kind, state[1])

    with hooked(bench.bare, lambda *_: put(bench.autocast)):
        try:
            yield
        finally:
            put(before)
            torch.clear_autocast_cache()


@contextmanager
def _deterministic(bench: Bench) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _seeded(bench: Bench) -> AbstractContextManager:
    return changed([bench], "seed", 0)


def _evaluation(bench: Bench) -> AbstractContextManager:
    return changed([m for m in bench.trained.modules() if m.training], "training", False)


def _no_gradient(bench: Bench) -> AbstractContextManager:
    return changed([bench], "keeps_gradients", False)


def _no_wrapper(bench: Bench) -> AbstractContextManager:
    return changed([bench], "trained", bench.bare)


def _say_latents(bench: Bench) -> str:
    dtype = bench.rounded_to()
    how = f"are rounded to {dtype}" if dtype else "are others than those that the network was asked"
    return f"the states that training has {how}; asked at those of sampling, it answers the same"


def _say_dropout(bench: Bench) -> str:
    names = list(active_dropout(bench.trained))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"dropout is on ({names[0]}{more}); off, training answers what sampling did"


def _say_recomputation(bench: Bench) -> str:
    return (
        "with gradient checkpointing the network computes something else; without it "
        "(model.gradient_checkpointing=false) training answers what sampling did"
    )


def _say_autocast(bench: Bench) -> str:
    is_on, dtype = bench.autocast
    ours = f"to {str(dtype).removeprefix('torch.')}" if is_on else "off"
    return (
        f"autocast differs: it is {ours} in sampling, and not so in training; with that of "
        "sampling in both, they answer the same"
    )


SWITCHES: dict[str, tuple[Callable[[Bench], AbstractContextManager], Callable[[Bench], str]]] = {
    "wrapper": (
        _no_wrapper,
        lambda _: "what training wraps the network in changes it; bare, it answers the same",
    ),
    "gradient": (
        _no_gradient,
        lambda _: "the network computes something else where gradients are on; without, the same",
    ),
    "training mode": (
        _evaluation,
        lambda _: "the network is in training mode; in eval(), it answers the same",
    ),
    "random": (
        _seeded,
        lambda _: "the network draws random numbers; from one seed, it answers the same",
    ),
    "kernel": (
        _deterministic,
        lambda _: (
            "a kernel is not deterministic, and answers the same call in several ways; with "
            "torch.use_deterministic_algorithms(True) it does not"
        ),
    ),
    "autocast": (_same_autocast, _say_autocast),
    "checkpointing": (_no_recomputation, _say_recomputation),
    "dropout": (_no_dropout, _say_dropout),
    "latents": (_own_states, _say_latents),
}
"""The most general first."""


def causes_at_equal_batches(replay: Replay, call: Call) -> list[Cause]:
    """What makes training answer a call of sampling's otherwise: as few as it takes."""
    if not call.velocity.isfinite().all():
        return [Cause("not finite", "the velocity of sampling itself is no number")]
    bench = Bench(replay, call)
    if bench.difference() == 0:
        said = "the same call, asked again, is answered the same now, but not as in sampling"
        return [Cause("again", f"{said}: kernels were chosen anew, or the network keeps a state")]
    needed = dict.fromkeys(SWITCHES)
    if _under(bench, needed) > 0:
        return [Cause("unknown", "none of what was switched makes the two answers the same")]
    for name in SWITCHES:
        others = {other for other in needed if other != name}
        if _under(bench, others) == 0:
            needed.pop(name)
    return [Cause(name, SWITCHES[name][1](bench)) for name in needed]


def _under(bench: Bench, names: object) -> float:
    with ExitStack() as stack:
        for name in SWITCHES:
            if name in names:
                stack.enter_context(SWITCHES[name][0](bench))
        return bench.difference()


# ---- other batches ----


def causes_at_other_batches(replay: Replay, row: int, dtype: str) -> list[Cause]:
    """Of a row, in batches that differ in one thing each, without gradients. With guidance it is
    two, each asked in a batch of its own kind."""
    task, size = replay.task, max(2, replay.size)
    velocity, level = task.velocity(replay.conditioning), replay.sigma[row]
    roles = [int(replay.prompt[row])] + ([] if task.guidance is None else [task.guidance.uncond])
    same = torch.full((size,), row)

    @torch.no_grad()
    def asked(rows: Tensor, others: Sequence[int] | None = None) -> Answer:
        """Of rows[0]; others: what the network is told of the rest, if not the same."""
        rest = len(rows) - 1
        told = [[role, *([role] * rest if others is None else others)] for role in roles]
        v, *uncond = (replay.told(velocity, rows, prompts)[:1] for prompts in told)
        if not uncond:
            return Answer(v, {})
        return Answer(*task.guidance.combined(v, *uncond, level.to(v.device).view(1)))

    base = asked(same).guided

    def moved_by(answer: Answer) -> float:
        found = replay.compare(same[:1], answer, base)
        return float(found.log_ratio.abs().max()) if float(found.error.max()) > 0 else 0.0

    beside = torch.cat([same[:1], torch.arange(1, size) % len(replay.site)])
    found = [
        Cause(
            "padding",
            f"a row depends on the length of the prompts beside it, at {size} rows each time: how "
            "text is padded changes from batch to batch",
            moved_by(asked(same, replay.told_others(size - 1))),
        ),
        Cause(
            "noise levels",
            f"a row depends on the states and noise levels beside it, at {size} rows each time",
            moved_by(asked(beside)),
        ),
        Cause(
            "batch shape",
            f"the kernels of {dtype} round a row otherwise in batches of another number of rows "
            f"(1, {size} and {2 * size} of the same one)",
            max(moved_by(asked(same.repeat(2)[:count])) for count in (1, 2 * size)),
        ),
    ]
    return sorted((c for c in found if c.log_ratio > 0), key=lambda c: -c.log_ratio)
