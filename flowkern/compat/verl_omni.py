"""verl-project/verl-omni: its scheduler's step, and its DiffusionNFT loss.

    from flowkern.compat.verl_omni import FlowMatchSDEDiscreteScheduler

replaces the import from verl_omni.pipelines.schedulers. Or for all of verl-omni at once, in every
process that names `external_lib: flowkern.compat.verl_omni_plugin`: `install()`.

What differs: one kernel with the mean instead of some thirty operations; a velocity in bfloat16 is
not multiplied in bfloat16; sigma within 1e-5 of 1 counts as 1; and the log-probability is finite
(0) where the standard deviation is 0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flowkern.ops._common.arguments import check_latents
from flowkern.ops.matching_loss import matching_loss
from flowkern.schedules import Coefficients, step_coefficients

from ._grid import grid_of, level_of, per_sample
from ._names import naming, of_scheduler
from ._noise import Generators, randn_like
from ._peer import attribute, imported
from ._scheduler import step_index
from ._step import scored_step

_PROJECT = "verl-omni"
_NAME = "FlowMatchSDEDiscreteScheduler"
_ALGORITHMS = "verl_omni.trainer.diffusion.diffusion_algos"
_KINDS = {"sde": "flow_sde", "cps": "cps"}


class _Step:
    """verl-omni's scheduler with flowkern's step: drawn, or prev_sample replayed.

    What is replaced is `sample_previous_step`; verl-omni's own `step` calls it, and stays.

    Args of `sample_previous_step`:
        sample, model_output, prev_sample: (B, *D), any floating dtype; computed in float32.
        timestep: (B,) or (1,) of the scheduler's. None: the step at its `step_index`.
        noise_level: of the SDE; of sde_type="cps" the angle.
        return_sqrt_dt: return sqrt(-dt) (B or 1,) as a fifth value.
        include_logprob_normalizer: False leaves -log(std sqrt(2 pi)) out of log_prob.

    Returns:
        prev_sample (B, *D); log_prob (B,), a mean over D, or None; prev_sample_mean (B, *D);
        std_dev_t (B or 1, 1, ...), or () without a timestep: the diffusion coefficient (sde), the
        standard deviation (cps). All float32; log_prob and prev_sample_mean are differentiable in
        model_output.
    """

    @of_scheduler(x_t="sample", velocity="model_output", x_next="prev_sample")
    def sample_previous_step(
        self,
        sample: Tensor,
        model_output: Tensor,
        timestep: Tensor | None = None,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        noise_level: float = 0.7,
        prev_sample: Tensor | None = None,
        sde_type: str = "sde",
        return_logprobs: bool = True,
        return_sqrt_dt: bool = False,
        include_logprob_normalizer: bool = True,
    ) -> tuple[Tensor | None, ...]:
        if sde_type not in _KINDS:
            raise ValueError(f"sde_type: expected one of {tuple(_KINDS)}, got {sde_type!r}")
        if per_token_timesteps is not None:
            raise ValueError(
                "per_token_timesteps: verl-omni has one timestep for all tokens of a sample, and "
                "so has this; expected None"
            )
        index = self.step_index if timestep is None else step_index(self, timestep, sample.device)
        if index is None:
            raise ValueError(
                "timestep: None is the step at the scheduler's step_index, which `step` sets; "
                "expected one of its timesteps for each sample"
            )
        how = (_KINDS[sde_type], level_of(noise_level), include_logprob_normalizer)
        grid = grid_of(self.sigmas, sample.device, _edges, *how)
        edges = grid.sampler[index] if timestep is None else per_sample(grid.sampler, index)
        noise = None if prev_sample is not None else randn_like(model_output.detach(), generator)
        drawn, log_prob, mean = scored_step(sample, model_output, edges, prev_sample, noise)
        std_dev_t, sqrt_dt = (grid.g if sde_type == "sde" else grid.std)[index], grid.sqrt_dt[index]
        if timestep is None:
            sqrt_dt = sqrt_dt.expand(len(sample)).clone()
        else:
            std_dev_t = std_dev_t.reshape(-1, *[1] * (sample.ndim - 1))
        returns = (drawn, log_prob if return_logprobs else None, mean, std_dev_t)
        return (*returns, sqrt_dt) if return_sqrt_dt else returns


def _edges(sigmas: Tensor, kind: str, noise_level: float, with_normalizer: bool) -> Coefficients:
    edges = step_coefficients(sigmas, kind, noise_level)
    return edges if with_normalizer else edges.without_normalizer()


class _Loss:
    """verl-omni's DiffusionNFTLoss: a `matching_loss`, and one without gradient for its metrics.

    Args of `compute_loss`:
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt: (B, *D); the first has
            the gradient.
        t_expanded: (B, 1, ...), sigma of each sample. reward_prob: (B,) or (B, ...), averaged.
        config: of the actor; its `diffusion_loss` has mix_beta, adv_clip_max, ref_kl_coef and
            adaptive_weight_min, which is 1e-5 here and nothing else.

    Returns:
        the loss (), differentiable in forward_prediction, and the metrics, floats by name.
    """

    @classmethod
    @naming(
        velocity="forward_prediction", old_velocity="old_prediction", x_t="x0",
        velocity_ref="ref_forward_prediction", x_next="xt", sigma="t_expanded",
        nft_beta="diffusion_loss.mix_beta", ref_coef="diffusion_loss.ref_kl_coef",
    )  # fmt: skip
    def compute_loss(
        cls,
        *,
        forward_prediction: Tensor,
        old_prediction: Tensor,
        ref_forward_prediction: Tensor,
        x0: Tensor,
        xt: Tensor,
        t_expanded: Tensor,
        reward_prob: Tensor,
        config,
    ) -> tuple[Tensor, dict[str, float]]:
        options = config.diffusion_loss
        if options.adaptive_weight_min != 1e-5:
            raise ValueError(
                "diffusion_loss.adaptive_weight_min: expected 1e-5, which the kernel has, got "
                f"{options.adaptive_weight_min}"
            )
        if not options.adv_clip_max > 0:
            raise ValueError(
                f"diffusion_loss.adv_clip_max: expected a number > 0, got {options.adv_clip_max}"
            )
        check_latents({"x_t": x0, "x_next": xt})
        t = _rows("t_expanded", t_expanded, len(x0))[:, 0].float()
        r = _rows("reward_prob", reward_prob.to(x0.device, torch.float32), len(x0)).mean(1)
        clean, old = x0.detach().float(), old_prediction.detach()
        to_ref = {"velocity_ref": ref_forward_prediction.detach()}
        # At t = 0 the noise is of no account, and the difference is 0; its square is finite.
        wide = t.reshape(-1, *[1] * (x0.ndim - 1)).clamp_min(1e-12)
        nft = {
            "noise": torch.addcdiv(clean, xt.detach().float() - clean, wide),
            "old_velocity": old,
            "objective": "nft",
            "nft_beta": options.mix_beta,
        }
        factor = options.adv_clip_max / 5  # the kernel's is 5
        anchor = to_ref | {"ref_coef": options.ref_kl_coef / factor} if options.ref_kl_coef else {}
        out = matching_loss(forward_prediction, clean, t, 2 * r - 1, **nft, **anchor)
        loss = factor * out.loss
        with torch.no_grad():
            # The loss of a sample is r positive + (1 - r) negative: the one that weighs less is
            # asked for alone, with the distances, and the other follows.
            likely = r > 0.5
            rare = torch.where(likely, -1.0, 1.0)
            distances = to_ref | {"velocity_ema": old, "ref_coef": 1.0, "ema_coef": 1.0}
            alone = matching_loss(forward_prediction, clean, t, rare, **nft, **distances)
            share = torch.minimum(r, 1 - r)
            other = (out.matching - share * alone.matching) / (1 - share)
            metrics = {
                "policy_loss": options.adv_clip_max / options.mix_beta * out.matching.mean(),
                "positive_loss": torch.where(likely, other, alone.matching).mean(),
                "negative_loss": torch.where(likely, alone.matching, other).mean(),
                "ref_kl_loss": alone.ref.mean(),
                "old_deviate": alone.ema.mean(),
                "reward_prob_mean": r.mean(),
                "total_loss": loss.detach(),
            }
            values = torch.stack(tuple(metrics.values())).tolist()  # one wait for the device
        return loss, {f"actor/{name}": x for name, x in zip(metrics, values, strict=True)}


def _rows(name: str, values: Tensor, count: int) -> Tensor:
    """Of each sample what it has, (B, ...) as (B, N)."""
    if not values.ndim or len(values) != count:
        got = tuple(values.shape)
        raise ValueError(f"{name}: expected {count} rows, one per sample, got shape {got}")
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def install() -> None:
    """From here on verl-omni's scheduler steps by the kernel, and "diffusion_nft" is its loss.

    One that is not installed, or lacks a name, is refused before anything changes.
    """
    scheduler, algorithms = _their_scheduler(), imported(_ALGORITHMS, _PROJECT)
    register = attribute(algorithms, "register_diffusion_loss", _PROJECT)
    loss = _loss(_their_loss())
    register("diffusion_nft")(loss)
    scheduler.sample_previous_step = _Step.sample_previous_step


def __getattr__(name: str) -> type:
    if name == _NAME:
        return _scheduler(_their_scheduler())
    if name == "DiffusionNFTLoss":
        return _loss(_their_loss())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _their_scheduler() -> type:
    theirs = attribute(imported("verl_omni.pipelines.schedulers", _PROJECT), _NAME, _PROJECT)
    attribute(theirs, "sample_previous_step", _PROJECT)  # what its `step` does not call is in vain
    return theirs


def _their_loss() -> type:
    return attribute(imported(_ALGORITHMS, _PROJECT), "DiffusionNFTLoss", _PROJECT)


@cache
def _scheduler(theirs: type) -> type:
    class FlowMatchSDEDiscreteScheduler(_Step, theirs):
        __doc__ = _Step.__doc__
        __qualname__ = _NAME

    return FlowMatchSDEDiscreteScheduler


@cache
def _loss(theirs: type) -> type:
    """How verl-omni's class prepares a batch, and calls the loss, stays."""

    class DiffusionNFTLoss(_Loss, theirs):
        __doc__ = _Loss.__doc__
        __qualname__ = "DiffusionNFTLoss"

    return DiffusionNFTLoss
