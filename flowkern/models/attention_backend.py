"""Which implementation of attention a network asks, by the names of diffusers' dispatcher.

B rows, N tokens, H heads of width D. diffusers sets it in the processors of attention modules and,
beside that, for all networks of the process; here for those that are asked for alone, and what came
of it is looked at: processors that ask torch by themselves ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

__all__ = [
    "Dispatching",
    "is_of_backend",
    "modules",
    "require",
    "require_name",
    "set_backend",
    "try_backend",
]

TRIED, ALLOWED = (2, 32, 2, 64), 0.1
"""(B, N, H, D) by which one is tried, and how far off it may be, by norms: 8 bits err by some
hundredths, and another layout by 1."""


def require(name: str, is_trained: bool = False) -> None:
    """Raise ValueError, of one line, for a name that there is not, one that is not installed here,
    or sage attention where it is_trained: it has no gradient. A kernel of the hub is downloaded.
    """
    require_name(name, is_trained)
    try:
        _ask_for(name)
    except Exception as error:  # of whatever kind a download raises
        known = sorted(each.value for each in AttentionBackendName)
        here = ", ".join(each for each in known if _is_installed(each))
        raise ValueError(f"{_refused(name, error)}; installed here: {here}") from error


def require_name(name: str, is_trained: bool = False) -> None:
    """As `require`, on any machine: nothing is said of what is installed."""
    known = sorted(each.value for each in AttentionBackendName)
    if name not in known:
        raise ValueError(f"attention_backend: got {name!r}, expected one of {', '.join(known)}")
    if is_trained and "sage" in name:
        raise ValueError(
            f"attention_backend: got {name!r}, which has no gradient: it serves `flowkern sample "
            f"--attention-backend {name}`; expected another for a training"
        )


def _ask_for(name: str) -> None:
    """Raise what diffusers does where it is not installed, or cannot be downloaded."""
    with attention_dispatch.attention_backend(name):  # leaves the default as it finds it
        pass


def _is_installed(name: str) -> bool:
    if name.endswith("_hub"):  # not to be downloaded for this
        return False
    try:
        _ask_for(name)
    except RuntimeError:
        return False
    return True


def modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """A network's attention modules, by name."""
    kinds = (Attention, AttentionModuleMixin)
    return [(name, each) for name, each in network.named_modules() if isinstance(each, kinds)]


def set_backend(networks: Sequence[Any], name: str, ours: Mapping[type, type]) -> int:
    """Have all attention of diffusers' networks go through the backend; how many modules it is of.
    The default of the process stays.

    ours: by processors that ask torch by themselves, those that ask the dispatcher.
    Raises ValueError as `require`, and where a module has a processor that does not ask it.
    """
    require(name)
    count = 0
    for network in networks:
        for _, module in modules(network):
            if type(module.processor) in ours:
                module.set_processor(ours[type(module.processor)]())
        with attention_dispatch.attention_backend(name):  # which puts the default back
            network.set_attention_backend(name)
        for place, module in modules(network):
            if getattr(module.processor, "_attention_backend", None) != name:
                raise ValueError(
                    f"attention_backend: got {name!r}, but {place} of "
                    f"{type(network).__name__} has a {type(module.processor).__name__}, which "
                    "asks torch by itself"
                )
            count += 1
    return count


def try_backend(name: str, device: torch.device, dtype: torch.dtype, is_trained: bool) -> None:
    """Its values, and its gradients where it is_trained, against torch's in float32; under a mask,
    too, which it may refuse but not pass over.

    Raises ValueError where it cannot be had on this device, in this dtype, or is another function.
    """
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(TRIED, device=device, generator=generator) for _ in range(4)]
    *given, gradient = (x.to(dtype) for x in drawn)
    ask = partial(dispatch_attention_fn, backend=AttentionBackendName(name))
    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(is_trained):
        right = _answers(_plain, [x.float() for x in given], gradient.float())
        try:
            found = _answers(ask, given, gradient)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a library's own
            where = f"on {device.type}, in {str(dtype).removeprefix('torch.')}: "
            raise ValueError(_refused(name, error, where)) from error
    for what, *both in zip(("answer", *"qkv"), right, found, strict=False):
        _compare(name, what if what == "answer" else f"gradient of {what}", *both)
    rows, tokens = TRIED[:2]
    mask = torch.arange(tokens, device=device) < torch.tensor([[tokens], [tokens // 2]]).to(device)
    mask = mask.view(rows, 1, 1, tokens)
    with torch.no_grad():
        try:
            masked = ask(*given, attn_mask=mask)
        except Exception:  # as a network that has one will hear
            return
        _compare(
            name, "answer under a mask", _plain(*(x.float() for x in given), mask=mask), masked
        )


def is_of_backend(error: BaseException) -> bool:
    """Was it raised in the dispatcher, or below it?"""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == attention_dispatch.__file__:
            return True
        trace = trace.tb_next
    return False


def _compare(name: str, what: str, right: Tensor, found: Tensor) -> None:
    off = ((found.float() - right).norm() / right.norm()).item()
    if not off <= ALLOWED:
        raise ValueError(f"attention_backend: got {name!r}, whose {what} is off by {off:.2g}")


def _plain(*inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def _answers(ask: Any, given: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return [ask(*given)]
    leaves = [x.requires_grad_(True) for x in given]
    out = ask(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _refused(name: str, error: Exception, where: str = "") -> str:
    return f"attention_backend: got {name!r}, but {where}{' '.join(str(error).split()):.300}"


class Dispatching:
    """A processor for diffusers' `Attention` in the place of AttnProcessor2_0 and
    JointAttnProcessor2_0, which ask torch: attention of tokens (B, N, E) to each other and, in one,
    to those of text, which come after them.
    """

    _attention_backend = _parallel_config = None  # as `set_attention_backend` looks for them

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        text, layers = encoder_hidden_states, [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)]
        qkv = [_heads(hidden_states, attn.heads, *each) for each in (*layers, (attn.to_v, None))]
        if text is not None:
            layers = [(attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)]
            layers.append((attn.add_v_proj, None))
            qkv = [
                torch.cat([image, _heads(text, attn.heads, *each)], dim=1)
                for image, each in zip(qkv, layers, strict=True)
            ]
        backend = self._attention_backend
        out = dispatch_attention_fn(*qkv, attn_mask=attention_mask, backend=backend).flatten(2)
        image, rest = out.to(qkv[0].dtype).tensor_split([hidden_states.shape[1]], dim=1)
        project, dropout = attn.to_out
        image = dropout(project(image))
        if text is None:
            return image
        return image, rest if attn.context_pre_only else attn.to_add_out(rest)


def _heads(x: Tensor, heads: int, project: nn.Module, norm: nn.Module | None) -> Tensor:
    """(B, N, E) -> (B, N, H, D)."""
    x = project(x).unflatten(-1, (heads, -1))
    return x if norm is None else norm(x)
