"""Multistep solvers: edges that also weigh the x0 predictions of earlier nodes."""

from __future__ import annotations

import itertools
import math

import torch

from flowkern.checks import is_integer
from flowkern.schedules.coefficients import Coefficients, checked, stacked
from flowkern.schedules.formulas import exp_minus_h
from flowkern.schedules.sigmas import edge_of, sigmas_of


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
    path = sigmas_of("path_sigmas", path_sigmas).tolist()
    if not isinstance(path, list) or len(path) < 2:
        raise ValueError(f"path_sigmas: expected at least (current, next), got {path_sigmas!r}")
    if any(later >= earlier for earlier, later in itertools.pairwise(path)):
        raise ValueError(f"path_sigmas: expected falling values, got {path}")
    s, n = edge_of("sigma", path[-2]), edge_of("sigma_next", path[-1])
    path = [*edge_of("sigma", path[:-1]).tolist(), path[-1]]
    while path[:2] == [1.0, 1.0]:  # nodes at 1 are one node
        path = path[1:]
    order = 1 if path[-1] == 0 else min(order, len(path) - 1)

    decay = float(exp_minus_h(s, n, 1 - s, 1 - n))
    weights = _x0_weights(path, order, decay, variant, sde)
    a = n / s * (decay if sde else 1) + weights[0]
    b = -s * weights[0]
    std = n * math.sqrt(1 - decay**2) if sde else torch.zeros_like(s)
    history = [s.new_tensor(w) for w in weights[1:]]
    return checked(stacked(a, b, std, s, history=history), len(history), "path_sigmas")


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
