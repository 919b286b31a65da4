"""What the token losses make of their arguments: every error names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common.arguments import (
    FLOATS,
    INTEGERS,
    check_index,
    check_per_sample,
    is_number,
    packed,
)

from .inputs import Head, Objective, Tokens, log_or_infinite

LARGEST_SCALE = 1e30


def check_head(hidden: Tensor, head: Head) -> tuple[Head, torch.dtype]:
    """The head as implementations take it, and the dtype of the arithmetic."""
    _check_matrix("hidden", hidden, "(M, H)")
    _check_matrix("weight", head.weight, "(V, H)")
    weight, bias = head.weight, head.bias
    if weight.shape[1] != hidden.shape[1] or not len(weight):
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[1]}) with V > 0, got {tuple(weight.shape)}"
        )
    others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise ValueError(f"bias: expected a tensor of shape ({len(weight)},), got {_shape(bias)}")
    for name, x in others.items():
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected {hidden.dtype}, as hidden, got {x.dtype}; cast one of them "
                "(a GEMM takes one dtype)"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {x.device}")
    _check_scale("temperature", head.temperature)
    if head.softcap is not None:
        _check_scale("softcap", head.softcap)
    if not (is_number(head.budget_bytes) and 0 < head.budget_bytes < math.inf):
        wanted = "expected a finite number > 0"
        raise ValueError(f"budget_bytes: {wanted}, got {head.budget_bytes!r}")
    softcap = head.softcap if head.softcap is None else float(head.softcap)
    numbers = float(head.temperature), softcap, int(head.budget_bytes)
    bias = bias if bias is None else bias.resolve_neg().contiguous()
    head = Head(_rows(weight), bias, *numbers)
    return head, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_tokens(tokens: Tokens, head: Head, dtype: torch.dtype) -> Tokens:
    """The tokens as implementations take them: ids of no weight are 0."""
    hidden, ids, *others = tokens
    count, device = len(hidden), hidden.device
    if not isinstance(ids, Tensor) or ids.shape != (count,):
        raise ValueError(f"ids: expected a tensor of shape ({count},), got {_shape(ids)}")
    for name, x in zip(Tokens._fields[2:], others, strict=True):
        if x is not None:
            check_per_sample(name, x, count, device)
    if tokens.token_weight is not None and ids.dtype in INTEGERS and ids.device == device:
        ids = ids.masked_fill(tokens.token_weight == 0, 0)
    ids = check_index("ids", ids, len(head.weight), device)
    return Tokens(_rows(hidden), ids, *(None if x is None else packed(x, dtype) for x in others))


def check_objective(settings: dict, tokens: Tokens) -> Objective:
    for name in ("kl_coef", "entropy_coef", "clip_low", "clip_high"):
        value = settings[name]
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    low, high, dual, cap = (settings[n] for n in ("clip_low", "clip_high", "dual_clip", "is_cap"))
    if low > 1:
        raise ValueError(f"clip_low: expected 0 <= clip_low <= 1, got {low}")
    if dual is not None and not (is_number(dual) and dual > 1):
        raise ValueError(f"dual_clip: expected a number > 1 or None, got {dual!r}")
    if cap is not None and not (is_number(cap) and cap > 0):
        raise ValueError(f"is_cap: expected a number > 0, got {cap!r}")
    if tokens.ref_log_prob is None and settings["kl_coef"] != 0:
        raise ValueError("ref_log_prob: needed for a KL (kl_coef is not 0), got None")
    if (tokens.sample_log_prob is None) != (cap is None):
        missing = "sample_log_prob" if tokens.sample_log_prob is None else "is_cap"
        raise ValueError(f"{missing}: got None; expected sample_log_prob and is_cap together")
    return Objective(
        float(settings["kl_coef"]),
        float(settings["entropy_coef"]),
        math.log1p(-low) if low < 1 else -math.inf,
        math.log1p(high),
        log_or_infinite(dual),
        math.inf if cap is None else float(cap),
    )


def _check_matrix(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":  # of torch.distributed, which need not be loaded to ask
        raise TypeError(
            f"{name}: got a DTensor, of which this process has a share; expected a whole tensor: "
            f"pass {name}.full_tensor(), whose gradient goes back to the shares (of processes with "
            "tokens of their own with grad_placements=[Partial()], else each keeps its own)"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not torch.strided or x.ndim != 2:
        raise ValueError(f"{name}: expected a dense tensor of shape {shape}, got {_shape(x)}")


def _check_scale(name: str, value) -> None:
    """What logits are divided by: kernels hold it, and 1 over it, in float32."""
    if not (is_number(value) and 1 / LARGEST_SCALE <= value <= LARGEST_SCALE):
        wanted = f"a number from {1 / LARGEST_SCALE:g} to {LARGEST_SCALE:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def _rows(x: Tensor) -> Tensor:
    """`x` with every row contiguous, in memory that holds its values."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _shape(x) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
