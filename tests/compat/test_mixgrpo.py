"""MixGRPO's steps against their formulas in float64, and install() on a stand-in for its module."""

import sys
from types import ModuleType, SimpleNamespace

import published
import pytest
import torch
from test_steps_of_scripts import SIGMAS, close, gradients_agree

from flowkern.compat import mixgrpo
from flowkern.compat._grid import _known
from flowkern.compat.mixgrpo import DPMState, dance_grpo_step, dpm_step, flow_grpo_step
from flowkern.schedules import shifted_sigmas


def places(index):
    return SIGMAS[index].double(), SIGMAS[index + 1].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("determistic", [False, True])
def test_flow_grpo_step(dtype, sde_type, determistic):
    x, velocity = torch.randn(2, 5, 8), torch.randn(2, 5, 8).to(dtype)
    for index in (0, 4, 6):
        s, n = places(index)

        def theirs(v, s=s, n=n, **how):
            if determistic:
                how = {"x_next": (x.double() + (n - s) * v.double()).detach()}
            if sde_type == "cps":
                return published.cps(s, n, v, x, 0.8, **how)
            return published.flow(s, n, v, x, 0.7, SIGMAS[1], **how)

        generator = torch.Generator().manual_seed(2)
        rest = (0.7, SIGMAS, index)
        drawn = flow_grpo_step(velocity, x, *rest, None, generator, determistic, sde_type)
        noise = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
        for got, expected in zip(drawn, theirs(velocity, noise=noise), strict=True):
            close(got, expected, 1e-5)
        stored = {"prev_sample": drawn[0], "determistic": determistic, "sde_type": sde_type}
        replayed = flow_grpo_step(velocity, x, *rest, **stored)
        assert torch.equal(replayed[2], drawn[2])  # the ratio is exactly 1
        gradients_agree(
            lambda v: flow_grpo_step(v, x, *rest, **stored)[2:4],  # noqa: B023
            lambda v: theirs(v, x_next=drawn[0])[2:4],  # noqa: B023
            velocity,
        )
    assert drawn[4].shape == ()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_grpo_step(sde_type, sde_solver):
    x, velocity = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for index in (0, 4, 6):
        s, n = places(index)

        def theirs(v, s=s, n=n, **how):
            if sde_type == "cps":
                return published.cps(s, n, v, x, 0.5, **how)
            formula = published.dance if sde_solver else published.euler_with_noise
            scale = 1 / (2 * 0.3**2 * (s - n))
            return formula(s, n, v, x, 0.3, score=lambda *a: published.squares(scale, *a), **how)

        kind = {"sde_type": sde_type, "noise_level": 0.5 if sde_type == "cps" else None}
        rest = (0.3, SIGMAS, index)
        torch.manual_seed(2)
        drawn = dance_grpo_step(velocity, x, *rest, None, True, sde_solver, **kind)
        torch.manual_seed(2)
        noise = torch.randn(x.shape) if sde_solver else torch.zeros(x.shape)
        expected = theirs(velocity, noise=noise)
        for got, one in zip(drawn, expected, strict=False):
            close(got, one, 1e-5)
        mean, x0 = dance_grpo_step(velocity, x, *rest, None, False, sde_solver, **kind)
        close(mean, expected[3])
        close(x0, expected[1])
        gradients_agree(
            lambda v: dance_grpo_step(v, x, *rest, x, True, sde_solver, **kind)[1:][::-1],  # noqa: B023
            lambda v: theirs(v, x_next=x)[1:3][::-1],
            velocity,
        )


ARGS = {"dpm_algorithm_type": "dpmsolver++", "dpm_solver_type": "midpoint"}


@pytest.mark.parametrize("count", [10, 16])
@pytest.mark.parametrize(
    "order, variant, sde",
    [(1, "midpoint", False), (2, "midpoint", False), (2, "heun", False), (3, "midpoint", False),
     (1, "midpoint", True), (2, "midpoint", True)],
)  # fmt: skip
def test_paths_of_the_solver(count, order, variant, sde):
    sigmas = shifted_sigmas(count, 3.0).float()
    args = SimpleNamespace(**ARGS | {"dpm_solver_order": order, "dpm_solver_type": variant})
    x, state, x0s = torch.randn(2, 6, 4), DPMState(order), []
    generator, theirs_of = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for i in range(count):
        velocity = torch.tanh(x)
        ours = dpm_step(args, velocity, x, i, sigmas[:-1], sigmas, state, generator, sde_solver=sde)
        noise = torch.randn(x.shape, generator=theirs_of) if sde else None
        is_short = i == count - 2 and count < 15
        used = 1 if i in (0, count - 1) else min(order, i + 1, 2 if is_short else 3)
        path = sigmas[i + 1 - used : i + 2].double()
        x0s.insert(0, x.double() - sigmas[i].double() * velocity.double())
        x_next, log_prob = published.dpm(path, x, x0s, used, variant, noise)
        close(ours[0], x_next, 2e-5)
        close(ours[1], x0s[0])
        if sde and i < count - 1:
            close(ours[2], log_prob, 1e-5)
        else:
            assert torch.equal(ours[2], torch.zeros(2))
        assert state.model_outputs[-1] is ours[1]
        x = ours[0]
    assert state.lower_order_nums == order


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_of_the_solver_has_its_gradient(order):
    """As in their training, which asks for one without a state and so of order 1; and with one."""
    args = SimpleNamespace(**ARGS, dpm_solver_order=2)
    x, velocity, noise, before = (torch.randn(2, 6, 4) for _ in range(4))
    path = SIGMAS[4 - order : 5].double()

    def ours(v):
        state = DPMState(2) if order == 2 else None
        if state:
            state.update(before)
            state.update_lower_order()
        _, x0, log_prob = dpm_step(
            args, v, x, 3, SIGMAS[:-1], SIGMAS, state, variance_noise=noise, sde_solver=True
        )
        return log_prob, x0

    def theirs(v):
        x0s = [x.double() - path[-2] * v, before.double()]
        mean, _ = published.dpm(path, x, x0s, order, noise=0 * noise)
        decay = path[-1] * (1 - path[-2]) / (path[-2] * (1 - path[-1]))
        std = path[-1] * torch.sqrt(1 - decay**2)
        return published.gaussian((mean + std * noise).detach(), mean, std), x0s[0]

    gradients_agree(ours, theirs, velocity)


def test_a_state_of_another_path_is_as_a_new_one():
    args, velocity = SimpleNamespace(**ARGS, dpm_solver_order=2), torch.randn(2, 6, 4)

    def path(state):
        x = torch.ones(2, 6, 4)
        for i in range(4):
            x = dpm_step(args, velocity * x, x, i, SIGMAS[:-1], SIGMAS, state)[0]
        return x

    state = DPMState(2)
    assert torch.equal(path(state), path(DPMState(2)))
    assert torch.equal(path(state), path(DPMState(2)))  # it began with what the first one left


def test_the_number_of_a_step_may_be_a_tensor():
    """As scripts that shuffle steps have it; nothing more is remembered of one than of a number."""
    x, args = torch.randn(2, 5, 8), SimpleNamespace(**ARGS, dpm_solver_order=1)
    steps = (
        lambda i: flow_grpo_step(x, x, 0.7, SIGMAS, i, x),
        lambda i: dance_grpo_step(x, x, 0.3, SIGMAS, i, x, True, True),
        lambda i: dance_grpo_step(x, x, 0.3, SIGMAS, i, None, False, True),
        lambda i: dpm_step(args, x, x, i, SIGMAS[:-1], SIGMAS),
    )
    for step in steps:
        expected, before = step(3), len(_known[SIGMAS])
        for got, one in zip(step(torch.tensor(3)), expected, strict=True):
            assert torch.equal(got, one)
        assert len(_known[SIGMAS]) == before


def test_what_is_refused():
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match="sde_type: expected 'sde' or 'cps', got 'ode'"):
        flow_grpo_step(x, x, 0.7, SIGMAS, 0, None, sde_type="ode")
    with pytest.raises(ValueError, match="generator: prev_sample is given"):
        flow_grpo_step(x, x, 0.7, SIGMAS, 0, x, torch.Generator())
    plain = SimpleNamespace(**ARGS | {"dpm_algorithm_type": "dpmsolver"}, dpm_solver_order=1)
    with pytest.raises(ValueError, match="dpm_algorithm_type: expected 'dpmsolver\\+\\+'"):
        dpm_step(plain, x, x, 0, SIGMAS[:-1], SIGMAS)
    with pytest.raises(ValueError, match="step_index: expected a step from 0 to 7, got 8"):
        dpm_step(SimpleNamespace(**ARGS, dpm_solver_order=2), x, x, 8, SIGMAS[:-1], SIGMAS)
    third, state = SimpleNamespace(**ARGS, dpm_solver_order=3), DPMState(3)
    for i in range(2):
        dpm_step(third, x, x, i, SIGMAS[:-1], SIGMAS, state, sde_solver=True)
    with pytest.raises(ValueError, match="sde_solver: exists for orders 1 and 2"):
        dpm_step(third, x, x, 2, SIGMAS[:-1], SIGMAS, state, sde_solver=True)


def test_install_serves_the_module_and_who_has_imported_from_it(monkeypatch):
    """On a stand-in: fastvideo is not installed here."""
    names = ("flow_grpo_step", "dance_grpo_step", "dpm_step", "DPMState")
    for name in ("fastvideo", "fastvideo.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    theirs, script = ModuleType("fastvideo.utils.sampling_utils"), ModuleType("train_grpo_flux")
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    with pytest.raises(ImportError, match="flow_grpo_step: this version of MixGRPO has none"):
        mixgrpo.install()
    for name in names:
        setattr(theirs, name, lambda name=name: name)
        setattr(script, name, getattr(theirs, name))
        setattr(script, f"their_{name}", getattr(theirs, name))  # import ... as
    monkeypatch.setitem(sys.modules, script.__name__, script)
    for _ in range(2):
        mixgrpo.install()
        for name in names:
            ours = getattr(mixgrpo, name)
            assert getattr(theirs, name) is ours and getattr(script, name) is ours
            assert getattr(script, f"their_{name}") is ours


def test_install_says_what_is_missing():
    with pytest.raises(ImportError, match="sampling_utils: MixGRPO cannot be imported"):
        mixgrpo.install()
