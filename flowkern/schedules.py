"""Noise schedules and step coefficients: scalars only, computed in float64.

x_t = (1 - sigma) x0 + sigma e,   velocity = e - x0,   sigma = 1 is noise, sigma = 0 is the image.

Every sampler of the family is one affine Gaussian step over an edge sigma -> sigma_next, with
dt = sigma_next - sigma < 0:

    mean     = a x_t + b velocity (+ sum_j history_weight_j x0_prediction_j)
    x_next   = mean + std noise
    log_prob = mean_D(-k (x_next - mean)^2) + c

so a sampler is a row of coefficients here, and never a kernel of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from flowkern.checks import finite_number, is_integer, shown_in_a_line
from flowkern.torch_private import num_modes

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "dpm_sde")
MAX_HISTORY = 3
# An edge in the table. `sigma` serves return_x0 (x0 = x_t - sigma velocity).
COLUMNS = ("a", "b", "std", "k", "c", "h1", "h2", "h3", "sigma")
_TABLES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_NEAR_ONE = 1e-5  # a sigma as near to 1 counts as 1: rounded grids begin at .999999


class Coefficients:
    """Step coefficients of an edge, or of several: of a grid, or one per sample. See `COLUMNS`.

    `c[i]` is one edge and broadcasts over a batch; `c[index_tensor]` gives one per sample.
    Built and validated by the functions of this module; ops read the edges on the device, never on
    the host. A table of one's own is (S, 9) or (9,) of real floating-point numbers, finite, with
    std >= 0; its values are looked at on the CPU, elsewhere that would wait for the device.
    """

    def __init__(self, table: Tensor, num_history: int = 0):
        _check_table(table)
        if not (is_integer(num_history) and 0 <= num_history <= MAX_HISTORY):
            raise ValueError(
                f"num_history: expected an integer from 0 to {MAX_HISTORY}, got {num_history!r}"
            )
        self._set(table, int(num_history))

    @classmethod
    def _checked(cls, table: Tensor, num_history: int) -> Coefficients:
        """Edges of a table that has been looked at."""
        made = cls.__new__(cls)
        made._set(table, num_history)
        return made

    def _set(self, table: Tensor, num_history: int) -> None:
        self.table = table.contiguous().resolve_neg()  # kernels read edges by address
        self.num_history = num_history  # earlier x0 predictions the edges weigh; ops check it
        self._converted: dict[tuple, Coefficients] = {}

    a = property(lambda self: self.table[..., 0])
    b = property(lambda self: self.table[..., 1])
    std = property(lambda self: self.table[..., 2])
    k = property(lambda self: self.table[..., 3])
    c = property(lambda self: self.table[..., 4])
    history = property(
        lambda self: self.table[..., 5 : 5 + MAX_HISTORY],
        doc="Weights on earlier x0 predictions, most recent first.",
    )
    sigma = property(lambda self: self.table[..., 8])

    def __len__(self) -> int:
        if self.table.ndim == 1:
            raise TypeError("a single edge has no length; it broadcasts over the batch")
        return self.table.shape[0]

    def __getitem__(self, index) -> Coefficients:
        """`int`: one edge. Slice or index tensor (B,): several."""
        if self.table.ndim == 1:
            raise TypeError("a single edge cannot be indexed")
        if isinstance(index, bool):
            raise TypeError(f"index: expected an integer, a slice or a tensor, got {index}")
        if isinstance(index, Integral):  # tensors take it too, but their error names no grid
            if not -len(self) <= index < len(self):
                raise IndexError(f"step {index} is out of range for {len(self)} edges")
        elif isinstance(index, Tensor) and (
            index.is_floating_point() or index.dtype == torch.uint8
        ):
            raise TypeError(f"index: expected integers, got {index.dtype}")
        return self._checked(self.table[index], self.num_history)

    def to(self, device=None, dtype: torch.dtype | None = None) -> Coefficients:
        """The same edges on `device` in `dtype`; converted once and remembered."""
        device = torch.device(device) if device is not None else self.table.device
        dtype = dtype or self.table.dtype
        if dtype not in _TABLES:
            raise TypeError(f"dtype: expected a real floating-point dtype, got {dtype}")
        if self.table.device == device and self.table.dtype == dtype:
            return self
        if torch.compiler.is_compiling():
            return self._checked(self.table.to(device, dtype), self.num_history)
        # By version too: a table edited in place is converted again.
        key = (device, dtype, None if self.table.is_inference() else self.table._version)
        if key not in self._converted:
            self._converted[key] = Coefficients(self.table.to(device, dtype), self.num_history)
        return self._converted[key]

    def __reduce__(self):
        return Coefficients, (self.table, self.num_history)

    def __repr__(self) -> str:
        edges = "single edge" if self.table.ndim == 1 else f"{len(self)} edges"
        return f"Coefficients({edges}, {self.table.dtype}, {self.table.device})"


def _check_table(table: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype not in _TABLES:
        got = getattr(table, "dtype", type(table).__name__)
        raise TypeError(f"table: expected a tensor of real floating-point numbers, got {got}")
    if table.ndim not in (1, 2) or table.shape[-1] != len(COLUMNS):
        raise ValueError(
            f"table: expected shape (S, {len(COLUMNS)}) or ({len(COLUMNS)},), "
            f"got {tuple(table.shape)}"
        )
    is_traced = torch.compiler.is_compiling() or num_modes() > 0
    if table.device.type != "cpu" or type(table) is not Tensor or is_traced or not table.numel():
        return
    if not bool(table.isfinite().all()):
        raise ValueError(f"table: expected finite numbers, got {table.tolist()}")
    std = table[..., COLUMNS.index("std")]
    if bool((std < 0).any()):
        raise ValueError(f"table: expected std >= 0, got {std.tolist()}")


# ---- sigmas ----


def _sigmas(name: str, value) -> Tensor:
    """Numbers in any form as a float64 tensor on the CPU."""
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        entries = plain if isinstance(plain, Sequence) else [plain]
        if not any(isinstance(v, (bool, complex, str)) for v in entries):
            return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{name}: expected numbers, got {shown_in_a_line(value)}")


# ---- sigma grids ----


def sd3_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """The grid of diffusers' FlowMatchEuler for SD3.5: (num_steps + 1,) float64, from 1 to 0.

    The scheduler shifts sigma_min when it is made and again when its steps are set; so does this.
    """
    num_steps = _steps(num_steps)
    sigma_min = _shift(torch.tensor(1e-3, dtype=torch.float64), shift)
    return _close(_shift(_linspace(1.0, float(sigma_min), num_steps), shift))


def flux_sigmas(num_steps: int, image_seq_len: int) -> Tensor:
    """The FLUX grid for `image_seq_len` packed image tokens, shifted by them: (num_steps + 1,)."""
    num_steps = _steps(num_steps)
    tokens = "a positive number of tokens, at most 2**20"
    image_seq_len = finite_number("image_seq_len", image_seq_len, tokens, lambda n: 0 < n <= 2**20)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = image_seq_len * slope + 0.5 - 256 * slope
    u = _linspace(1.0, 1.0 / num_steps, num_steps)
    return _close(math.exp(mu) / (math.exp(mu) + (1 / u - 1)))


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """linspace(1, 0) shifted, as DanceGRPO, MixGRPO and G2RPO use it: (num_steps + 1,) float64."""
    num_steps = _steps(num_steps)
    return _shift(_linspace(1.0, 0.0, num_steps + 1), shift)


def _steps(num_steps: int) -> int:
    if not (is_integer(num_steps) and 1 <= num_steps <= 2**24):
        raise ValueError(
            f"num_steps: expected an integer from 1 to 2**24, got {shown_in_a_line(num_steps)}"
        )
    return int(num_steps)


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _shift(u: Tensor, shift: float) -> Tensor:
    shift = finite_number("shift", shift, "a finite number > 0", lambda x: x > 0)
    return shift * u / (shift * u + (1 - u))  # exactly 1 at u == 1


def _close(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


# ---- one-step samplers ----


def edge_coefficients(
    sigma, sigma_next, kind: str, noise_level: float, sigma_max: float | None = None
) -> Coefficients:
    """Coefficients of the edge sigma -> sigma_next: floats give one edge, sequences (S,) S.

    kind: "ode" (Euler) | "flow_sde" (Flow-GRPO, arXiv 2505.05470)
        | "dance_sde" (DanceGRPO, arXiv 2505.07818) | "cps" (coefficients-preserving sampling)
        | "dpm_sde" (first-order SDE-DPM-Solver++, arXiv 2211.01095).
    noise_level: g = noise_level sqrt(sigma / (1 - sigma)) for flow_sde, the constant eta for
        dance_sde, the angle in units of pi / 2 for cps; "ode" and "dpm_sde" have none and take any
        value.
    sigma_max: stands for sigma in flow_sde's 1 / (1 - sigma) where sigma == 1: the second value of
        the grid. None: sigma_next.

    A sigma within 1e-5 of 1 counts as 1.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    s, n = _edge("sigma", sigma), _edge("sigma_next", sigma_next)
    if s.shape != n.shape:
        raise ValueError(
            f"sigma_next: expected the shape of sigma {tuple(s.shape)}, got {tuple(n.shape)}"
        )
    if not bool((n < s).all()):
        raise ValueError(
            f"sigma_next: expected values below sigma, got {n.tolist()} after {s.tolist()}"
        )
    noise_level = finite_number(
        "noise_level", noise_level, "a finite number >= 0", lambda x: x >= 0
    )
    if kind == "cps" and noise_level > 2:
        raise ValueError(f"noise_level: cps takes an angle in [0, 2], got {noise_level}")

    dt = n - s
    if kind == "ode":
        a, b, std = torch.ones_like(s), dt, torch.zeros_like(s)
    elif kind in ("flow_sde", "dance_sde"):
        g = torch.full_like(s, noise_level)
        if kind == "flow_sde":
            g = _flow_diffusion(s, n, noise_level, sigma_max)
        a = 1 + g**2 * dt / (2 * s)
        b = dt * (1 + g**2 * (1 - s) / (2 * s))
        std = g * torch.sqrt(-dt)
    elif kind == "cps":
        std = n * math.sin(noise_level * math.pi / 2)
        keep = n * abs(math.cos(noise_level * math.pi / 2))  # sqrt(sigma_next^2 - std^2)
        a = (1 - n) + keep
        b = -(1 - n) * s + keep * (1 - s)
    else:
        decay = _exp_minus_h(s, n)
        weight = (1 - n) * (1 - decay**2)
        a = n / s * decay + weight
        b = -s * weight
        std = n * torch.sqrt(1 - decay**2)
    return _table(a, b, std, s, tempered=kind == "cps")


def step_coefficients(sigmas, kind: str, noise_level: float) -> Coefficients:
    """Coefficients of all edges of a falling grid (S + 1,): S edges.

    Where sigma == 1, flow_sde uses the grid's second value; kind and noise_level as above.
    """
    sigmas = _sigmas("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: expected shape (S + 1,) with S >= 1, got {tuple(sigmas.shape)}")
    return edge_coefficients(sigmas[:-1], sigmas[1:], kind, noise_level, sigma_max=float(sigmas[1]))


def _edge(name: str, value) -> Tensor:
    value = _sigmas(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name}: expected a number or shape (S,), got {tuple(value.shape)}")
    if name == "sigma":
        value = torch.where((value - 1).abs() <= _NEAR_ONE, 1.0, value)
    inside = (value > 0) & (value <= 1) if name == "sigma" else (value >= 0) & (value < 1)
    if not bool(inside.all()):  # NaN is not inside either
        interval = "(0, 1]" if name == "sigma" else "[0, 1)"
        raise ValueError(f"{name}: expected values in {interval}, got {value.tolist()}")
    return value


def _flow_diffusion(s: Tensor, n: Tensor, noise_level: float, sigma_max: float | None) -> Tensor:
    """Flow-GRPO's g = noise_level sqrt(sigma / (1 - sigma*)); sigma* = sigma but at sigma == 1."""
    second = n
    if sigma_max is not None:
        inside = "a number in [0, 1)"
        second = torch.full_like(
            s, finite_number("sigma_max", sigma_max, inside, lambda x: 0 <= x < 1)
        )
    return noise_level * torch.sqrt(s / (1 - torch.where(s == 1, second, s)))


def _exp_minus_h(s: Tensor, n: Tensor) -> Tensor:
    """e^-h, h = lambda(sigma_next) - lambda(sigma), lambda = ln((1 - sigma) / sigma).

    Finite where lambda is not: 0 at sigma == 1 and at sigma_next == 0.
    """
    return (1 - s) * n / (s * (1 - n))


def _table(
    a: Tensor,
    b: Tensor,
    std: Tensor,
    sigma: Tensor,
    tempered: bool = False,
    history: Sequence[Tensor] = (),
) -> Coefficients:
    noisy = std > 0
    safe = torch.where(noisy, std, torch.ones_like(std))
    zero = torch.zeros_like(std)
    k = torch.ones_like(std) if tempered else torch.where(noisy, 1 / (2 * safe**2), zero)
    c = zero if tempered else torch.where(noisy, -torch.log(safe) - _HALF_LOG_2PI, zero)
    weights = [*history, *[zero] * (MAX_HISTORY - len(history))]
    table = torch.stack([a, b, std, k, c, *weights, sigma], dim=-1)
    if not bool(torch.isfinite(table.float()).all()):  # float: what the kernels compute with
        raise ValueError(
            f"the edges from sigma {sigma.tolist()} have coefficients beyond float32: "
            f"{table.tolist()}"
        )
    return Coefficients(table, len(history))


# ---- multistep solvers ----


def multistep_coefficients(
    path_sigmas, order: int, variant: str = "midpoint", sde: bool = False
) -> Coefficients:
    """One edge of DPM-Solver++ (arXiv 2211.01095) on flow sigmas.

    The weights on x_t, velocity and earlier x0 predictions, for `ode_step` and `sde_step`.

    path_sigmas: (..., previous, current, next), falling. The order falls to what the path allows,
        and to 1 where next == 0. A sigma within 1e-5 of 1 counts as 1.
    variant: "midpoint" | "heun", the two second-order forms; order 3 has one form.
    sde: the stochastic form (SDE-DPM-Solver++, orders 1 and 2 midpoint), with std > 0.

    Pass the x0 predictions of the earlier nodes as `history`, most recent first, one fewer than the
    order in effect.
    """
    if not is_integer(order) or order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, got {order!r}")
    if variant not in ("midpoint", "heun"):
        raise ValueError(f"variant: expected 'midpoint' or 'heun', got {variant!r}")
    if sde and (order == 3 or variant == "heun"):
        raise ValueError(f"sde: exists for orders 1 and 2 midpoint, got order {order} {variant}")
    path = _sigmas("path_sigmas", path_sigmas).tolist()
    if not isinstance(path, list) or len(path) < 2:
        raise ValueError(f"path_sigmas: expected at least (current, next), got {path_sigmas!r}")
    if any(later >= earlier for earlier, later in itertools.pairwise(path)):
        raise ValueError(f"path_sigmas: expected falling values, got {path}")
    s, n = _edge("sigma", path[-2]), _edge("sigma_next", path[-1])
    path = [*_edge("sigma", path[:-1]).tolist(), path[-1]]
    while path[:2] == [1.0, 1.0]:  # nodes at 1 are one node
        path = path[1:]
    order = 1 if path[-1] == 0 else min(order, len(path) - 1)

    decay = float(_exp_minus_h(s, n))
    weights = _x0_weights(path, order, decay, variant, sde)
    a = n / s * (decay if sde else 1) + weights[0]
    b = -s * weights[0]
    std = n * math.sqrt(1 - decay**2) if sde else torch.zeros_like(s)
    history = [torch.tensor(w, dtype=torch.float64) for w in weights[1:]]
    return _table(a, b, std, s, history=history)


def _x0_weights(path, order: int, decay: float, variant: str, sde: bool) -> list[float]:
    """On `order` x0 predictions: of this node, of the one before it, ...; decay: e^-h."""
    alpha, h = 1 - path[-1], -math.log(decay) if decay > 0 else math.inf
    first = alpha * (1 - decay**2 if sde else 1 - decay)
    if order == 1:
        return [first]
    # With the node before at sigma == 1 its lambda is -inf, 1 / r is 0, the difference drops out.
    inverse_r0 = h / (_log_snr(path[-2]) - _log_snr(path[-3]))
    phi2 = alpha * ((decay - 1) / h + 1)
    if order == 2:
        weight = phi2 if variant == "heun" else 0.5 * first
        return [first + weight * inverse_r0, -weight * inverse_r0]
    inverse_r1 = h / (_log_snr(path[-3]) - _log_snr(path[-4]))
    phi3 = -alpha * ((decay - 1 + h) / h**2 - 0.5)
    r0 = 1 / inverse_r0
    share = r0 * inverse_r1 / (1 + r0 * inverse_r1)  # r0 / (r0 + r1), also where r1 is inf
    curvature = inverse_r1 / (1 + r0 * inverse_r1)  # 1 / (r0 + r1)
    on_d0 = phi2 * (1 + share) + phi3 * curvature  # on D1_0 = (m0 - m1) / r0
    on_d1 = -phi2 * share - phi3 * curvature  # on D1_1 = (m1 - m2) / r1
    earliest = on_d1 * inverse_r1
    return [first + on_d0 * inverse_r0, -on_d0 * inverse_r0 + earliest, -earliest]


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
