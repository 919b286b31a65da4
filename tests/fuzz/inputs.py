"""Random arguments for every op: shapes, strides, dtypes, magnitudes, edges, siblings, keys.

`Draw` takes its choices from a `random.Random`, so that a seed, or hypothesis, decides them.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter

import torch
from torch import Tensor

from flowkern.ops.matching_loss.inputs import WEIGHTINGS
from flowkern.schedules import (
    KINDS,
    Coefficients,
    edge_coefficients,
    multistep_coefficients,
    sd3_sigmas,
    shifted_sigmas,
    step_coefficients,
)

# Triton's interpreter cuts to bfloat16 where hardware rounds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16]))
LAYOUTS = (
    "contiguous", "transposed", "sliced", "gaps", "expanded", "repeated", "offset", "negated",
)  # fmt: skip
KINDS_OF_MATCHING = (
    *(f"{objective} {weighting}" for objective, all in WEIGHTINGS.items() for weighting in all),
    "ghuber_power", "nft_beta", "ref_coef of each", "ema_coef of each",
)  # fmt: skip
OUTPUTS = ("new", "out_dtype", "out", "neighbor", "overlapping", "in place")
# One element, vectors and their remainders, primes, the kernels' chunks and segments and beyond.
SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 64, 97, 127, 128, 129, 257, 509)
LARGE = (1021, 1023, 1024, 1025, 2047, 2049, 3072, 4099, 16_383, 16_384, 16_385, 20_011)
MAGNITUDES = (1e-30, 1e-20, 1e-8, 1e4, 1e10, 1e20, 1e30)
SPECIAL = (math.inf, -math.inf, -0.0, 1e-45, 3.4e38)
GUIDANCE = (0.0, 1.0, 4.5, 3.3, -1.5)
ELEMENTS = 40_000  # of a latent, at most


class Draw:
    def __init__(self, r: random.Random, device: str = "cpu"):
        self.r, self.device = r, torch.device(device)
        self.g = torch.Generator().manual_seed(r.getrandbits(60))
        self.is_wild = r.random() < 0.2  # magnitudes far from 1
        # NaN here and there, or infinity: not both, as infinities may cancel to NaN or not.
        self.odd = r.choice(((math.nan, -0.0), SPECIAL)) if r.random() < 0.1 else ()
        self.dtype = r.choice(DTYPES) if r.random() < 0.7 else None  # None: each tensor its own
        self.drawn = Counter()  # kinds of what was drawn
        self.is_refused = False  # the call is one to be refused, for what `out` overlaps

    def maybe(self, probability: float = 0.5) -> bool:
        return self.r.random() < probability

    # ---- tensors ----

    def size(self) -> int:
        if self.maybe(0.02):
            return 0
        return self.r.choice(LARGE if self.maybe(0.2) else SIZES)

    def dims(self, size: int) -> tuple[int, ...]:
        """One to five dimensions of `size` elements in all."""
        dims = []
        for _ in range(self.r.randint(0, 4)):
            factors = [f for f in (1, 2, 3, 4, 5, 7, 8) if size and size % f == 0] or [1]
            dims.append(self.r.choice(factors))
            size //= dims[-1]
        dims.append(size)
        self.r.shuffle(dims)
        return tuple(dims)

    def shape(self) -> tuple[int, ...]:
        size = self.size()
        most = max(1, min(8, ELEMENTS // max(1, size)))
        batch = 0 if self.maybe(0.03) else self.r.randint(1, most)
        return (batch, *self.dims(size))

    def values(self, shape, scale: float | None = None) -> Tensor:
        if scale is None:
            scale = self.r.choice(MAGNITUDES) if self.is_wild and self.maybe() else 1.0
        x = torch.randn(shape, generator=self.g) * scale
        if self.odd and x.numel() and self.maybe():
            flat = x.view(-1)
            for _ in range(self.r.randint(1, 3)):
                flat[self.r.randrange(flat.numel())] = self.r.choice(self.odd)
        return x

    def latent(self, shape, values: Tensor | None = None, dtype=None) -> Tensor:
        """`values` (or random ones) in some dtype and some layout."""
        values = self.values(shape) if values is None else values
        dtype = dtype or self.dtype or self.r.choice(DTYPES)
        return self.laid_out(values.to(self.device, dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        layout = self.r.choice(LAYOUTS) if self.maybe() else "contiguous"
        self.drawn[f"layout {layout}"] += 1
        if layout == "transposed":
            i, j = self.r.randrange(x.ndim), self.r.randrange(x.ndim)
            return x.transpose(i, j).contiguous().transpose(i, j)
        if layout == "sliced":  # two elements apart
            return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]
        if layout == "gaps":  # samples apart, each contiguous
            return torch.stack([x, torch.full_like(x, 7)], dim=1)[:, 0]
        if layout == "expanded" and len(x):
            return x[:1].expand(x.shape)
        if layout == "repeated" and x.numel():  # one element again and again, or one channel
            return (x[:, :1] if self.maybe() else x.reshape(-1)[:1]).expand(x.shape)
        if layout == "negated":  # memory holds the values with the other sign
            return torch._neg_view(-x)
        if layout == "offset":  # off the alignment of a vector
            shift = self.r.randint(1, 3)
            memory = torch.full((x.numel() + shift,), 7, dtype=x.dtype, device=self.device)
            memory[shift:] = x.reshape(-1)
            return memory[shift:].view(x.shape)
        return x

    def per_sample(self, batch: int, values: Tensor | None = None) -> Tensor:
        x = torch.randn(batch, generator=self.g) if values is None else values.float()
        if self.maybe(0.1):
            x[torch.rand(batch, generator=self.g) < 0.5] = 0
        x = x.to(self.device)
        if self.maybe(0.2):
            return torch.stack([x, x + 1], dim=1)[:, 0]  # strided
        return x.double() if self.maybe(0.1) else x

    def sigma(self, batch: int) -> Tensor:
        x = torch.rand(batch, generator=self.g)
        if self.maybe(0.3):
            x[torch.rand(batch, generator=self.g) < 0.5] = self.r.choice((0.0, 1.0, 1e-6))
        return x.to(self.device)

    def row(self, batch: int, rows: int) -> Tensor:
        """The velocity row of each sample, in any order; some rows may have none."""
        index = torch.randint(0, rows, (batch,), generator=self.g)
        index = index.sort().values if self.maybe() else index
        index = index.to(self.device, self.r.choice((torch.int64, torch.int32)))
        return torch.stack([index, index * 0], 1)[:, 0] if self.maybe(0.3) else index

    # ---- scalars, keys, coefficients ----

    def key(self, batch: int) -> dict:
        ids = torch.randint(-(2**62), 2**62, (batch,), generator=self.g)
        ids = ids if self.maybe() else torch.arange(batch)
        steps = torch.randint(0, 2**28, (batch,), generator=self.g)
        step = steps.to(self.device) if self.maybe() else self.r.choice((0, 1, 7, 2**28 - 1))
        seed = self.r.choice((0, 1, -1, 2**64 - 1, self.r.getrandbits(64)))
        return {"seed": seed, "sample_id": ids.to(self.device), "step": step}

    def noise(self, shape) -> dict:
        return self.key(shape[0]) if self.maybe() else {"noise": self.latent(shape)}

    def edges(self, batch: int, history: bool = False) -> tuple[Coefficients, int]:
        """One edge, or a row per sample, of any kind; and the history it weighs."""
        steps = self.r.choice((1, 2, 10))
        grid = sd3_sigmas(steps) if self.maybe() else shifted_sigmas(steps, 3.0)
        kind, count = self.r.choice(KINDS), 0
        level = self.r.choice((0.0, 0.3, 0.7, 1.0))
        if history and self.maybe(0.3):
            order = self.r.randint(1, 3)
            is_sde = order < 3 and self.maybe()
            path = sorted(self.r.sample(range(1, 100), order + 1), reverse=True)
            path = [percent / 100 for percent in path]
            edges = multistep_coefficients(path, order, sde=is_sde)
            count = edges.num_history
        elif self.maybe(0.3):
            low, high = self.r.randrange(50) / 100, self.r.randint(50, 100) / 100
            edges = edge_coefficients(high, low, kind, level)
        else:  # the first edge starts at sigma = 1, the last one ends at 0
            edges = step_coefficients(grid, kind, level)
            which = self.r.choice((0, -1, self.r.randrange(len(edges))))
            index = torch.randint(0, len(edges), (batch,), generator=self.g)
            edges = edges[which] if self.maybe(0.3) else edges[index]
        dtype = torch.float32 if self.maybe() else edges.table.dtype
        return edges.to(self.device, dtype), count

    # ---- calls ----

    def guidance(self, velocity: Tensor) -> dict:
        if self.maybe(0.6):
            return {}
        uncond = self.latent(velocity.shape)
        return {"velocity_uncond": uncond, "guidance_scale": self.r.choice(GUIDANCE)}

    def step(self, history: bool = True) -> dict:
        shape = self.shape()
        edges, count = self.edges(shape[0], history)
        p = {"x_t": self.latent(shape), "velocity": self.latent(shape), "c_rows": edges}
        count = self.r.randint(count, 3) if history and self.maybe(0.2) else count
        if history:
            p["history"] = [self.latent(shape) for _ in range(count)]
        return p | self.guidance(p["velocity"])

    def output(self, p: dict) -> dict:
        """Where the result goes: a new tensor, one of some dtype, the caller's, the input's."""
        x, kind, dtype = p["x_t"], self.r.choice((*OUTPUTS, "in place")), self.r.choice(DTYPES)
        names = [n for n in ("x_t", "velocity", "noise") if isinstance(p.get(n), Tensor)]
        name = self.r.choice(names)
        if kind == "overlapping" and not (x.numel() and self.overlap(p)):
            kind = "new"
        self.drawn[f"output {kind}" + (f", {name}" if kind == "in place" else "")] += 1
        if kind == "overlapping":
            return {}
        if kind == "out_dtype":
            return {"out_dtype": dtype}
        if kind == "out":
            return {"out": torch.full(x.shape, math.nan, dtype=dtype, device=self.device)}
        if kind == "neighbor":
            both = torch.full((2, *x.shape), math.nan, dtype=x.dtype, device=self.device)
            p["x_t"] = both[0].copy_(x)
            return {"out": both[1]}
        if kind == "in place":
            p[name] = torch.empty(x.shape, dtype=p[name].dtype, device=self.device).copy_(p[name])
            return {"out": p[name]}
        return {}

    def rounding(self, p: dict) -> dict:
        """Now and then a dtype that x_next is rounded through: one of those that its own holds."""
        if self.maybe(0.7):
            return {}
        out = p.get("out")
        stored = p.get("out_dtype") or (p["x_t"] if out is None else out).dtype
        dtype = self.r.choice(DTYPES if stored == torch.float32 else (stored,))
        self.drawn["rounded" if dtype != stored else "rounded to what it is stored in"] += 1
        return {"round_dtype": dtype}

    def overlap(self, p: dict) -> bool:
        """Makes `out` memory that something the call reads lies in, where it may not."""
        x = p["x_t"]
        ways = ["shifted", "expanded", "velocity_uncond", "history", "sample_id", "step", "edges"]
        way = self.r.choice(ways)
        memory = torch.zeros(2 * x.numel() + 64, dtype=torch.float32, device=self.device)
        begin = 18  # of `out`: past what is read from before it
        out = memory[begin : begin + x.numel()].view(x.shape)
        if way == "shifted":
            which = self.r.choice([n for n in ("x_t", "velocity", "noise") if n in p])
            p[which] = memory[begin + 1 : begin + 1 + x.numel()].view(x.shape)
            if x.numel() == 1:
                return False
        elif way == "expanded" and x.numel() > 1:
            p["velocity"] = out.view(-1)[:1].expand(x.shape)
        elif way == "velocity_uncond" and way in p:
            p[way] = out
        elif way == "history" and p.get("history"):
            p[way] = [*p[way][1:], out]
        elif way in ("sample_id", "step") and isinstance(p.get(way), Tensor):
            ids = memory[: 2 * (begin // 2 + len(x))].view(torch.int64)
            p[way] = ids[begin // 2 :]
        elif way == "edges":
            name = "c_rows" if "c_rows" in p else "m_rows"
            history = p[name].num_history
            p[name] = Coefficients(memory[begin - 4 : begin + 5], history)
        else:
            return False
        p["out"], self.is_refused = out, True
        return True

    def near(self, x: Tensor, velocity: Tensor) -> Tensor:
        """A state that a step from `x` may reach."""
        values = x.float().cpu() + 0.2 * torch.randn(x.shape, generator=self.g)
        return self.latent(x.shape, values)

    def rows_and_samples(self) -> tuple[tuple[int, ...], int, dict]:
        """The shape of the velocities, the number of samples, and their rows."""
        shape = self.shape()
        if self.maybe(0.4) or not shape[0]:
            return shape, shape[0], {}
        size = max(1, math.prod(shape[1:]))
        batch = min(self.r.choice((1, 2, 5, 16, 64)), max(1, ELEMENTS // size))
        return shape, batch, {"row": self.row(batch, shape[0])}

    def policy(self) -> dict:
        shape, batch, row = self.rows_and_samples()
        edges, _ = self.edges(batch)
        drift = self.r.choice((0.0, 1e-6, 1e-3, 0.1))
        old, x = self.values(shape), self.values(shape)
        p = {
            "velocity": self.latent(shape, old + drift * torch.randn(shape, generator=self.g)),
            "x_t": self.latent(shape, x),
            "c_rows": edges,
            "advantage": self.per_sample(batch),
            "ratio": self.r.choice(("sde", "guard")),
        } | row
        index = row["row"].long().cpu() if row else torch.arange(batch)
        a, b, std = (
            getattr(edges, n).float().cpu().reshape(-1, *[1] * (x.ndim - 1))
            for n in ("a", "b", "std")
        )
        noise = torch.randn(x[index].shape, generator=self.g)
        x_next = a * x[index] + b * old[index] + std * noise
        p["x_next"] = self.latent(x_next.shape, x_next)
        mode = self.r.choice(("old", "old", "drawn", "recorded", "on policy"))
        if mode in ("old", "drawn"):
            p["old_velocity"] = self.latent(shape, old)
        if mode == "drawn":
            p["x_t"] = self.latent(shape, x, torch.float32)
            p |= {"x_next": None} | self.noise(x_next.shape)
        if mode == "recorded":
            p["ratio"] = "sde"
            p["old_log_prob"] = self.per_sample(batch)
        if self.maybe(0.3):
            p["velocity_ref"] = self.latent(shape)
        coefficient = self.per_sample(batch).abs() if self.maybe() else self.r.choice((0.0, 0.04))
        p["kl_coef"] = coefficient if "velocity_ref" in p else 0.0
        if self.maybe(0.3):
            p["step_weight"] = self.per_sample(batch)
        clips = {n: self.r.choice((0.0, 2e-6, 1e-4, 0.2)) for n in ("clip_low", "clip_high")}
        return p | self.guidance(p["velocity"]) | clips | self.reduction(batch)

    def matching(self) -> dict:
        shape, batch, row = self.rows_and_samples()
        drift = self.r.choice((0.0, 1e-6, 1e-3, 0.1))
        velocity = self.values(shape)
        near = lambda: velocity + drift * torch.randn(shape, generator=self.g)  # noqa: E731
        x0 = self.latent((batch, *shape[1:]))
        p = {
            "velocity": self.latent(shape, velocity),
            "x0": x0,
            "sigma": self.sigma(batch),
            "advantage": self.per_sample(batch),
            "ref_coef": 0.0,
            "ema_coef": 0.0,
        } | row
        p |= self.matched()
        if self.maybe(0.6):
            p["old_velocity"] = self.latent(shape, near())
        for anchor in ("ref", "ema"):
            if self.maybe(0.3):
                p[f"velocity_{anchor}"] = self.latent(shape, near())
                p[f"{anchor}_coef"] = self.r.choice((0.0, 0.1, 1.0))
                if self.maybe(0.3):
                    p[f"{anchor}_coef"] = self.per_sample(batch).abs()
                    self.drawn[f"{anchor}_coef of each"] += 1
        clips = {n: self.r.choice((0.0, 1e-4, 0.2, 1.0)) for n in ("clip_low", "clip_high")}
        return p | self.noise(x0.shape) | clips | self.reduction(batch)

    def matched(self) -> dict:
        """How a velocity is matched."""
        how = {"objective": self.r.choice(("awm", "nft"))}
        how["weighting"] = self.r.choice(WEIGHTINGS[how["objective"]])
        if how["weighting"] == "ghuber":
            how["ghuber_power"] = self.r.choice((0.25, 0.25, 0.05, 0.6, 1.0))
        if how["objective"] == "nft":
            how["nft_beta"] = self.r.choice((1.0, 1.0, 0.1, 0.5, 1.5))
        self.drawn[f"{how['objective']} {how['weighting']}"] += 1
        self.drawn["ghuber_power"] += how.get("ghuber_power", 0.25) != 0.25
        self.drawn["nft_beta"] += how.get("nft_beta", 1.0) != 1
        return how

    def reduction(self, batch: int) -> dict:
        reduction = self.r.choice(("mean", "sum", "none"))
        weight = torch.randn(batch if reduction == "none" else (), generator=self.g)
        weight = weight.to(self.device)
        if reduction == "none" and batch and self.maybe(0.3):
            weight = weight[:1].expand(batch)  # the gradient of a sum
        return {"reduction": reduction, "loss_weights": weight}
