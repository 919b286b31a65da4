"""flowkern doctor --estimate: what a configuration takes, before there is a card or a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowkern.train.cards import Card
    from flowkern.train.estimate import Estimate

from flowkern.checks import counted

KINDS = ("sampling", "learning", "not learning")


def show(found: Estimate, name: str | None, card: Card | None) -> None:
    """For people. name: of the card."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in lines(found, name, card):
        console.print(line)


def lines(found: Estimate, name: str | None, card: Card | None) -> Iterable[str]:
    facts = found.facts
    height, width = facts["size"]
    batches = facts["batches"]
    yield f"model       {facts['model']}, {facts['parameters']:,} weights, {height} x {width} px"
    yield f"training    {facts['training']}"
    if facts["processes"] > 1:
        split = facts["sharding"] or "all weights on each"
        yield f"processes   {facts['processes']}, {split}; the rest is of one of them"
    rows = counted(batches["sampling"], "row")
    yield f"batches     {rows} in sampling, {batches['learning']} in training"
    yield "memory      GB"
    yield from _figures({part: size / 1e9 for part, size in found.memory.items() if size})
    whole = facts["all weights in place of LoRA"] / 1e9
    yield f"            (all weights in place of LoRA, with gradients and moments: {whole:.2f})"
    yield "at most     GB"
    yield from _figures({phase: size / 1e9 for phase, size in found.phases.items()})
    yield "on the host GB"
    yield from _figures({part: size / 1e9 for part, size in found.host.items()}, digits=4)
    rows = ", ".join(f"{found.rows[kind]:,.0f} {kind}" for kind in KINDS)
    images = counted(found.rows["images"], "image")
    yield f"iteration   {images}; rows: {rows}; {found.tflop:,.0f} TFLOP"
    if card is not None and found.seconds is not None:
        yield f"seconds     on {name}"
        yield from _figures(found.seconds)
        peak, has = found.peak / 1e9, f"{card.memory:g} GB of {name}"
        yield f"{'fits' if peak <= card.memory else 'too large'}: {peak:.1f} GB of the {has}"
    for said in found.assumptions:
        yield f"assumed: {said}"


def _figures(values: Mapping[str, float], digits: int = 2) -> Iterable[str]:
    for what, value in values.items():
        yield f"  {value:14,.{digits}f}  {what}"
