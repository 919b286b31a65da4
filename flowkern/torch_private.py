"""Every private name of torch that flowkern rests on, and the public way that serves without it;
compiled and float8 networks, at the end, have none.

Asked at every call, so they are torch's own functions where it has them: the public ways take
microseconds, or see less and so assume the worst. PUBLIC holds them; tests put them in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Probe(torch.autograd.Function):
    """Without a setup_context torch refuses it inside of a torch.func transform."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x


def _is_in_func() -> bool:
    try:
        _Probe.apply(torch.empty(0))
    except RuntimeError:
        return True
    return False


def _forward_level() -> int:
    try:
        forward_ad.make_dual(torch.empty(0), torch.empty(0))
    except RuntimeError:  # no level was entered
        return -1
    return 0


def _is_batched(grad: Tensor) -> bool:
    try:
        grad.untyped_storage()
    except RuntimeError:  # a batch of tensors has no storage
        return True
    return False


def _as_constant(function: Callable) -> Callable:
    return torch.compiler.assume_constant_result(function)


def _lerp_all(into: list[Tensor], towards: list[Tensor], weight: float) -> None:
    for one, other in zip(into, towards, strict=True):
        one.lerp_(other, weight)


def _assert_async(is_right: Tensor, message: str) -> None:
    if not is_right:  # the host waits
        raise RuntimeError(message)


PUBLIC: dict[str, Callable] = {
    "num_modes": lambda: 1,  # public torch cannot tell: ops go through the dispatcher
    "is_in_func": _is_in_func,
    "forward_level": _forward_level,
    "is_batched": _is_batched,
    "increment_version": torch.autograd.graph.increment_version,
    "raw_stream": lambda index: torch.cuda.current_stream(index).cuda_stream,
    "as_constant": _as_constant,
    "lerp_all": _lerp_all,
    "assert_async": _assert_async,
}


def _find(path: str, name: str) -> Callable:
    found = torch
    for part in path.split("."):
        found = getattr(found, part, None)
    return PUBLIC[name] if found is None else found


num_modes = _find("_C._len_torch_dispatch_stack", "num_modes")  # of dispatch modes, entered
is_in_func = _find("_C._are_functorch_transforms_active", "is_in_func")
is_batched = _find("_C._functorch.is_legacy_batchedtensor", "is_batched")  # is_grads_batched=True
increment_version = _find("_C._increment_version", "increment_version")  # of a tuple of tensors
raw_stream = _find("_C._cuda_getCurrentRawStream", "raw_stream")  # of a CUDA device, by its index
lerp_all = _find("_foreach_lerp_", "lerp_all")  # in place, of lists
assert_async = _find("_assert_async", "assert_async")  # of a bool on a device, which does not wait
exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # without it kernels read attributes

if hasattr(forward_ad, "_current_level"):

    def forward_level() -> int:
        """Of forward-mode differentiation: -1 where there is none."""
        return forward_ad._current_level

else:
    forward_level = _forward_level


def as_constant(function: Callable) -> Callable:
    """Compilers call it when they trace, and keep the result.

    What torch.compiler.assume_constant_result does; calling that imports the compiler, and triton.
    """
    function._dynamo_marked_constant = True
    return function


# ---- without a public way ----


def allow_graphs(count: int) -> None:
    """So many of one function, at least, before the compiler gives up."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def count_graphs() -> int:
    """Compiled in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def process_groups() -> list[torch.distributed.ProcessGroup]:
    """All there are, those of device meshes among them."""
    return list(torch.distributed.distributed_c10d._world.pg_map)


def is_of_compiler(error: Exception) -> bool:
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def scaled_product(small: Tensor, weight: Tensor, scale: Tensor, scale_weight: Tensor) -> Tensor:
    """float8 (M, K) by (K, N), times scales (M, 1) and (1, N) -> (M, N) in bfloat16."""
    return torch._scaled_mm(
        small, weight, scale, scale_weight, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def run_backward(loss: Tensor) -> None:
    """What `loss.backward()` does, with function modes on while blocks are computed again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip
