"""MILES's Flow-GRPO loss."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.checks import finite_number
from flowkern.compat._names import naming
from flowkern.compat.miles.backend import SdeStepBackend, Transition
from flowkern.compat.miles.metrics import emit_means, emit_model_output, extra, of_rollout
from flowkern.ops.policy_loss import PolicyLoss, policy_loss
from flowkern.ops.sde_step import sde_log_prob
from flowkern.schedules import MAX_HISTORY, Coefficients


@naming(
    velocity="new_pred",
    velocity_ref="ref_pred",
    x_t="prepared.latents",
    x_next="prepared.extras['next_latents']",
    advantage="prepared.advantage",
    old_log_prob="prepared.extras['log_prob_old']",
    c_rows="prepared.timesteps",
    timestep="prepared.timesteps",
    noise_level="--diffusion-noise-level",
    clip_low="--diffusion-clip-range",
)
def grpo_loss(
    ctx,
    batch: list[dict],
    prepared,
    *,
    new_pred: Tensor,
    ref_pred: Tensor | None = None,
    old_pred: Tensor | None = None,
    metrics,
    write_old_log_prob: bool = False,
    old_log_prob_from_new: bool = False,
) -> Tensor | None:
    """MILES's Flow-GRPO loss of a micro-batch, summed; `policy_loss` is all of it.

    The KL is theirs: mean((mean - mean_ref)^2) / (2 std_dev_t^2). With --diffusion-score-centering
    the expected score is subtracted from each gradient.

    Args:
        ctx: args, sde_backend, models and device are read. A backend that is not of this module is
            asked for its coefficients.
        prepared: latents (B, *D), timesteps (B,), advantage (B,), and as extras next_latents,
            log_prob_old, and next_timesteps (or sigmas, next_sigmas and sigma_max).
        new_pred, ref_pred: (B, *D) velocities; ref_pred only with a KL. old_pred: not used.
        write_old_log_prob: store each pair["log_prob_old"] and return None.
        old_log_prob_from_new: on policy: the ratio is exactly 1, its gradient kept.
    """
    args, x_t, x_next = ctx.args, prepared.latents, extra(prepared, "next_latents")
    edges, std, g = _transition(ctx, prepared)
    if write_old_log_prob:
        with torch.no_grad():
            log_prob = sde_log_prob(x_t, new_pred, x_next, edges).cpu()
        for pair, one in zip(batch, log_prob, strict=True):
            pair["log_prob_old"] = one
        return None
    beta, clip = _number(args, "kl_beta"), _number(args, "clip_range")
    if beta > 0 and ref_pred is None:
        raise ValueError("ref_pred: needed for --diffusion-kl-beta > 0, got None")
    # flowkern's KL divides by std^2, theirs by g^2; without noise it is 0.
    over_g2 = torch.where(g > 0, std / g, 0.0).square() if beta > 0 else 0.0
    old = None if old_log_prob_from_new else extra(prepared, "log_prob_old")
    out = policy_loss(
        new_pred, x_t, x_next, edges, prepared.advantage, old_log_prob=old,
        velocity_ref=ref_pred if beta > 0 else None, kl_coef=beta * over_g2,
        clip_low=clip, clip_high=clip, reduction="none",
    )  # fmt: skip
    with torch.no_grad():
        if old is None:  # of the first sample, for a metric
            first = (x[:1] for x in (x_t, new_pred, x_next))
            old = sde_log_prob(*first, edges if edges.table.ndim == 1 else edges[:1])
        _emit_policy(metrics, ctx, prepared, out, old, (beta, over_g2))
        emit_model_output(metrics, ctx, batch, prepared, new_pred)
    loss = out.loss.sum()
    if hasattr(args, "diffusion_score_centering"):  # a MILES that has it
        loss = loss - _expected_score(metrics, args, batch, prepared, new_pred, edges, out)
    return loss


def _number(args, name: str) -> float:
    flag = f"--diffusion-{name.replace('_', '-')}"
    return finite_number(
        flag, getattr(args, f"diffusion_{name}"), "a finite number", lambda _: True
    )


def _transition(ctx, prepared) -> Transition:
    backend, x_t, level = ctx.sde_backend, prepared.latents, ctx.args.diffusion_noise_level
    is_ours = isinstance(backend, SdeStepBackend) and not backend.has_own_step
    extras = prepared.extras
    if "next_timesteps" not in extras:
        if "next_sigmas" not in extras:
            raise ValueError(
                "prepared.extras: expected next_timesteps, or sigmas, next_sigmas and sigma_max, "
                f"got {', '.join(extras)}"
            )
        if not is_ours:
            raise ValueError(
                "--sde-step-backend-path: of pairs with sigmas grpo_loss needs "
                f"flowkern.compat.miles.SdeStepBackend, got {type(backend).__name__}"
            )
        return backend.between(extras["sigmas"], extras["next_sigmas"], level, extras["sigma_max"])
    times = prepared.timesteps, extras["next_timesteps"]
    if is_ours:
        return backend.transition(*times, level, x_t.device)
    sigmas = backend.resolve_sigmas(*times, ndim=x_t.ndim)
    return _asked(backend, *(s.to(x_t.device) for s in sigmas), level)


_affine: set[type] = set()  # classes of backends whose mean has been looked at


def _asked(backend, sigma: Tensor, sigma_next: Tensor, level) -> Transition:
    """Of a backend of MILES or of one's own, which says its mean and standard deviation: a is the
    mean where x_t = 1 and velocity = 0, b the reverse, c the log-probability of the mean itself."""
    sigma, sigma_next = sigma.double(), sigma_next.double()
    x, v = (
        sigma.new_tensor(ones).reshape(1, 3, *[1] * (sigma.ndim - 2)) + torch.zeros_like(sigma)
        for ones in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    )
    with torch.no_grad():
        mean, std, g = backend.prev_sample_mean_and_std(v, x, sigma, sigma_next, noise_level=level)
        a, b, both = mean.double().flatten(1).unbind(1)
        zero = torch.zeros_like(sigma)
        c, one_off = (backend.log_prob(zero + away, zero, std).double() for away in (0.0, 1.0))
    if type(backend) not in _affine:
        if not bool(((both - a - b).abs() < 1e-4).all()):
            raise ValueError(
                f"--sde-step-backend-path: grpo_loss needs a mean a x_t + b velocity, "
                f"{type(backend).__name__} has another"
            )
        _affine.add(type(backend))
    std, g = (x.double().reshape(-1) for x in (std, g))
    rows = (a, b, std, c - one_off, c, *[torch.zeros_like(a)] * MAX_HISTORY, sigma.reshape(-1))
    return Transition(Coefficients(torch.stack(rows, 1)), std.float(), g.float())


def _emit_policy(metrics, ctx, prepared, out: PolicyLoss, old: Tensor, kl_of: tuple) -> None:
    """What MILES reports of a micro-batch, in a few small operations on (statistics, B)."""
    beta, over_g2 = kl_of
    kl = out.kl * over_g2 if beta > 0 else out.kl  # 0 without a reference
    policy = out.loss - beta * kl if beta > 0 else out.loss
    away = out.ratio - 1
    rows = torch.stack([out.loss, policy, kl, prepared.advantage, away, out.log_ratio])
    loss, policy_sum, kl_sum, *_ = rows.sum(1)
    _, policy_size, _, advantage_size, away_size, log_size = rows.abs().sum(1)
    sums = {
        "loss": loss,
        "policy_loss": policy_sum,
        "kl_loss": kl_sum,
        "loss_abs_mean": policy_size,
        "adv_abs_mean": advantage_size,
        "ratio_abs_minus_1": away_size,
        "approx_kl": 0.5 * out.log_ratio.square().sum(),
        "clipfrac": (away.abs() > float(ctx.args.diffusion_clip_range)).sum(),
        "log_prob_mean_abs_diff": log_size,
    }
    if len(ctx.models) > 1:
        sums[f"log_prob_mean_abs_diff_{prepared.component_name}"] = log_size
    emit_means(metrics, sums, rows.shape[1])
    first = {"log_prob_new_idx_0": old[0] + out.log_ratio[0], "log_prob_old_idx_0": old[0]}
    emit_means(metrics, first, 1)


def _expected_score(
    metrics, args, batch: list[dict], prepared, new_pred: Tensor, edges: Coefficients, out
) -> Tensor | float:
    """0, with the gradient that the loss has in expectation over the rollout's own steps.

    The rollout draws around its mean, so its expected score is the score of that mean.
    """
    means = of_rollout(batch, "rollout_step_prev_sample_mean", new_pred)
    if means is None:
        if args.diffusion_score_centering:
            raise ValueError(
                "--diffusion-score-centering: needs the rollout's means, which come with "
                "--diffusion-debug-mode"
            )
        return 0.0
    if args.diffusion_score_centering and means.shape != new_pred.shape:
        raise ValueError(
            f"--diffusion-score-centering: the rollout's means of shape {tuple(means.shape)} are "
            f"laid out unlike the velocity's {tuple(new_pred.shape)}"
        )
    edges = edges.without_normalizer()  # so that near means leave a small number, not a difference
    with torch.set_grad_enabled(args.diffusion_score_centering):
        score = sde_log_prob(prepared.latents, new_pred, means.reshape(new_pred.shape), edges)
    away = (-score.detach() / edges.k).sqrt() / edges.std
    away = away.masked_fill(edges.std == 0, 0.0)  # where there is no noise to measure it by
    metrics.emit_mean("prev_mean_diff_over_noise_std", total=away.sum(), count=len(batch))
    is_cut = out.clipped_low | out.clipped_high
    weight = torch.where(is_cut, 0.0, -prepared.advantage * out.ratio)
    return (weight * (score - score.detach())).sum()
