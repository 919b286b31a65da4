"""Line charts as plain numbers: what a template needs to write them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 22.0  # of the axes, in the same units
MOST = 240
"""Points of a line; of more, neighbours are drawn as their mean, between their least and most."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line, or dots, of a chart."""

    name: str
    points: Points
    """(step, value), in the order of steps."""
    is_dots: bool = False

    @cached_property
    def buckets(self) -> list[tuple[float, float, float, float]]:
        """(step, mean, least, most) of neighbours, at most MOST of them."""
        size = math.ceil(len(self.points) / MOST)
        found = []
        for first in range(0, len(self.points), max(1, size)):
            part = self.points[first : first + size]
            values = [value for _, value in part]
            mean = sum(value / len(values) for value in values)  # the sum may be no number
            found.append((part[-1][0], mean, min(values), max(values)))
        return found

    @property
    def is_thinned(self) -> bool:
        return len(self.points) > MOST and not self.is_dots


@dataclass(frozen=True)
class Chart:
    """Series over steps."""

    title: str
    series: Sequence[Series]
    note: str = ""

    @cached_property
    def x_ticks(self) -> list[float]:
        steps = [step for one in self.series for step, _ in one.points]
        return [tick for tick in ticks(min(steps), max(steps), 7) if tick == int(tick)]

    @cached_property
    def y_ticks(self) -> list[float]:
        values = [value for one in self.series for _, value in one.points]
        return ticks(min(values), max(values), 4)

    @cached_property
    def _range(self) -> tuple[float, float, float, float]:
        """Least and most of steps and of values that have room."""
        steps = [step for one in self.series for step, _ in one.points]
        values = [value for one in self.series for _, value in one.points]
        x = (min(steps), max(steps))
        y = (min(*self.y_ticks, *values), max(*self.y_ticks, *values))
        return *_apart(*x), *_apart(*y)

    def x(self, step: float) -> float:
        least, most, *_ = self._range
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - least) / (most - least), 1)

    def y(self, value: float) -> float:
        *_, least, most = self._range
        return round(
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - least) / (most - least), 1
        )

    def line(self, series: Series) -> str:
        """Points of a polyline."""
        return " ".join(f"{self.x(step)},{self.y(mean)}" for step, mean, *_ in series.buckets)

    def band(self, series: Series) -> str:
        """Points of a polygon from the least to the most of what was thinned out."""
        above = [(step, most) for step, _, _, most in series.buckets]
        below = [(step, least) for step, _, least, _ in reversed(series.buckets)]
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in above + below)

    @property
    def data(self) -> list[list[list]]:
        """What a pointer reads: (x, step, value as text) of what is drawn of each series."""
        return [
            [[self.x(step), step, short(mean)] for step, mean, *_ in one.buckets]
            for one in self.series
        ]


def ticks(least: float, most: float, count: int) -> list[float]:
    """About `count` round numbers inside of a range; of an empty one its only number."""
    if not most > least:
        return [least]
    raw = (most - least) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)] or [least]


def short(value: float) -> str:
    """A number for a small place."""
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if 1e-3 <= size < 1e4:
        return f"{value:.4g}"
    return f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def _apart(least: float, most: float) -> tuple[float, float]:
    if most > least:
        return least, most
    room = abs(least) / 2 or 0.5
    return least - room, most + room
