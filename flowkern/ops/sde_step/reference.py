"""The step in plain torch: the truth the kernels are held to, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.philox import reference_normal
from flowkern.ops._common.rows import column, guided
from flowkern.schedules import COLUMNS, MAX_HISTORY

from .inputs import FromMean, StepInputs, StepOutputs

CHUNK = 1024


def mean_and_x0(i: StepInputs) -> tuple[Tensor, Tensor]:
    dtype = i.edges.dtype
    x, v = i.x_t.to(dtype), guided(i.velocity, i.velocity_uncond, i.guidance_scale, dtype)
    mean = column(i.edges, "a", x) * x + column(i.edges, "b", x) * v
    for j, earlier in enumerate(i.history[:MAX_HISTORY]):
        mean = mean + column(i.edges, f"h{j + 1}", x) * earlier.to(dtype)
    return mean, x - column(i.edges, "sigma", x) * v


def log_prob_of(x_next: Tensor, mean: Tensor, edges: Tensor) -> Tensor:
    """(B,) from fixed chunks, one sample at a time.

    torch's sums depend on the shape and, over enough elements, on the threads; a replay must not.
    """
    residual = (x_next.to(edges.dtype) - mean).flatten(1)
    k, c = edges[..., COLUMNS.index("k")], edges[..., COLUMNS.index("c")]
    batch, size = residual.shape
    if residual.numel() == 0:
        return (c - k * 0).expand(batch).clone()
    chunks = torch.nn.functional.pad(residual, (0, -size % CHUNK)).reshape(batch, -1, CHUNK)
    partial = chunks.square().sum(2).double()
    squares = torch.stack([sample.sum() for sample in partial.unbind()]) / size
    return c - k * squares.to(edges.dtype)


def draw(i: StepInputs, source: Noise, out: StepOutputs) -> None:
    with torch.no_grad():
        mean, predicted = mean_and_x0(i)
        value = mean
        noise = source.given
        if source.sample_id is not None:
            noise = reference_normal(i.x_t.shape, source, STREAMS["step"], i.x_t.device)
        if noise is not None:
            std = column(i.edges, "std", mean)
            value = torch.where(
                std > 0, mean + std * noise.to(mean.dtype), mean
            )  # std == 0 never reads the noise
        if out.x0 is not None:
            out.x0.copy_(predicted)
        if out.mean is not None:
            out.mean.copy_(mean)
        if out.round_dtype is not None:
            value = value.to(out.round_dtype)
        out.x_next.copy_(value)
        if out.log_prob is not None:
            out.log_prob.copy_(log_prob_of(out.x_next, mean, i.edges))


def replay(i: StepInputs, x_next: Tensor) -> Tensor:
    return replay_mean(i, x_next)[0]


def replay_mean(i: StepInputs, x_next: Tensor) -> tuple[Tensor, Tensor]:
    mean, _ = mean_and_x0(i)
    return log_prob_of(x_next, mean, i.edges), mean.contiguous()


def replay_backward(grad: Tensor, i: StepInputs, x_next: Tensor) -> Tensor:
    """By hand, since it runs inside an op; the tests hold it to autograd through `replay`."""
    mean, _ = mean_and_x0(i)
    return _through_log_prob(grad, FromMean(x_next, mean, i.edges, i.scale)).to(i.velocity.dtype)


def mean_backward(
    grad: Tensor | None, grad_mean: Tensor | None, of: FromMean, dtype: torch.dtype
) -> Tensor:
    parts = []
    if grad is not None:
        parts.append(_through_log_prob(grad, of))
    if grad_mean is not None:
        parts.append(column(of.edges, "b", of.mean) * of.scale * grad_mean)
    return sum(parts[1:], parts[0]).to(dtype).contiguous()


def _through_log_prob(grad: Tensor, of: FromMean) -> Tensor:
    x_next, mean, edges, scale = of
    weight = grad.to(edges.dtype).reshape(-1, *[1] * (mean.ndim - 1))
    size = max(1, mean[0].numel() if len(mean) else 1)
    slope = weight * 2 * column(edges, "k", mean) * column(edges, "b", mean) * scale / size
    return slope * (x_next.to(edges.dtype) - mean)
