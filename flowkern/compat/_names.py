"""What a kernel calls an argument, in the words of whoever calls a drop-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

Step = TypeVar("Step", bound=Callable)


def naming(**theirs: str) -> Callable[[Step], Step]:
    """Around a drop-in: an error that begins with a kernel's name for an argument has `theirs`."""

    def around(step: Step) -> Step:
        @functools.wraps(step)
        def named(*args, **kwargs):
            try:
                return step(*args, **kwargs)
            except (TypeError, ValueError) as error:
                name, _, said = str(error).partition(": ")
                if type(error) not in (TypeError, ValueError) or name not in theirs:
                    raise
                said = said.replace("a single edge", "one")
                raise type(error)(f"{theirs[name]}: {said}") from None

        return named

    return around


def of_scheduler(**latents: str) -> Callable[[Step], Step]:
    """Of a step that takes timesteps of a scheduler."""
    return naming(**latents, c_rows="timestep", m_rows="timestep", **_grid("self.sigmas"))


def of_grid(sigmas: str = "sigmas", **latents: str) -> Callable[[Step], Step]:
    """Of a step that takes a grid."""
    return naming(**latents, **_grid(sigmas))


STEP = {"x_t": "sample", "velocity": "model_output", "x_next": "prev_sample"}
"""What diffusers' schedulers call the latents of a step, and most projects after them."""


def _grid(name: str) -> dict[str, str]:
    return dict.fromkeys(("sigmas", "sigma", "sigma_next", "path_sigmas"), name)
