"""One random call, held to what float32 arithmetic may make of its formula, and one that has an
argument wrong.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import re

import torch

import flowkern as fk
from flowkern.ops._common import native

from .inputs import Draw
from .losses import LOSSES
from .steps import MEAN_WEIGHTS, STEPS, WEIGHTS, float32
from .tokens import TOKENS

OPS = (*STEPS, *LOSSES, *TOKENS)
NOT_GIVEN = {WEIGHTS, MEAN_WEIGHTS}
NAMED_ERRORS = (TypeError, ValueError, IndexError, fk.BackendError)


class Disagreement(AssertionError):
    pass


def serving(ops, backend: str, device: str) -> dict[str, tuple[str, str]]:
    """The backend asked for, or the reference and the reason where an op has no such kernel."""
    found = {}
    for op in ops:
        p = next(filter(None, (_accepted(op, seed, device) for seed in range(100))))
        try:
            op.call(p | {"backend": backend})
            found[op.name] = backend, ""
        except fk.BackendError as error:
            found[op.name] = "reference", str(error)
    return found


def _accepted(op, seed: int, device: str) -> dict | None:
    """The arguments of a call, or None where it is one to be refused."""
    draw = Draw(random.Random(seed), device)
    p = op.arguments(draw)
    return None if draw.is_refused else p


def one_call(ops, backends, seed: str, device: str, options=None, drawn=None) -> str:
    """Makes the call that `seed` says, and checks it; the kind of call. Raises Disagreement.

    drawn: counts the kinds of layouts and outputs.
    """
    r = random.Random(seed)
    op = r.choice(ops)
    if device == "cpu":
        _other_threads(r)
    draw = Draw(r, device)
    p, backend = op.arguments(draw), backends[op.name][0]
    if drawn is not None:
        drawn.update(draw.drawn)
    if options is not None and options.index is not None:
        _show(p)
    if draw.is_refused:
        check_overlap(op, p, backend)
        return f"{op.name}, out overlaps"
    if options is not None and options.no_check:
        op.call(p | {"backend": backend})
        return op.name
    try:
        if draw.maybe(1 / 8):
            check_refusal(op, p, r, backend)
            return f"{op.name}, wrong argument"
        check(op, p, backend, lambda: device == "cpu" and _other_threads(r))
    except Disagreement as found:
        raise Disagreement(f"{op.name}: {found}") from found
    return op.name


def check_drawn(op, draw: Draw, backend: str) -> None:
    """The call that `draw` makes, whether it is to be served or to be refused."""
    p = op.arguments(draw)
    (check_overlap if draw.is_refused else check)(op, p, backend)


def check_overlap(op, p: dict, backend: str) -> None:
    """`out` lies across what the call reads: an error that says so, and nothing is written."""
    before = p["out"].clone()
    try:
        op.call(p | {"backend": backend})
    except ValueError as error:
        _require(str(error).startswith("out: overlaps "), f"out overlaps: {error}")
    else:
        raise Disagreement(f"{op.name}: out that overlaps an input: accepted")
    _require(_same_bits(p["out"], before), f"{op.name}: a refused call wrote to out")


def _other_threads(r: random.Random) -> None:
    """One thread mostly, or a few; and one of the instruction sets of the native kernels."""
    torch.set_num_threads(r.choice((1, 1, 1, 1, 2, 3)))
    if native.cpu() is not None:
        native.cpu().use_isa(r.choice(_instruction_sets()))


@functools.cache
def _instruction_sets() -> list[str]:
    every = ["baseline", "avx2", "avx512"]
    return every[: every.index(native.cpu().isa()) + 1]


def check(op, p: dict, backend: str, between=lambda: None) -> None:
    """Raises Disagreement where a result is off; `between` is called before the second run."""
    before = {n: v.clone() for n, v in p.items() if isinstance(v, torch.Tensor) and n != "out"}
    got = op.call(p | {"backend": backend})
    for name, x in before.items():
        _require(_same_bits(p[name], x), f"the call changed its argument {name}")
    bounds = op.bounds(p, got)
    for name, bound in bounds.items():
        _require(got[name].shape == bound.value.shape, f"{name}: got shape {got[name].shape}")
        _require_within(name, got[name], bound)
    if op.exact_names:
        plain = op.call(p | {"backend": "reference"})
        for name in (n for n in op.exact_names if n in got):
            _require(_alike(got[name], plain[name]), f"{name}: not the bits of the reference")
    wide = in_float64(p)
    true = op.in_float64(wide, got)
    of_true = op.bounds(wide, true) if op.follows_results else bounds
    for name, x in true.items():
        if name in of_true:
            _require_within(f"the float64 reference's {name}", x, of_true[name], 1e-3)
    if op.any_threads:
        between()
    for name, x in op.call(p | {"backend": backend}).items():
        _require(_alike(x, got[name]), f"{name}: other bits in a second run")
    if not op.any_threads:  # in the order of torch's GEMMs, which depends on them
        between()
        got = op.call(p | {"backend": backend})
        for name, bound in op.bounds(p, got).items():
            _require_within(f"on other threads, {name}", got[name], bound)


def in_float64(p: dict) -> dict:
    """The same call for the float64 reference; coefficients and scalars as float32 has them."""

    def wide(name, x):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.double()
        if isinstance(x, list):
            return [earlier.double() for earlier in x]
        if name in ("c_rows", "m_rows"):
            return x.to(dtype=torch.float32)
        return float32(x) if name in ("guidance_scale", "kl_coef", "ref_coef", "ema_coef") else x

    p = {n: wide(n, v) for n, v in p.items() if n not in ("out", "out_dtype")}
    return p | {"backend": "reference"}


def _require(condition, message: str) -> None:
    if not condition:
        raise Disagreement(message)


def _require_within(name: str, got: torch.Tensor, bound, tighter: float = 1.0) -> None:
    wrong = bound.disagrees(got, tighter)
    if wrong.any():
        i = tuple(wrong.nonzero()[0].tolist())
        raise Disagreement(
            f"{name}{list(i)} is {float(got[i])!r}; expected {float(bound.value[i])!r} within "
            f"{float(bound.error[i] * tighter):.3g}; {int(wrong.sum())} of {wrong.numel()} are off"
        )


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    to = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()]
    return torch.equal(*(t.detach().contiguous().resolve_neg().view(to) for t in (x, y)))


def _alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same bits, but that a NaN is any NaN."""
    nan = x.isnan()
    return torch.equal(nan, y.isnan()) and _same_bits(x.masked_fill(nan, 0), y.masked_fill(nan, 0))


# ---- wrong arguments ----


def _wrong_values(name: str, p: dict) -> list:
    """Values of an argument of which none can be right, whatever the op."""
    value = p[name]
    anything = ["text", object()]
    if name == "history":
        return [*anything[1:], [torch.ones(3)], [*value, None], [torch.ones(2, 2)] * 4]
    if name == "shape":
        return [(3,), "ab", (2, -1), None]
    if name in ("c_rows", "m_rows"):
        other = value.table.new_zeros(77, value.table.shape[-1])
        return [*anything, None, value.table, type(value)(other), value.to("meta")]
    if isinstance(value, torch.Tensor):
        wrong = [*anything, value.to("meta"), value.to(torch.complex64), value.bool()]
        if name != "x0" or "velocity" in p:  # add_noise takes an x0 of any shape
            wrong.append(value[..., None].expand(*value.shape, 2))
        if value.is_floating_point():
            wrong.append(value.to(torch.int32))
        elif name != "row":
            wrong += [value.float(), value[None]]
        if name == "ids" and value.numel() and not value.is_cuda:
            weight = p.get("token_weight")
            if weight is None or weight.all():  # of no weight, and nobody looks
                wrong.append(torch.full_like(value, 10**6))
        if name == "row":
            wrong.append(value.float())
            if value.numel() and not value.is_cuda:  # a GPU is not asked for its values
                wrong.append(torch.full_like(value, 10**6))
        return wrong + [[1.0]] * (name != "row")
    numbers = {
        "seed": [2**64, -(2**63) - 1, 0.5, None],
        "step": [-1, 2**28, 0.5, None],
        "guidance_scale": [math.nan, math.inf, torch.ones(3), None],
        "clip_low": [-0.1, 1.5, math.nan, None],
        "clip_high": [-0.1, math.nan, None],
        "kl_coef": [-1.0, math.nan, math.inf, None],
        "ref_coef": [math.nan, math.inf, None],
        "ema_coef": [math.nan, math.inf, None],
        "ghuber_power": [0.0, 1.5, math.nan, None],
        "nft_beta": [0.0, -1.0, math.nan, math.inf, None],
        "temperature": [0.0, -1.0, math.nan, math.inf, None],
        "softcap": [0.0, -1.0, math.nan, math.inf],
        "budget_bytes": [0, -1, math.nan, None],
        "entropy_coef": [-1.0, math.nan, math.inf, None],
        "dual_clip": [1.0, -1.0, math.nan],
        "is_cap": [0.0, -1.0, math.nan, None],
        "out_dtype": [torch.int32, torch.complex64],
        "round_dtype": [torch.int32, torch.complex64],
    }
    words = ("reduction", "ratio", "objective", "weighting", "stream", "backend")
    if name in words:
        return [*anything, 3] + [None] * (name not in ("backend", "weighting"))
    return [*anything, *numbers[name]] if name in numbers else []


def check_refusal(op, p: dict, r: random.Random, backend: str) -> None:
    """One argument is made wrong: a named error of a known kind, and nothing else."""
    p = p | {"backend": backend}
    name = r.choice([n for n in p if n not in NOT_GIVEN and _wrong_values(n, p)])
    wrong = r.choice(_wrong_values(name, p))
    said = f"{name}={_brief(wrong)}"
    try:
        op.call(p | {name: wrong})
    except NAMED_ERRORS as error:
        arguments = "|".join(inspect.signature(getattr(fk, op.name)).parameters)
        is_named = re.match(rf"({arguments})\b", str(error))
        _require(is_named, f"{said}: the error names no argument: {type(error).__name__}: {error}")
    except Exception as error:
        raise Disagreement(f"{said}: raises {type(error).__name__}: {error}") from error
    else:
        raise Disagreement(f"{said}: accepted")


def _brief(value) -> str:
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name}{list(value.shape)} strides {value.stride()} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_brief, value))}]"
    return repr(value)


def _show(p: dict) -> None:
    for name, value in p.items():
        print(f"  {name} = {_brief(value)}")
