"""The losses as the fuzzer sees them: as steps.py, with gradients by hand."""

from __future__ import annotations

import math

import torch

import flowkern as fk

from .bounds import Bounded, U, monotone, unless_zero, where
from .inputs import Draw
from .steps import (
    WEIGHTS,
    Edges,
    Op,
    exact,
    float32,
    guided,
    noise_of,
    scale_of,
    with_gradient,
)


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else -math.inf


class Ratio:
    """The clipped part of a loss: from log_ratio to the loss of each sample and its slope."""

    def __init__(self, p, log_ratio: Bounded):
        a, self.log_ratio = exact(p["advantage"].float()), log_ratio
        high, low = math.log1p(p["clip_high"]), _log1p(-p["clip_low"])
        self.is_high = (a.value > 0) & (log_ratio.value > high)
        self.is_low = (a.value < 0) & (log_ratio.value < low)
        slack = log_ratio.error + U * log_ratio.value.abs()
        self.unsure = (a.value > 0) & ((log_ratio.value - high).abs() <= slack)
        self.unsure |= (a.value < 0) & ((log_ratio.value - low).abs() <= slack)
        self.unsure &= log_ratio.error > 0  # an exact tie is no matter of rounding
        self.unsure |= log_ratio.value.isinf()  # or NaN, by another way to the same sum

        def clamped(x):
            capped = torch.where(a.value > 0, x.clamp(max=high), x)
            return torch.where(a.value < 0, capped.clamp(min=low), capped)

        self.loss = -a * self._exp(monotone(clamped, log_ratio))
        slope = -a * self._exp(log_ratio)
        zero = torch.zeros_like(slope.value)
        slope = where(self.is_high | self.is_low, Bounded(zero), slope)
        self.slope = Bounded(slope.value, torch.where(self.unsure, torch.inf, slope.error))

    @staticmethod
    def _exp(x: Bounded) -> Bounded:  # as 1 + expm1(x)
        return monotone(torch.expm1, x) + Bounded(torch.ones_like(x.value))

    def results(self) -> dict[str, Bounded]:
        flags = {"clipped_low": self.is_low, "clipped_high": self.is_high}
        unsure = torch.where(self.unsure, torch.inf, 0.0)
        flags = {n: Bounded(f, torch.where(unsure > 0, unsure, 0.0)) for n, f in flags.items()}
        return {"log_ratio": self.log_ratio, "ratio": self._exp(self.log_ratio)} | flags


def reduced(p, loss: Bounded) -> tuple[Bounded, Bounded]:
    """The loss as it is returned, and the gradient that reaches each sample."""
    grad, batch = exact(p[WEIGHTS]), max(1, len(loss.value))
    if p["reduction"] == "none":
        return loss, grad
    grad = grad + Bounded(torch.zeros_like(loss.value))
    if p["reduction"] == "sum":
        return loss.sum(), grad
    return loss.sum() * (1 / batch), grad * (1 / batch)


def unknown(x: Bounded) -> torch.Tensor:
    """(B,): an infinite error for samples with an element that may not be finite."""
    is_known = (x.value.isfinite() & x.error.isfinite()).flatten(1).all(1)
    return torch.where(is_known, 0.0, torch.inf).double()


def mean_square(x: Bounded) -> Bounded:
    return (x * x).mean()


class PolicyLoss(Op):
    name = "policy_loss"

    def arguments(self, draw: Draw) -> dict:
        return draw.policy()

    def call(self, p) -> dict:
        return with_gradient(p, lambda a: fk.policy_loss(**a)._asdict())

    def bounds(self, p, got) -> dict[str, Bounded]:
        velocity, row = p["velocity"], p.get("row")
        index = torch.arange(len(velocity), device=velocity.device) if row is None else row.long()
        of = lambda x: None if x is None else x[index]  # noqa: E731
        edges, v, x = Edges(p["c_rows"], velocity), of(guided(p)), of(exact(p["x_t"]))
        old, ref = of(exact(p.get("old_velocity"))), of(exact(p.get("velocity_ref")))
        zero = Bounded(torch.zeros(len(index), dtype=torch.float64, device=velocity.device))
        k, b, std, c = (r + zero for r in (edges.k, edges.b, edges.std, edges.c))
        noisy = std.value > 0
        over_std = where(noisy, b / where(noisy, std, Bounded(torch.ones_like(std.value))), zero)

        mean_old = edges.mean(x, v if old is None else old)
        x_next = exact(p["x_next"])
        if x_next is None:
            x_next = edges.drawn(mean_old, noise_of(p, x.value.shape, "step"))
        e = x_next - mean_old
        if p["x_next"] is None:
            is_zero = edges.wide(std.value == 0) & e.value.isfinite()
            e = where(is_zero, Bounded(torch.zeros_like(e.value)), e)
        residual = x_next - edges.mean(x, v)
        d = None if old is None else edges.wide(edges.b) * (v - old)
        is_guard = p["ratio"] == "guard"
        if p.get("old_log_prob") is not None:
            log_ratio = (c - k * mean_square(residual)) - exact(p["old_log_prob"])
        elif old is None:  # 0 without a look at the data; NaN is not promised to come through
            log_ratio = Bounded(zero.value, unknown(residual))
        elif is_guard:
            log_ratio = where(
                noisy, (e * d).mean() / where(noisy, std, zero + Bounded(zero.value + 1)), zero
            )
        else:
            log_ratio = k * (d * (2.0 * e - d)).mean()

        ratio, size = Ratio(p, log_ratio), max(1, math.prod(velocity.shape[1:]))
        weight = exact(p.get("step_weight")) or Bounded(zero.value + 1)
        coefficient = p["kl_coef"]
        if not isinstance(coefficient, torch.Tensor):
            coefficient = zero.value + float32(coefficient)
        coefficient = exact(coefficient)
        kl = zero
        if ref is not None:
            kl = unless_zero(over_std * over_std * 0.5, mean_square(v - ref))
        loss, grad = reduced(p, weight * ratio.loss + unless_zero(coefficient, kl))

        per_residual = over_std * (1 / size) if is_guard else k * b * (2 / size)
        slope = grad * scale_of(p) * weight * ratio.slope * per_residual
        # On policy no sum has looked at the data, so what is not finite comes through any slope.
        is_on_policy = old is None and p.get("old_log_prob") is None
        term = (lambda x, y: x * y) if is_on_policy else unless_zero
        gradient = term(edges.wide(slope), e if is_guard else residual)
        if ref is not None:
            slope = grad * scale_of(p) * coefficient * over_std * over_std * (1 / size)
            gradient = gradient + unless_zero(edges.wide(slope), v - ref)
        gradient = gradient.scattered(index, len(velocity)).within(velocity.dtype)
        return {"loss": loss, "kl": kl, "gradient": gradient} | ratio.results()


class MatchingLoss(Op):
    name = "matching_loss"

    def arguments(self, draw: Draw) -> dict:
        return draw.matching()

    def call(self, p) -> dict:
        return with_gradient(p, lambda a: fk.matching_loss(**a)._asdict())

    def bounds(self, p, got) -> dict[str, Bounded]:
        velocity, row = p["velocity"], p.get("row")
        index = torch.arange(len(velocity), device=velocity.device) if row is None else row.long()
        of = lambda n: None if p.get(n) is None else exact(p[n])[index]  # noqa: E731
        wide = lambda x: x.reshape(-1, *[1] * (velocity.ndim - 1))  # noqa: E731
        v, old, t = of("velocity"), of("old_velocity"), exact(p["sigma"].float())
        u = noise_of(p, p["x0"].shape, "match") - exact(p["x0"])
        size = max(1, math.prod(velocity.shape[1:]))
        objective = self._nft if p["objective"] == "nft" else self._awm
        loss, terms, results = objective(p, v, old, u, t, size)
        for name, coefficient in (("velocity_ref", p["ref_coef"]), ("velocity_ema", p["ema_coef"])):
            anchor, short = of(name), name.removeprefix("velocity_")
            results[short] = Bounded(torch.zeros_like(t.value))
            if anchor is not None:
                results[short] = mean_square(v - anchor)
                if not isinstance(coefficient, torch.Tensor):
                    coefficient = torch.full_like(t.value, float32(coefficient))
                factor = exact(coefficient.float())
                loss = loss + unless_zero(factor, results[short])
                terms.append((factor * (2 / size), v - anchor))
        loss, grad = reduced(p, loss)
        gradient = None
        for slope, residual in terms:
            term = unless_zero(wide(grad * slope), residual)
            gradient = term if gradient is None else gradient + term
        gradient = gradient.scattered(index, len(velocity)).within(velocity.dtype)
        return results | {"loss": loss, "gradient": gradient}

    def _awm(self, p, v, old, u, t, size):
        floor, weighting = 1e-10, p["weighting"]
        # huber: half of what ghuber makes of square roots.
        power, part = (0.5, 0.5) if weighting == "huber" else (p.get("ghuber_power", 0.25), 1.0)
        matching, one = mean_square(v - u), Bounded(torch.ones_like(t.value))
        log_ratio = Bounded(torch.zeros_like(t.value), unknown(2.0 * (v - u)))
        if weighting in ("huber", "ghuber"):
            slope = monotone(lambda m: part * (m.clamp(min=0) + floor) ** (power - 1), matching)
            # Squares past float32 are infinite in a kernel: the value here is not the true one.
            is_known = matching.error.isfinite()
            minus = -t * Bounded(slope.value, torch.where(is_known, slope.error, torch.inf))
        else:
            minus = -{"uniform": one, "t": t, "t2": t * t}[weighting]
        if old is not None:
            change = ((v - old) * ((v - u) + (old - u))).mean()

            def ghuber(m, dm):
                before = m + floor - dm
                grown = torch.expm1(power * torch.log1p(dm / before))
                return part * before**power * grown / power

            log_ratio = minus * change
            if weighting in ("huber", "ghuber"):
                log_ratio = -t * monotone(ghuber, matching, change)
        ratio = Ratio(p, log_ratio)
        terms = [(ratio.slope * minus * (2 / size), v - u)]
        return ratio.loss, terms, ratio.results() | {"matching": matching}

    def _nft(self, p, v, old, u, t, size):
        one = Bounded(torch.ones_like(t.value))
        half = lambda a: (0.5 + a / 2).clamp(0, 1)  # noqa: E731
        r = monotone(half, exact(p["advantage"].float()))
        beta = Bounded(one.value * p["nft_beta"], one.value * p["nft_beta"] * U)
        if old is not None and p["nft_beta"] != 1:
            v = old + beta.reshape(-1, *[1] * (v.value.ndim - 1)) * (v - old)
        minus = v if old is None else 2.0 * old - v
        weights = [one, one]
        if p["weighting"] == "adaptive":
            weights = [
                monotone(lambda w: w.clamp(min=1e-5), t * (x - u).abs().mean()) for x in (v, minus)
            ]
        parts = [mean_square(x - u) / w for x, w in zip((v, minus), weights, strict=True)]
        matching = t * t * (unless_zero(r, parts[0]) + unless_zero(one - r, parts[1]))
        slopes = [
            share * t * t * (10 / size) / w
            for share, w in zip((r, -(one - r)), weights, strict=True)
        ]
        terms = list(zip(slopes, (v - u, minus - u), strict=True))
        if old is None:  # both residuals are one: what cancels does not look at it
            terms = [(slopes[0] + slopes[1], v - u)]
        zero = Bounded(torch.zeros_like(t.value))
        flags = {n: zero for n in ("log_ratio", "clipped_low", "clipped_high")}
        return 5.0 * matching / beta, terms, flags | {"ratio": one, "matching": matching}


LOSSES = (PolicyLoss(), MatchingLoss())
