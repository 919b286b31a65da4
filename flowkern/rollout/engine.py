"""Run a plan: many samples at once, one network call per step for all of them.

B samples, *D one latent, S edges, E trained edges, N kept nodes. Noise follows from
(seed, sample_id, step) alone, so a sample is the same whatever batch, rank or world it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowkern.ops._common.philox import philox_normal
from flowkern.ops.sde_step import ode_step, reference, sde_step
from flowkern.rollout.plan import Chain
from flowkern.schedules import Coefficients

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, *D), sigma (B,), prompt (B,) int64) -> velocity (B, *D)"""

ITERATION_BITS, PROMPT_BITS, MEMBER_BITS = 24, 16, 23  # 63 bits: ids stay positive


def sample_ids(iteration: int, prompts: Tensor, members: int) -> Tensor:
    """Global ids of `members` samples for each slot of an iteration: (P * members,) int64.

    prompts: (P,), the slots. Prompt-major. An id never repeats within a run, however its samples
    are batched or sharded.
    """
    fields = (
        ("iteration", iteration, ITERATION_BITS),
        ("prompts", int(prompts.max()) if len(prompts) else 0, PROMPT_BITS),
        ("members", members - 1, MEMBER_BITS),
    )
    for name, value, bits in fields:
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: got {value}, expected 0 to 2**{bits} - 1 in a sample id")
    slots = (iteration << PROMPT_BITS) + prompts.to(torch.int64)
    member = torch.arange(members, device=prompts.device)
    return ((slots << MEMBER_BITS)[:, None] + member).flatten()


@dataclass(frozen=True)
class Roots:
    """Where the samples of a rollout begin."""

    seed: int
    """Of the run: 64 bits."""
    sample_id: Tensor
    """(B,) int64, from `sample_ids`."""
    prompt: Tensor
    """(B,) int64: the row of the conditioning that the velocity function is asked for."""
    shape: tuple[int, ...]
    """*D."""
    dtype: torch.dtype = torch.float32
    """Of the states."""


@dataclass(frozen=True)
class Batch:
    """Rows of a rollout to train on, one per (edge, sample)."""

    x_t: Tensor
    x_next: Tensor
    sigma: Tensor
    coefficients: Coefficients
    prompt: Tensor
    old_velocity: Tensor | None


@dataclass(frozen=True)
class Rollout:
    """What sampling leaves behind: the latents, and what training needs of the way there."""

    chain: Chain
    roots: Roots
    latents: Tensor
    """(B, *D): the last nodes."""
    states: Tensor
    """(N, B, *D): the nodes chain.kept."""
    velocity: Tensor | None
    """(E, B, *D): guided, at the trained edges, of the weights that sampled; None unless kept."""

    def batch(self, edge: Tensor, sample: Tensor) -> Batch:
        """Rows for pairs of trained edge (n,), counted from 0 to E - 1, and sample (n,)."""
        device = self.states.device
        at = self.chain.position.to(device)[edge]
        step = torch.tensor(self.chain.trained, device=device)[edge]
        return Batch(
            x_t=self.states[at, sample],
            x_next=self.states[at + 1, sample],
            sigma=self.chain.sigmas.to(device, self.states.dtype)[step],
            coefficients=self.chain.coefficients.to(device)[step],
            prompt=self.roots.prompt[sample],
            old_velocity=None if self.velocity is None else self.velocity[edge, sample],
        )


@torch.no_grad()
def run(
    chain: Chain,
    velocity: Velocity,
    roots: Roots,
    max_batch: int,
    guidance_scale: float = 1.0,
    uncond: int | None = None,
    keep_velocity: bool = False,
    backend: str | None = None,
) -> Rollout:
    """Walk the chain from all roots.

    max_batch: rows of one network call at most; guidance takes two rows per sample, in one call.
    guidance_scale, uncond: with a scale other than 1, the row of the conditioning without a prompt.
    keep_velocity: needed where the weights will have moved between sampling and training.
    """
    is_guided = guidance_scale != 1.0
    if is_guided and uncond is None:
        raise ValueError(f"uncond: needed for guidance_scale={guidance_scale}, got None")
    rows = max_batch // (2 if is_guided else 1)
    if rows < 1:
        raise ValueError(f"max_batch: got {max_batch}, expected at least {2 if is_guided else 1}")
    batch, device = len(roots.sample_id), roots.sample_id.device
    options = {"dtype": roots.dtype, "device": device}
    edges = len(chain.trained) if keep_velocity else 0
    rollout = Rollout(
        chain,
        roots,
        torch.empty(batch, *roots.shape, **options),
        torch.empty(len(chain.kept), batch, *roots.shape, **options),
        torch.empty(edges, batch, *roots.shape, **options) if keep_velocity else None,
    )
    guide = (guidance_scale, uncond) if is_guided else None
    for part in _slices(batch, rows):
        _walk(rollout, velocity, part, guide, backend)
    return rollout


def _slices(count: int, size: int) -> list[slice]:
    """As few slices of at most `size` as there can be, of nearly equal length."""
    parts = math.ceil(count / size)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _walk(
    rollout: Rollout,
    velocity: Velocity,
    part: slice,
    guide: tuple[float, int] | None,
    backend: str | None,
) -> None:
    """Samples `part` from noise to the end, one network call per step."""
    chain, roots = rollout.chain, rollout.roots
    sample_id, prompt = roots.sample_id[part], roots.prompt[part]
    device, count = sample_id.device, len(sample_id)
    coefficients = chain.coefficients.to(device)
    sigmas = chain.sigmas.to(device, roots.dtype)
    kept = {node: rollout.states[i, part] for i, node in enumerate(chain.kept)}
    shape = (count, *roots.shape)
    x = philox_normal(shape, roots.seed, sample_id, 0, "init", backend=backend).to(roots.dtype)
    for i in range(len(chain)):
        if i in kept:
            kept[i].copy_(x)
        v, options = _call(velocity, x, sigmas[i], prompt, guide)
        if rollout.velocity is not None and i in chain.trained:
            rollout.velocity[chain.trained.index(i), part] = guided(v, **options)
        options["backend"] = backend
        if chain.is_noisy[i]:
            noise = {"seed": roots.seed, "sample_id": sample_id, "step": i}
            x = sde_step(x, v, coefficients[i], out_dtype=roots.dtype, **noise, **options)[0]
        else:
            x = ode_step(x, v, coefficients[i], out_dtype=roots.dtype, **options)
    if len(chain) in kept:
        kept[len(chain)].copy_(x)
    rollout.latents[part] = x


def _call(velocity, x, sigma, prompt, guide):
    """The velocity and the guidance arguments of a step, from one call."""
    if guide is None:
        return velocity(x, sigma.expand(len(x)), prompt), {}
    scale, uncond = guide
    both = torch.cat([prompt, torch.full_like(prompt, uncond)])
    v, v_uncond = velocity(torch.cat([x, x]), sigma.expand(2 * len(x)), both).chunk(2)
    return v, {"velocity_uncond": v_uncond, "guidance_scale": scale}


def guided(velocity: Tensor, velocity_uncond: Tensor | None = None, guidance_scale: float = 1.0):
    """The velocity with guidance, in the precision of the step kernel."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    return reference.guided(velocity, velocity_uncond, guidance_scale, dtype)
