"""SGLang's row: a rollout step, its noise at hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from drop_in_scripts import inputs
from drop_ins import against

from flowkern.compat.sglang import flow_sde_sampling


def step(device):
    v, x, noise, _ = inputs(device)
    session = SimpleNamespace(sigma_max=0.96, latents_shape=x.shape, noise_buffer=noise)
    batch = SimpleNamespace(
        rollout_sde_type="sde", rollout_noise_level=0.7, rollout_log_prob_no_const=False
    )
    kept = []
    scheduler = SimpleNamespace(
        _get_rollout_session_data=lambda batch: session,
        _rollout_variance_noise=lambda *_: session.noise_buffer,
        append_local_rollout_log_probs=lambda batch, *sums: kept.append(sums),
    )
    size = math.prod(x.shape[1:])

    def drop_in(v, x, noise, s, n):
        kept.clear()
        x_next = flow_sde_sampling(scheduler, batch, v, x, s, n, None)
        return x_next, kept[0][0] / size

    def published(v, x, noise, s, n):
        dt, near = n - s, torch.isclose(s, s.new_tensor(1.0))
        g = torch.sqrt(s / (1 - torch.where(near, 0.96, s))) * 0.7
        std = g * torch.sqrt(-dt)
        mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
        scored = -((noise * std) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return mean + noise * std, scored.sum((1, 2, 3)) / size

    edge = (torch.tensor(t, device=device) for t in (0.7, 0.6))
    return against("sglang, step", drop_in, published, (v, x, noise, *edge))


ROWS = [step]
