"""MILES's DiffusionNFT loss."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.checks import finite_number
from flowkern.compat._names import naming
from flowkern.compat.miles.metrics import emit_means, extra
from flowkern.ops._common.arguments import check_latents
from flowkern.ops.matching_loss import MatchingLoss, matching_loss


@naming(
    velocity="new_pred",
    old_velocity="ref_pred",
    x0="prepared.extras['x0']",
    x_next="prepared.latents",
    sigma="prepared.timesteps",
    advantage="prepared.advantage",
)
def nft_loss(
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
    """MILES's DiffusionNFT loss of a micro-batch, summed; `matching_loss` is all of it.

    Args:
        ctx: args is read: diffusion_nft_beta, diffusion_nft_adaptive_weight, and
            diffusion_nft_adv_clip_max or else diffusion_adv_clip_max.
        prepared: latents (B, *D), x_t = (1 - t) x0 + t noise; timesteps (B,), t itself;
            advantage (B,); and as an extra x0.
        new_pred: (B, *D). old_pred or else ref_pred: that of the old policy.
        write_old_log_prob: returns None: there are no log-probabilities, and old_log_prob_from_new
            means nothing.
    """
    if write_old_log_prob:
        return None
    args, t, x0 = ctx.args, prepared.timesteps, extra(prepared, "x0")
    old = ref_pred if old_pred is None else old_pred
    if old is None:
        raise ValueError("ref_pred: DiffusionNFT needs the old policy's velocity, got None")
    if old_pred is not None and ref_pred is not None and getattr(args, "diffusion_kl_beta", 0):
        raise ValueError("--diffusion-kl-beta: nft_loss has no KL; expected 0")
    cap = getattr(args, "diffusion_nft_adv_clip_max", None) or args.diffusion_adv_clip_max
    cap = finite_number("--diffusion-adv-clip-max", cap, _ABOVE_0, lambda x: x > 0)
    beta = finite_number("--diffusion-nft-beta", args.diffusion_nft_beta, _ABOVE_0, lambda x: x > 0)
    advantage = (prepared.advantage / cap).clamp(-1, 1)
    check_latents({"x0": x0, "x_next": prepared.latents})
    t, clean = t.float(), x0.float()
    # At t = 0 the noise is of no account, and the difference is 0; its square is finite.
    wide = t.reshape(-1, *[1] * (x0.ndim - 1)).clamp_min(1e-12)
    options = {
        "noise": torch.addcdiv(clean, prepared.latents.float() - clean, wide),
        "objective": "nft",
        "nft_beta": beta,
        "weighting": "adaptive" if args.diffusion_nft_adaptive_weight else "uniform",
        "old_velocity": old,
        "reduction": "none",
    }
    out = matching_loss(new_pred, x0, t, advantage, **options)
    loss = out.loss if cap == 5 else out.loss * (cap / 5)
    with torch.no_grad():
        branches = _branches((new_pred, x0, t), advantage, out, options)
        _emit_nft(metrics, batch, prepared, loss, branches)
    return loss.sum()


_ABOVE_0 = "a finite number > 0"

nft_loss.ref_mode = "ema"  # what MILES's actor asks its own: another forward, of the average
nft_loss.requires_sample_aligned_windows = True  # and that a sample's pairs share an optimizer step


def _branches(given: tuple, advantage: Tensor, out: MatchingLoss, options: dict) -> tuple:
    """r and the two losses that it weighs, (B,) each.

    `matching` is their weighted sum. Another forward pass gives the one of the smaller weight, at
    most 1/2, and then the other follows.
    """
    r = 0.5 + 0.5 * advantage
    is_plus = r <= 0.5
    asked = matching_loss(*given, torch.where(is_plus, 1.0, -1.0), **options).matching
    weight = torch.minimum(r, 1 - r)
    other = (out.matching - weight * asked) / (1 - weight)
    return r, torch.where(is_plus, asked, other), torch.where(is_plus, other, asked)


def _emit_nft(metrics, batch: list[dict], prepared, loss: Tensor, branches: tuple) -> None:
    """What MILES reports of a micro-batch; "loss" is that of all times of a sample."""
    num_timesteps = float(batch[0].get("nft_num_timesteps", 0) or 0)
    r, plus, minus = branches
    rows = [loss, r, plus, minus, prepared.advantage, prepared.timesteps, prepared.advantage.abs()]
    total, *others = torch.stack(rows).sum(1)
    of_all = total * max(num_timesteps, 1.0)
    names = (
        "nft_r_mean",
        "nft_pos_loss",
        "nft_neg_loss",
        "nft_adv_mean",
        "nft_t_mean",
        "adv_abs_mean",
    )
    sums = {"loss": of_all, "nft_loss": of_all, "nft_loss_per_pair": total}
    emit_means(metrics, sums | dict(zip(names, others, strict=True)), len(loss))
    emit_means(metrics, {"nft_num_timesteps": loss.new_tensor(num_timesteps)}, 1)
