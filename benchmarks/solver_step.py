"""The third-order solver step against plain PyTorch and diffusers' scheduler."""

from __future__ import annotations

import itertools
import math

import torch
from harness import IMAGE, Case, Contender, ours, random_source
from rivals import compiled

import flowkern as fk
from flowkern.schedules import multistep_coefficients, sd3_sigmas


def plain_third_order(x, v, history, sigmas, ratios, h):
    """DPM-Solver++ (arXiv 2211.01095) as one writes it down: from differences of x0 predictions."""
    (m1, m2), (sigma, sigma_next), (r0, r1) = history, sigmas, ratios
    decay, alpha = math.exp(-h), 1 - sigma_next
    m0 = x - sigma * v
    first, second = (m0 - m1) / r0, (m1 - m2) / r1
    slope = first + r0 / (r0 + r1) * (first - second)
    curvature = (first - second) / (r0 + r1)
    x_next = sigma_next / sigma * x - alpha * (decay - 1) * m0
    x_next = x_next + alpha * ((decay - 1) / h + 1) * slope
    return x_next - alpha * ((decay - 1 + h) / h**2 - 0.5) * curvature, m0


class DiffusersThirdOrder:
    """One step of diffusers' scheduler, in the state that it has after three others."""

    def __init__(self, sigmas, x, v, history):
        from diffusers import DPMSolverMultistepScheduler

        self.scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3,
            lower_order_final=False, final_sigmas_type="zero",
        )  # fmt: skip
        self.scheduler.set_timesteps(len(sigmas) - 1)
        self.scheduler.sigmas = torch.tensor(sigmas)
        self.scheduler.timesteps = self.scheduler.sigmas[:-1] * 1000
        self.x, self.v, self.history = x, v, history

    def __call__(self):
        s = self.scheduler
        s.model_outputs, s.lower_order_nums, s._step_index = [None, *self.history[::-1]], 3, 3
        return s.step(self.v, s.timesteps[3], self.x).prev_sample, s.model_outputs[-1]


def third_order(shape, dtype, device) -> Case:
    draw = random_source(shape, device, dtype)
    x, v, m1, m2 = (draw() for _ in range(4))
    sigmas = sd3_sigmas(10).tolist()[1:]
    edges = multistep_coefficients(sigmas[1:5], 3).to(device, torch.float32)
    log_snr = [math.log((1 - s) / s) for s in sigmas[1:5]]
    h1, h0, h = (b - a for a, b in itertools.pairwise(log_snr))
    scalars = sigmas[3:5], (h0 / h, h1 / h), h
    wide_x, wide_v, *wide = (t.double() for t in (x, v, m1, m2))
    truth, _ = plain_third_order(wide_x, wide_v, wide, *scalars)
    out = torch.empty_like(x)

    def step(backend):
        return fk.ode_step(x, v, edges, history=(m1, m2), return_x0=True, out=out, backend=backend)

    arguments = (x, v, (m1, m2), *scalars)
    contenders = ours(device, step)
    if dtype == torch.float32:
        contenders += [
            Contender("eager", lambda: plain_third_order(*arguments)),
            Contender("torch.compile", compiled(plain_third_order, *arguments)),
        ]
        try:
            contenders.append(Contender("diffusers", DiffusersThirdOrder(sigmas, x, v, (m1, m2))))
        except ImportError:
            pass  # a kernel machine may have torch alone
    check = lambda x_next, x0: float((x_next - truth).abs().max())  # noqa: E731
    size = "" if shape == IMAGE else ", video"
    name = str(dtype).removeprefix("torch.")
    case = Case("sde_step", f"ode, third order{size}", shape, name, contenders, check, 1e-4)
    if dtype != torch.float32:
        case.allowed = 0.05  # half of the last place of a number up to 16
    case.bytes_moved = 6 * x.numel() * x.element_size()  # x, velocity, two of history; x_next, x0
    return case
