"""MixGRPO's rows."""

from __future__ import annotations

from types import SimpleNamespace

import plain_steps
from drop_in_scripts import inputs, log_prob_alone
from drop_ins import against

from flowkern.compat.mixgrpo import DPMState, dpm_step, flow_grpo_step


def training(device):
    """The loss of the log-probability alone, as theirs is."""
    v, *rest = inputs(device)
    name = "mixgrpo, replay + gradient"
    given = (v.requires_grad_(), *rest)
    return against(name, ours, published, given, leaf=0, loss=log_prob_alone)


def replay(device):
    return against("mixgrpo, replay", ours, published, inputs(device))


def ours(v, x, x_next, sigmas):
    return flow_grpo_step(v, x, 0.7, sigmas, 4, x_next)


def published(v, x, x_next, sigmas):
    return plain_steps.flow(v, x, 0.7, sigmas, 4, x_next)


def solver(device):
    solver = {"dpm_algorithm_type": "dpmsolver++", "dpm_solver_type": "midpoint"}
    args = SimpleNamespace(**solver, dpm_solver_order=2)

    def drop_in(v, x, x0_before, sigmas):
        state = DPMState(2)
        state.update(x0_before)
        state.update_lower_order()
        return dpm_step(args, v, x, 4, sigmas[:-1], sigmas, state)[:2]

    def published(v, x, x0_before, sigmas):
        return plain_steps.second_order(v, x, x0_before, sigmas, 4)

    return against("mixgrpo, DPM-Solver++ 2", drop_in, published, inputs(device))


ROWS = [training, replay, solver]
