"""The steps and the noise as the fuzzer sees them: random arguments, and what float32 arithmetic
may make of them (the losses: losses.py).

An op has three parts: `arguments(draw)` makes the keywords of a call, `call` runs it, forward and
backward, and names its results, `bounds` says in terms of `Bounded` what the results may be. The
formulas are written here once more, gradients by hand, so that no reference is trusted.
"""

from __future__ import annotations

import math

import torch

import flowkern as fk
from flowkern.schedules import COLUMNS

from .bounds import Bounded, monotone, unless_zero, where
from .inputs import GUIDANCE, Draw

# The gradients that come in, not arguments of the verb: of the first result, and of the mean.
WEIGHTS, MEAN_WEIGHTS = "loss_weights", "mean_weights"


def exact(x) -> Bounded | None:
    return None if x is None else Bounded(x.detach().double())


class Edges:
    """The columns of a call's coefficients, (B or 1,), and their shape over a latent."""

    def __init__(self, coefficients, latent: torch.Tensor):
        table = coefficients.table.float().double()
        table = table[None] if table.ndim == 1 else table
        self.like = latent.ndim - 1
        for i, name in enumerate(COLUMNS):
            setattr(self, name, Bounded(table[:, i]))

    def wide(self, x: Bounded) -> Bounded:
        return x.reshape(-1, *[1] * self.like)

    def mean(self, x: Bounded, v: Bounded) -> Bounded:
        return self.wide(self.a) * x + self.wide(self.b) * v

    def drawn(self, mean: Bounded, noise: Bounded) -> Bounded:
        std = self.wide(self.std)
        return where(std.value != 0, mean + std * noise, mean)


def guided(p) -> Bounded:
    v, u = exact(p["velocity"]), exact(p.get("velocity_uncond"))
    return v if u is None else u + float32(p["guidance_scale"]) * (v - u)


def _with_output(draw: Draw, p: dict) -> dict:
    """The output first: it may replace an input, and a union evaluated before kept the old one."""
    output = draw.output(p)
    return p | output


def scale_of(p) -> float:
    return float32(p["guidance_scale"]) if p.get("velocity_uncond") is not None else 1.0


def float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def noise_of(p, shape, stream: str) -> Bounded:
    if p.get("noise") is not None:
        return exact(p["noise"])
    step = p.get("step", 0)
    device = p["sample_id"].device
    return exact(
        fk.philox_normal(shape, p["seed"], p["sample_id"], step, stream, device, "reference")
    )


def with_gradient(p, run) -> dict[str, torch.Tensor]:
    """The results of `run`, and the gradient of its first one, of its mean, or of both in the
    velocity.
    """
    velocity = p["velocity"]
    if isinstance(velocity, torch.Tensor):  # else it is wrong on purpose
        velocity = velocity.detach()
        velocity.requires_grad_(velocity.is_floating_point())
    results = run(arguments_of(p) | {"velocity": velocity})
    given = [(next(iter(results.values())), WEIGHTS), (results.get("mean"), MEAN_WEIGHTS)]
    given = [(x, p[name].to(x.dtype)) for x, name in given if name in p]
    of, weights = zip(*given, strict=True)
    (gradient,) = torch.autograd.grad(of, velocity, weights)
    return {n: x.detach() for n, x in results.items()} | {"gradient": gradient}


def arguments_of(p) -> dict:
    return {n: v for n, v in p.items() if n not in (WEIGHTS, MEAN_WEIGHTS)}


def with_mean(draw: Draw, p: dict, may_be_still: bool) -> dict:
    """Now and then the mean, and which of the gradients come in: of log_prob, of the mean, of both;
    none, where that may be.
    """
    of_log_prob = {WEIGHTS: draw.per_sample(len(p["x_t"]))}
    if draw.maybe():
        return p if may_be_still else p | of_log_prob
    draw.drawn["mean"] += 1
    p |= {"return_mean": True}
    way = draw.r.choice(("log_prob", "mean", "both", *["nothing"] * may_be_still))
    draw.drawn[f"gradient of {way}, with a mean"] += 1
    shape = p["x_t"].shape
    of_mean = draw.laid_out(draw.values(shape).to(draw.device)) if way in ("mean", "both") else None
    p |= of_log_prob if way in ("log_prob", "both") else {}
    return p if of_mean is None else p | {MEAN_WEIGHTS: of_mean}


def gradient_of_both(edges: Edges, p, mean: Bounded, x_next: torch.Tensor) -> Bounded:
    """By hand, of those weights that there are."""
    size, parts = max(1, math.prod(p["x_t"].shape[1:])), []
    if WEIGHTS in p:
        slope = exact(p[WEIGHTS]) * (2 * scale_of(p) / size) * edges.k * edges.b
        parts.append(unless_zero(edges.wide(slope), exact(x_next) - mean))
    if MEAN_WEIGHTS in p:
        parts.append(edges.wide(edges.b * scale_of(p)) * exact(p[MEAN_WEIGHTS]))
    gradient = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return gradient.within(p["velocity"].dtype)


def with_own_output(p) -> dict:
    """Where an input is also the output, a copy of it: what is compared later must stay."""
    for name in ("x_t", "velocity", "noise"):
        if p.get("out") is not None and p["out"] is p.get(name):
            x = p[name].clone()
            return p | {name: x, "out": x}
    return p


class Op:
    name: str
    exact_names: tuple[str, ...] = ()  # results that have the bits of the float32 reference
    follows_results = False  # bounds rest on what came: those of the reference are its own
    any_threads = True  # the same bits on any number of them, with any instruction set

    def in_float64(self, p, got) -> dict:
        """The results of the reference for `p`, the call in float64."""
        return self.call(p)


# ---- the step ----


class SdeStep(Op):
    name, exact_names = "sde_step", ("x_next", "mean")

    def arguments(self, draw: Draw) -> dict:
        p = draw.step()
        p |= draw.noise(p["x_t"].shape)
        p = with_mean(draw, _with_output(draw, p), may_be_still=True)
        return p | draw.rounding(p)

    def call(self, p) -> dict:
        p = with_own_output(p)
        if WEIGHTS in p or MEAN_WEIGHTS in p:
            return with_gradient(p, self._results)
        return self._results(p)

    def _results(self, p) -> dict:
        x_next, log_prob, *mean = fk.sde_step(**p)
        results = {"log_prob": log_prob, "x_next": x_next.clone()}
        return results | ({"mean": mean[0]} if mean else {})

    def in_float64(self, p, got) -> dict:
        drawn = self._results(arguments_of(p) | {"round_dtype": None})
        results = {n: x for n, x in drawn.items() if n != "log_prob"}
        if not p["history"]:  # a replay has none
            keys = ("x_t", "velocity", "c_rows", "velocity_uncond", "guidance_scale", "backend")
            keys += ("return_mean", WEIGHTS, MEAN_WEIGHTS)
            replay = {n: p[n] for n in keys if n in p} | {"x_next": got["x_next"].double()}
            results |= SdeLogProb().call(replay)
        return results

    def bounds(self, p, got) -> dict[str, Bounded]:
        edges = Edges(p["c_rows"], p["x_t"])
        mean = mean_with_history(edges, p, guided(p))
        x_next = edges.drawn(mean, noise_of(p, p["x_t"].shape, "step"))
        residual = exact(got["x_next"]) - mean  # the log-probability is of what was stored
        log_prob = edges.c - edges.k * (residual * residual).mean()
        stored = p.get("round_dtype") or got["x_next"].dtype
        bounds = {"x_next": x_next.within(stored), "log_prob": log_prob, "mean": mean}
        if "gradient" in got:
            bounds["gradient"] = gradient_of_both(edges, p, mean, got["x_next"])
        return {n: bound for n, bound in bounds.items() if n in got}


def mean_with_history(edges: Edges, p, v: Bounded) -> Bounded:
    mean = edges.mean(exact(p["x_t"]), v)
    for j, earlier in enumerate(p.get("history", ())):
        mean = mean + edges.wide(getattr(edges, f"h{j + 1}")) * exact(earlier)
    return mean


class OdeStep(Op):
    name, exact_names = "ode_step", ("x_next", "x0")

    def arguments(self, draw: Draw) -> dict:
        p = draw.step()
        p["m_rows"] = p.pop("c_rows")
        return _with_output(draw, p) | {"return_x0": True}

    def call(self, p) -> dict:
        x_next, x0 = fk.ode_step(**with_own_output(p))
        return {"x_next": x_next.clone(), "x0": x0}

    def bounds(self, p, got) -> dict[str, Bounded]:
        edges, v = Edges(p["m_rows"], p["x_t"]), guided(p)
        x_next, x0 = mean_with_history(edges, p, v), exact(p["x_t"]) - edges.wide(edges.sigma) * v
        return {n: x.within(got[n].dtype) for n, x in (("x_next", x_next), ("x0", x0))}


class SdeLogProb(Op):
    name = "sde_log_prob"

    def arguments(self, draw: Draw) -> dict:
        p = draw.step(history=False)
        p["x_next"] = draw.near(p["x_t"], p["velocity"])
        return with_mean(draw, p, may_be_still=False)

    def call(self, p) -> dict:
        if WEIGHTS in p or MEAN_WEIGHTS in p:
            return with_gradient(p, self._results)
        return self._results(p)

    def _results(self, p) -> dict:
        results = fk.sde_log_prob(**p)
        names = ("log_prob", "mean") if p.get("return_mean") else ("log_prob",)
        return dict(zip(names, results if len(names) > 1 else [results], strict=True))

    def bounds(self, p, got) -> dict[str, Bounded]:
        edges = Edges(p["c_rows"], p["x_t"])
        mean = edges.mean(exact(p["x_t"]), guided(p))
        residual = exact(p["x_next"]) - mean
        log_prob = edges.c - edges.k * (residual * residual).mean()
        log_prob = log_prob + exact(torch.zeros(len(p["x_t"]), device=p["x_t"].device))  # (B,)
        bounds = {"log_prob": log_prob, "mean": mean}
        bounds["gradient"] = gradient_of_both(edges, p, mean, p["x_next"])
        return {n: bound for n, bound in bounds.items() if n in got}


# ---- guidance that keeps the length of tokens ----


class RescaledGuidance(Op):
    name = "rescaled_guidance"

    def arguments(self, draw: Draw) -> dict:
        shape = draw.shape()
        sizes = (1, 1, *shape[2:])[-2:]
        patch = [draw.r.choice([n for n in (1, 2, 3, 7, s) if n and s % n == 0]) for s in sizes]
        return {
            "velocity": draw.latent(shape),
            "velocity_uncond": draw.latent(shape),
            "guidance_scale": draw.r.choice(GUIDANCE),
            "patch": tuple(patch),
            WEIGHTS: draw.values(shape, 1.0).to(draw.device),
        }

    def call(self, p) -> dict:
        return with_gradient(p, lambda a: {"guided": fk.rescaled_guidance(**a)})

    def bounds(self, p, got) -> dict[str, Bounded]:
        shape, (high, wide) = p["velocity"].shape, p["patch"]
        batch, channels, *between = shape
        width = between.pop() if between else 1
        rows = math.prod(between)
        parts = (batch, channels, rows // high, high, width // wide, wide)
        order = (0, 2, 4, 1, 3, 5)
        back = tuple(order.index(i) for i in range(6))

        def tokens(x: Bounded) -> Bounded:
            return x.reshape(*parts).permute(*order)

        def latent(x: Bounded) -> Bounded:
            return x.permute(*back).reshape(*shape)

        def total(x: Bounded) -> Bounded:
            flat = x.reshape(*x.value.shape[:3], channels * high * wide).sum(-1)
            return flat.reshape(*flat.value.shape, 1, 1, 1)

        v, g = tokens(exact(p["velocity"])), tokens(guided(p))
        grad = tokens(exact(p[WEIGHTS]))
        of_velocity, of_guided = total(v * v), total(g * g)
        ratio = monotone(lambda x, y: (x / y).sqrt(), of_velocity, of_guided)
        along = total(g * grad) / of_guided
        in_guided = ratio * (grad - along * g)
        in_length = where(of_velocity.value > 0, along / ratio, 0.0 * along)
        gradient = scale_of(p) * in_guided + in_length * v
        gradient = latent(gradient).within(p["velocity"].dtype)
        return {"guided": latent(g * ratio), "gradient": gradient}


class PhiloxNormal(Op):
    name, exact_names = "philox_normal", ("normals",)

    def arguments(self, draw: Draw) -> dict:
        shape = draw.shape()
        stream = draw.r.choice(("init", "step", "match"))
        return {"shape": shape, "stream": stream} | draw.key(shape[0])

    def call(self, p) -> dict:
        return {"normals": fk.philox_normal(**p)}

    def bounds(self, p, got) -> dict[str, Bounded]:
        return {}


class AddNoise(Op):
    name, exact_names = "add_noise", ("x_t",)

    def arguments(self, draw: Draw) -> dict:
        x0 = draw.latent(draw.shape())
        return {"x0": x0, "sigma": draw.sigma(len(x0))} | draw.noise(x0.shape)

    def call(self, p) -> dict:
        return {"x_t": fk.add_noise(**p)}

    def bounds(self, p, got) -> dict[str, Bounded]:
        sigma = exact(p["sigma"].float()).reshape(-1, *[1] * (p["x0"].ndim - 1))
        noise = noise_of(p, p["x0"].shape, "match")
        x_t = (-sigma + exact(torch.ones_like(p["sigma"])).reshape(*sigma.value.shape)) * exact(
            p["x0"]
        ) + sigma * noise
        return {"x_t": x_t.within(got["x_t"].dtype)}


STEPS = (SdeStep(), OdeStep(), SdeLogProb(), RescaledGuidance(), AddNoise(), PhiloxNormal())
