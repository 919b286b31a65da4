"""The token losses as the fuzzer sees them: as steps.py, with gradients by hand.

What follows from a log-probability is held to the one that came, not to the true one: in 16 bits
logits are rounded, and their error, taken through the ratio, would let anything pass.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import flowkern as fk
from flowkern.ops.token_loss import chunks

from .bounds import SUM_ROUNDINGS, TINY, Bounded, U, monotone, where
from .inputs import DTYPES, Draw
from .losses import Ratio
from .steps import WEIGHTS, Op, exact

INPUTS = ("hidden", "weight", "bias")
GEMMS = "gemms"  # "16 bits": also on a CPU that takes float32 for them; not an argument of the verb
LEAST_EXP = 1e-37  # below it kernels take an exp for 0
COUNTS, VOCABULARIES = (2, 3, 7, 33, 100), (2, 3, 15, 16, 17, 100, 256, 257)
HIDDEN = (1, 2, 3, 8, 16, 17, 40, 64)
# Of a call's options, those that every few hundred calls must have drawn.
KINDS = (
    "tokens none", "tokens one", "tokens several chunks", "vocabulary one", "vocabulary long",
    "vocabulary whole vectors", "vocabulary other", "target the last id", "logits of 1e4",
    "GEMMs of 16 bits", "bias", "bias masked", "temperature", "softcap", "weight frozen",
    "hidden frozen",
    *(f"tokens {str(dtype).removeprefix('torch.')}" for dtype in DTYPES),
)  # fmt: skip
KINDS_OF_A_LOSS = (
    "on policy", "weights of 0", "weights all 0", "advantages of 0", "KL", "entropy", "dual clip",
    "correction", "unbounded below",
)  # fmt: skip


# ---- arguments ----


def _problem(draw: Draw) -> dict:
    """A head and hidden states, and ids."""
    r, normal = draw.r, lambda *size: torch.randn(*size, generator=draw.g)
    count, vocabulary = _sizes(draw)
    size = r.choice(HIDDEN)
    dtype = draw.dtype or r.choice(DTYPES)
    draw.drawn[f"tokens {str(dtype).removeprefix('torch.')}"] += 1
    scale = r.choice((0.0, 2.0, 2.0, 2.0, 8.0))
    if draw.maybe(0.15):
        draw.drawn["logits of 1e4"] += 1
        scale = 1e4
    hidden = draw.latent((count, size), normal(count, size).clamp(-4, 4), dtype)
    weight = (normal(vocabulary, size) * scale / size**0.5).clamp(-3e4, 3e4)
    ids = torch.randint(vocabulary, (count,), generator=draw.g)
    if count and draw.maybe(0.3):
        draw.drawn["target the last id"] += 1
        ids[-1] = vocabulary - 1
    p = {"hidden": hidden, "weight": draw.latent((vocabulary, size), weight, dtype)}
    p |= _settings(draw)
    if draw.maybe(0.4):
        draw.drawn["bias"] += 1
        bias = normal(vocabulary)
        if vocabulary > 1 and "softcap" not in p and draw.maybe(0.4):
            draw.drawn["bias masked"] += 1
            bias[: vocabulary // 2] = -math.inf
            ids.clamp_(min=vocabulary // 2)
        p["bias"] = (
            torch._neg_view(-bias.to(draw.device, dtype))
            if draw.maybe(0.2)
            else bias.to(draw.device, dtype)
        )
    kinds = (torch.int64, torch.int64, torch.int32)
    p["ids"] = ids.to(draw.device, r.choice(kinds))
    if draw.maybe(0.3):
        p["ids"] = torch.stack([p["ids"], p["ids"] * 0], 1)[:, 0]
    frozen = r.choice(("", "", "", "weight", "weight", "hidden"))
    for name in INPUTS:
        if name in p:
            p[name].requires_grad_(name != frozen and not (name == "bias" and frozen == "weight"))
    # Of 200 million operations a second on some CPUs.
    can = dtype.itemsize == 2 and count * vocabulary * size <= 200_000
    p[GEMMS] = "16 bits" if can and draw.maybe(0.6) else "its own"
    draw.drawn[f"GEMMs of {p[GEMMS]}"] += 1
    if frozen:
        draw.drawn[f"{frozen} frozen"] += 1
    return p


def _sizes(draw: Draw) -> tuple[int, int]:
    kind = draw.r.choice(("none", "one", "several chunks", "", "", ""))
    if kind:
        draw.drawn[f"tokens {kind}"] += 1
    counts = {"none": 0, "one": 1, "several chunks": draw.r.choice((257, 300))}
    count = counts.get(kind, draw.r.choice(COUNTS))
    vocabulary = draw.r.choice(VOCABULARIES if count <= 100 else VOCABULARIES[:6])
    vocabulary = 1 if draw.maybe(0.1) else vocabulary
    if count <= 3 and draw.maybe(0.4):  # chunks of the row kernels, and beyond
        vocabulary = draw.r.choice((1023, 1024, 1025, 2049, 5000))
        draw.drawn["vocabulary long"] += 1
    name = "one" if vocabulary == 1 else "other" if vocabulary % 16 else "whole vectors"
    draw.drawn[f"vocabulary {name}"] += 1
    return count, vocabulary


def _settings(draw: Draw) -> dict:
    p = {"budget_bytes": draw.r.choice((1, 1, 2**28))}
    if draw.maybe(0.4):
        draw.drawn["temperature"] += 1
        p["temperature"] = draw.r.choice((0.6, 0.7, 2.0))
    if draw.maybe(0.25):
        draw.drawn["softcap"] += 1
        p["softcap"] = draw.r.choice((2.0, 5.0, 30.0))
    return p


def _objective(draw: Draw, p: dict) -> dict:
    """What the loss takes beside; log-probabilities near the policy's own."""
    r, count = draw.r, len(p["ids"])
    head = {n: p[n] for n in ("temperature", "softcap") if n in p}
    tensors = {n: p[n].detach().double() for n in INPUTS if n in p}
    lp = fk.linear_log_prob(**tensors, ids=p["ids"], **head, backend="reference").cpu()
    away = r.choice((0.0, 1e-3, 0.3, 0.3, 3.0, 30.0))
    near = lambda: draw.per_sample(count, lp + away * torch.randn(count, generator=draw.g))  # noqa: E731
    q = {"old_log_prob": near(), "advantage": _some_zero(draw, "advantages of 0", count)}
    q["token_weight"] = _some_zero(draw, "weights of 0", count) * r.choice((1.0, 1e-6))
    if draw.maybe(0.12):
        draw.drawn["weights all 0"] += 1
        q["token_weight"] = torch.zeros_like(q["token_weight"])
    if draw.maybe(0.25):
        draw.drawn["on policy"] += 1
        q["old_log_prob"] = None
    if draw.maybe(0.3):
        draw.drawn["KL"] += 1
        q |= {"ref_log_prob": near(), "kl_coef": r.choice((0.001, 0.2))}
    if draw.maybe(0.3):
        draw.drawn["entropy"] += 1
        q["entropy_coef"] = r.choice((0.01, 0.3))
    if draw.maybe(0.3):
        draw.drawn["correction"] += 1
        q |= {"sample_log_prob": near(), "is_cap": r.choice((0.9, 2.0, math.inf))}
    if draw.maybe(0.3):
        draw.drawn["dual clip"] += 1
        q["dual_clip"] = r.choice((1.05, 3.0))
    q |= {"clip_low": r.choice((0.0, 0.2, 0.2, 1.0)), "clip_high": r.choice((0.0, 0.2, 5.0))}
    draw.drawn["unbounded below"] += q["clip_low"] == 1.0
    return q


def _some_zero(draw: Draw, kind: str, count: int) -> Tensor:
    x = torch.randn(count, generator=draw.g)
    if draw.maybe(0.25):
        draw.drawn[kind] += 1
        x[torch.rand(count, generator=draw.g) < draw.r.choice((0.1, 0.5, 0.95))] = 0
    return draw.per_sample(count, x)


# ---- the distribution ----


def _number(x: float, like: Bounded) -> Bounded:
    """A setting, which float32 rounds."""
    value = like.value.new_tensor(float(x))
    return Bounded(value, U * value.abs())


def _product(x: Bounded, y: Bounded, dtype: torch.dtype, rounded: float = 0.0) -> Bounded:
    """x y^T as GEMMs make it, in any order; `rounded`: times that what they add is rounded to the
    dtype before it is added.
    """
    a, b = x.value.abs(), y.value.abs()
    size = (a + x.error) @ (b + y.error).t()
    error = a @ y.error.t() + x.error @ (b + y.error).t()
    error = error + (SUM_ROUNDINGS + x.value.shape[1]) * (U * size + TINY)
    if dtype == torch.bfloat16:  # a CPU's instruction takes for 0 what is below the least normal
        least = torch.finfo(dtype).tiny
        lost = a.sum(1, keepdim=True) + b.sum(1) + x.value.shape[1]
        error = error + least * lost
    if dtype.itemsize == 2:
        about = torch.finfo(dtype)
        error = error + rounded * about.eps / 2 * (size + about.tiny)
    return Bounded(x.value @ y.value.t(), error)


class Distribution:
    """Of each token: the logits as they are stored, and with the target's in float32."""

    def __init__(self, p: dict):
        hidden, weight = exact(p["hidden"]), exact(p["weight"])
        self.dtype, self.ids = p["hidden"].dtype, p["ids"].long()[:, None]
        # A GPU's GEMM of 16 bits may add parts of the sum in 16 bits.
        self.gemm_roundings = 1.0 if hidden.value.is_cuda else 0.0
        logits = _product(hidden, weight, self.dtype, self.gemm_roundings)
        masked = torch.zeros_like(logits.value, dtype=torch.bool)
        stored = logits.within(self.dtype)
        if p.get("bias") is not None:
            bias = exact(p["bias"])
            masked = bias.value.isinf().expand_as(masked)
            bias = Bounded(bias.value.masked_fill(bias.value.isinf(), 0)).reshape(1, -1)
            logits, stored = logits + bias, (stored + bias).within(self.dtype)
        temperature = _number(p.get("temperature", 1.0), weight).reshape(1, 1)
        self.scale = Bounded(torch.ones_like(temperature.value)) / temperature
        self.tanh = None
        if p.get("softcap") is not None:
            self.cap = _number(p["softcap"], weight).reshape(1, 1)
            logits, self.tanh = self._capped(logits)
            stored, tanh = self._capped(stored)
            self.tanh = where(self.is_target(stored), self.tanh, tanh)
        target, stored = logits * self.scale, stored * self.scale
        self._lost(stored)
        self.logits = where(self.is_target(stored), target, stored)
        self.logits.value.masked_fill_(masked, -math.inf)
        self.logits.error.masked_fill_(masked, 0.0)
        self._normalize(target)

    def is_target(self, like: Bounded) -> Tensor:
        places = torch.arange(like.value.shape[1], device=self.ids.device)
        return places == self.ids

    def _capped(self, x: Bounded) -> tuple[Bounded, Bounded]:
        tanh = monotone(torch.tanh, x / self.cap)
        tanh = Bounded(tanh.value, tanh.error + 8 * U * tanh.value.abs())
        return tanh * self.cap, tanh

    def _lost(self, stored: Bounded) -> None:
        """How many times larger the rounded target may have made the sum before it was replaced."""
        self.times = stored.error.gather(1, self.ids).exp() if self.dtype.itemsize == 2 else 1.0

    def _normalize(self, target: Bounded) -> None:
        z, error = self.logits.value, self.logits.error
        lse = torch.logsumexp(z, 1, keepdim=True)
        largest = z.max(1, keepdim=True).values if z.numel() else lse
        below = torch.where(z.isinf(), 0.0, z - largest)
        p = torch.softmax(z, 1)
        of_sum = U * (SUM_ROUNDINGS + 8) * self.times
        of_sum = of_sum + U * (p * below.abs()).sum(1, keepdim=True)
        of_log = 4 * U * (lse - largest).abs()
        up = torch.logsumexp(z + error, 1, keepdim=True) - lse
        lse_error = up + of_log + torch.where(of_sum < 0.5, -torch.log1p(-of_sum), torch.inf)
        u = below - (lse - largest)
        u_error = error + lse_error + 2 * U * (below.abs() + (lse - largest).abs())
        p_error = torch.minimum(p * torch.expm1(u_error), torch.ones_like(p)) + LEAST_EXP
        self.u, self.p = Bounded(u, u_error), Bounded(p, p_error + 4 * U * p)
        self.u.value.masked_fill_(z.isinf(), 0.0)  # what has no probability
        at = lambda x: x.gather(1, self.ids)[:, 0]  # noqa: E731
        lp_error = at(target.error) + lse_error[:, 0] + 3 * U * (at(below).abs() + of_log[:, 0] / U)
        self.log_prob = Bounded(at(target.value) - lse[:, 0], lp_error)
        entropy = -(self.p * self.u).sum(1)
        slack = SUM_ROUNDINGS * U * ((p * below.abs()).sum(1) + (lse - largest)[:, 0].abs())
        self.entropy = Bounded(entropy.value, entropy.error + slack * 2)

    def slopes(self, slope: Bounded, entropy_slope: Bounded, entropy: Bounded) -> Bounded:
        """Of the logits before softcap and temperature, of slope lp - entropy_slope entropy."""
        tall = lambda x: x.reshape(-1, 1)  # noqa: E731
        dz = self.p * (tall(entropy_slope) * (self.u + tall(entropy)) - tall(slope))
        zero = torch.zeros_like(dz.value)
        dz = dz + where(self.is_target(dz), tall(slope) + Bounded(zero), Bounded(zero))
        dz = dz * self.scale
        if self.tanh is not None:
            dz = dz * (Bounded(zero + 1) - self.tanh * self.tanh)
        return dz


# ---- gradients ----


def _gradients(p: dict, got: dict, dz: Bounded, unit: float, grad: Bounded) -> dict:
    """Of what learns: through 16 bits where the logits are, in `unit`, then times `grad`."""
    dtype = p["hidden"].dtype
    narrow = lambda x: (x * (1 / unit)).within(dtype) * unit  # noqa: E731
    dz = narrow(dz)
    on_gpu = 1.0 if dz.value.is_cuda else 0.0
    t = lambda x: Bounded(x.value.t(), x.error.t())  # noqa: E731
    made = {
        "hidden": lambda: narrow(_product(dz, t(exact(p["weight"])), dtype, on_gpu)),
        # Of each chunk rounded, and added in float32.
        "weight": lambda: _product(t(dz), t(exact(p["hidden"])), dtype, 1 + on_gpu),
        "bias": lambda: t(dz).sum(1),
    }
    found = {}
    for name in INPUTS:
        key = f"gradient of {name}"
        if key in got:
            x = made[name]()
            if dtype == torch.float16:
                x = narrow(x)
            found[key] = (x * grad).within(dtype)
    return found


@contextmanager
def _gemms(kind: str | None):
    kept = chunks.gemm_dtype
    if kind == "16 bits":
        chunks.gemm_dtype = lambda device, dtype: dtype
    try:
        yield
    finally:
        chunks.gemm_dtype = kept


class TokenOp(Op):
    follows_results = True
    any_threads = False

    def _learned(self, p: dict, run) -> dict[str, Tensor]:
        """The results of `run`, and the gradients of the first one."""
        tensors = {n: p[n] for n in INPUTS if isinstance(p.get(n), Tensor)}
        leaves = {
            n: x.detach().requires_grad_(x.requires_grad and x.is_floating_point())
            for n, x in tensors.items()
        }
        given = {n: v for n, v in p.items() if n not in (WEIGHTS, GEMMS)} | leaves
        learned = {n: x for n, x in leaves.items() if x.requires_grad}
        with _gemms(p.get(GEMMS)):
            results = run(given)
            first = next(iter(results.values()))
            if learned:
                grads = torch.autograd.grad(first, [*learned.values()], p[WEIGHTS].to(first.dtype))
                results |= {f"gradient of {n}": g for n, g in zip(learned, grads, strict=True)}
        return {n: x.detach() for n, x in results.items()}


class LinearLogProb(TokenOp):
    name = "linear_log_prob"

    def arguments(self, draw: Draw) -> dict:
        p = _problem(draw)
        return p | {WEIGHTS: draw.per_sample(len(p["ids"]))}

    def call(self, p: dict) -> dict:
        return self._learned(p, lambda a: {"log_prob": fk.linear_log_prob(**a)})

    def bounds(self, p: dict, got: dict) -> dict[str, Bounded]:
        of = Distribution(p)
        slope = exact(p[WEIGHTS].to(got["log_prob"].dtype))
        zero = Bounded(torch.zeros_like(slope.value))
        dz = of.slopes(slope, zero, zero)
        one = Bounded(torch.ones((), dtype=torch.float64, device=dz.value.device))
        return {"log_prob": of.log_prob} | _gradients(p, got, dz, 1.0, one)


class Terms(NamedTuple):
    """What a token adds to the loss, its slopes, and its statistics."""

    loss: Bounded
    slope: Bounded
    entropy_slope: Bounded
    said: dict[str, Bounded]


class LinearPolicyLoss(TokenOp):
    name = "linear_policy_loss"

    def arguments(self, draw: Draw) -> dict:
        p = _problem(draw)
        return (
            p | _objective(draw, p) | {WEIGHTS: torch.randn((), generator=draw.g).to(draw.device)}
        )

    def call(self, p: dict) -> dict:
        return self._learned(p, lambda a: fk.linear_policy_loss(**a)._asdict())

    def bounds(self, p: dict, got: dict) -> dict[str, Bounded]:
        weight = p["token_weight"].to(got["loss"].dtype)
        is_in = weight != 0
        part = p | {n: p[n][is_in] for n in ("hidden", "ids")}
        of = Distribution(part)
        entropy = exact(got["entropy"])[is_in]
        terms = self._terms(p, got, is_in, entropy)
        unit = 1.0
        if p["hidden"].dtype == torch.float16 and bool(is_in.any()):
            unit = 2.0 ** (math.ceil(math.log2(float(weight.abs().max()))) - 6)
        dz = of.slopes(terms.slope, terms.entropy_slope, entropy)
        grad = exact(p[WEIGHTS].to(got["loss"].dtype))
        found = _gradients(part, got, dz, unit, grad)
        said = terms.said | {"log_prob": of.log_prob, "entropy": of.entropy}
        if "gradient of hidden" in found:
            said["gradient of hidden"] = found.pop("gradient of hidden")
        return found | {"loss": terms.loss.sum()} | {n: _spread(x, is_in) for n, x in said.items()}

    def _terms(self, p: dict, got: dict, is_in: Tensor, entropy: Bounded) -> Terms:
        dtype = got["loss"].dtype
        of = lambda n: None if p.get(n) is None else exact(p[n].to(dtype)[is_in])  # noqa: E731
        lp, a, w = exact(got["log_prob"])[is_in], of("advantage"), of("token_weight")
        old, ref, sample = of("old_log_prob") or lp, of("ref_log_prob"), of("sample_log_prob")
        policy, slope, said = _policy(p, a, lp - old)
        if sample is not None:
            cap = float(p["is_cap"])
            tis = monotone(lambda x: x.exp().clamp(max=cap), old - sample)
            policy, slope = policy * tis, slope * tis
        said["kl"] = Bounded(torch.zeros_like(lp.value))
        if ref is not None:
            drift = ref - lp
            grown = monotone(torch.expm1, drift)
            said["kl"] = grown - drift
            # The slope also as 1 - exp(drift), which loses what is small.
            grown = Bounded(grown.value, grown.error + 4 * U * (1 + grown.value.abs()))
            coefficient = _number(p["kl_coef"], w)
            policy, slope = policy + coefficient * said["kl"], slope - coefficient * grown
        of_entropy = _number(p.get("entropy_coef", 0.0), w) * Bounded(torch.ones_like(w.value))
        loss = w * (policy - of_entropy * entropy)
        return Terms(loss, w * slope, w * of_entropy, said)


def _policy(p: dict, a: Bounded, full: Bounded) -> tuple[Bounded, Bounded, dict[str, Bounded]]:
    """The clipped term, its slope, and what is said of it. Where it is open on which side of a
    bound a ratio lies, the slope is its own or 0.
    """
    low = math.log1p(-p["clip_low"]) if p["clip_low"] < 1 else -math.inf
    high, dual = math.log1p(p["clip_high"]), math.log(p.get("dual_clip") or math.inf)
    log_ratio = monotone(lambda x: x.clamp(-20, 20), full)
    log_ratio = Bounded(log_ratio.value, full.error)  # a clamp rounds nothing
    down, up = a.value < 0, a.value > 0

    def kept(x: Tensor) -> Tensor:
        x = torch.where(up, x.clamp(max=high), x)
        return torch.where(down, x.clamp(min=low).clamp(max=dual), x)

    loss = -a * Ratio._exp(monotone(kept, log_ratio))
    slope = -a * Ratio._exp(log_ratio)
    outside = lambda bound, side: side & (log_ratio.value > bound)  # noqa: E731
    is_clipped = outside(high, up) | outside(dual, down) | (down & (log_ratio.value < low))
    unsure = torch.zeros_like(is_clipped)
    for bound, side in ((high, up), (dual, down), (low, down), (20, True), (-20, True)):
        gap = (full.value - bound).abs()
        tie = (gap <= full.error + U * full.value.abs()) & (full.error > 0)
        unsure |= tie & side & math.isfinite(bound)
    is_off = is_clipped | (full.value.abs() > 20)
    size = slope.value.abs() + slope.error
    slope = Bounded(
        torch.where(is_off, 0.0, slope.value),
        torch.where(unsure, size, torch.where(is_off, 0.0, slope.error)),
    )
    flag = Bounded(is_clipped, torch.where(unsure, 1.0, 0.0).double())
    return loss, slope, {"ratio": monotone(torch.exp, log_ratio), "clipped": flag}


def _spread(x: Bounded, is_in: Tensor) -> Bounded:
    """Of tokens without weight 0, exactly."""
    whole = [y.new_zeros(len(is_in), *y.shape[1:]) for y in (x.value, x.error)]
    for into, part in zip(whole, (x.value, x.error), strict=True):
        into[is_in] = part
    return Bounded(*whole)


TOKENS = (LinearLogProb(), LinearPolicyLoss())
