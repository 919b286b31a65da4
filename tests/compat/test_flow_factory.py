"""Flow-Factory's drop-in against the published formulas, on a stand-in for Flow-Factory.

Flow-Factory is not installed here: its base class is played by a small subclass of diffusers' own
scheduler, its registry by a dict. Arithmetic, diffusers' grid and look-up are the real ones.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import published
import pytest
import torch

from flowkern.compat import flow_factory

diffusers = pytest.importorskip("diffusers")

DYNAMICS = ("Flow-SDE", "Dance-SDE", "CPS")
FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")


@dataclass
class Output:
    next_latents: torch.Tensor | None = None
    next_latents_mean: torch.Tensor | None = None
    std_dev_t: torch.Tensor | None = None
    dt: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    noise_pred: torch.Tensor | None = None


class Theirs(diffusers.FlowMatchEulerDiscreteScheduler):
    """As much of Flow-Factory's class as the step asks for."""

    def __init__(self, noise_level=0.7, dynamics_type="Flow-SDE", **options):
        super().__init__(**options)
        self.noise_level, self.dynamics_type, self.is_eval = noise_level, dynamics_type, False

    def get_noise_level_for_sigma(self, sigma):
        """Noise on the second and third step alone."""
        step = (torch.as_tensor(sigma).reshape(-1, 1) == self.sigmas).int().argmax(1)
        return torch.where((step == 1) | (step == 2), self.noise_level, 0.0)


@pytest.fixture
def registered(monkeypatch):
    found = {}
    package = ModuleType("flow_factory.scheduler")
    package.FlowMatchEulerDiscreteSDEScheduler, package.SDESchedulerOutput = Theirs, Output
    registry = ModuleType("flow_factory.scheduler.registry")
    registry.register_scheduler = found.__setitem__
    for module in (ModuleType("flow_factory"), package, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def scheduler(registered):
    scheduler = flow_factory.FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def formula(dynamics, v, x, sigma, sigma_next, level, sigma_max, **how):
    """In float64: next_latents, mean, std_dev_t, dt, log_prob."""
    s, n = (published.wide(q, x) for q in (sigma, sigma_next))
    if dynamics == "Flow-SDE":
        made = published.flow(s, n, v, x, published.wide(level, x), sigma_max, **how)
    elif dynamics == "Dance-SDE":
        made = published.dance(s, n, v, x, level, **how)
    else:
        made = published.cps(s, n, v, x, level, **how)
    x_next, _, log_prob, mean, std = made
    returned = std if dynamics == "CPS" else std / torch.sqrt(s - n)
    return x_next, mean, returned, n - s, log_prob


def latents(dtype=torch.float32, batch=3):
    return torch.randn(batch, 16, 8).to(dtype), torch.randn(batch, 16, 8).to(dtype)


def close(got, expected, tolerance=2e-6):
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_and_its_replay_are_the_published_formula(scheduler, dynamics, dtype):
    x, v = latents(dtype)
    sigmas = scheduler.sigmas
    for steps in ([0, 0, 0], [1, 4, 8]):
        index = torch.tensor(steps)
        t = scheduler.timesteps[index]
        drawn = scheduler.step(
            v, t, x, generator=torch.Generator().manual_seed(5), noise_level=0.7,
            dynamics_type=dynamics,
        )  # fmt: skip
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        at = (x, sigmas[index], sigmas[index + 1], 0.7, sigmas[1])
        theirs = formula(dynamics, v, *at, noise=noise)
        # what is stored has been through the dtype of the latents, and is kept in float32
        assert torch.equal(drawn.next_latents, drawn.next_latents.to(dtype).float())
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(drawn.next_latents.double(), theirs[0], rtol=ulp, atol=2e-6)
        theirs = formula(dynamics, v, *at, x_next=drawn.next_latents)
        names = ("next_latents_mean", "std_dev_t", "dt", "log_prob")
        for name, expected in zip(names, theirs[1:], strict=True):
            got = getattr(drawn, name)
            assert got.dtype == torch.float32 and got.shape == expected.shape, name
            close(got, expected)
        assert torch.equal(drawn.noise_pred, v.float())

        leaf = v.clone().requires_grad_()
        replay = scheduler.step(
            leaf, t, x, drawn.next_latents, noise_level=0.7, dynamics_type=dynamics
        )
        assert torch.equal(replay.log_prob, drawn.log_prob)  # the first ratio is exactly 1
        (replay.log_prob.sum() + replay.next_latents_mean.square().mean()).backward()
        truth = v.double().requires_grad_()
        expected = formula(dynamics, truth, *at, x_next=drawn.next_latents)
        (expected[4].sum() + expected[1].square().mean()).backward()
        off = (leaf.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
        assert off < max(1e-5, ulp)


@pytest.mark.parametrize("dynamics", [*DYNAMICS, "ODE"])
def test_float64_latents_are_computed_in_float32(scheduler, dynamics):
    x, v = latents(torch.float64)
    t, how = scheduler.timesteps[3], {"noise_level": 0.7, "dynamics_type": dynamics}
    drawn = scheduler.step(v, t, x, **how)
    for given in (drawn.next_latents, drawn.next_latents.double()):
        again = scheduler.step(v, t, x, given, **how)
        for name in FIELDS:
            one, other = getattr(drawn, name), getattr(again, name)
            assert one.dtype == torch.float32 and torch.equal(one, other), name


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_steps_of_their_own_that_end_where_all_do(scheduler, dynamics):
    x, v, x_next = latents() + latents()[:1]
    beginnings, how = torch.tensor([900.0, 700.0, 500.0]), {"noise_level": 0.7, "sigma_max": 0.9}
    shared = scheduler.step(v, beginnings, x, x_next, 300.0, dynamics_type=dynamics, **how)
    end = torch.full((3,), 300.0)
    each = scheduler.step(v, beginnings, x, x_next, end, dynamics_type=dynamics, **how)
    for name in FIELDS:
        assert torch.equal(getattr(shared, name), getattr(each, name)), name


def test_every_form_of_a_timestep_names_the_same_edge(scheduler):
    x, v = latents()
    t = scheduler.timesteps
    options = {"next_latents": torch.randn_like(x), "noise_level": 0.7, "return_dict": False}
    expected = scheduler.step(v, t[4].expand(3), x, **options)
    forms = [
        (4, None),
        (torch.tensor(4), None),
        (np.int64(4), None),
        (torch.tensor([4]), None),
        (t[4], None),
        (t[4:5], None),
        (float(t[4]), None),
        (t[4], t[5]),
        (float(t[4]), float(t[5])),
        (t[4].expand(3), t[5].expand(3)),
    ]
    for timestep, timestep_next in forms:
        got = scheduler.step(v, timestep, x, timestep_next=timestep_next, **options)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    last = scheduler.step(v, t[-1], x, **options)[5]
    close(last, (-scheduler.sigmas[-2].double()).expand(3, 1, 1))


def test_noise_levels_of_samples_and_those_that_the_scheduler_has(scheduler):
    x, v = latents()
    t, sigmas = scheduler.timesteps, scheduler.sigmas
    index, x_next = torch.tensor([0, 1, 5]), torch.randn_like(x)
    levels = torch.tensor([0.3, 0.7, 1.1])
    at = (v, x, sigmas[index], sigmas[index + 1], levels, 0.9)
    expected = formula("Flow-SDE", *at, x_next=x_next)
    for given in (levels, levels.double(), levels.reshape(3, 1, 1), levels.tolist()):
        got = scheduler.step(v, t[index], x, x_next, noise_level=given, sigma_max=0.9)
        close(got.next_latents_mean, expected[1])
        close(got.std_dev_t, expected[2])
        close(got.log_prob, expected[4])
    own = scheduler.step(v, t[index], x, x_next)
    level = scheduler.step(v, t[index], x, x_next, noise_level=torch.tensor([0.0, 0.7, 0.0]))
    assert torch.equal(own.next_latents_mean, level.next_latents_mean)
    # without noise theirs is not finite
    assert own.log_prob[0] == own.log_prob[2] == own.std_dev_t[0] == 0 != own.log_prob[1]


def test_euler_where_it_is_evaluated_or_asked_for(scheduler):
    x, v = latents(torch.bfloat16)
    t, dt = scheduler.timesteps[3], float(scheduler.sigmas[4] - scheduler.sigmas[3])
    euler = x.double() + v.double() * dt
    leaf = v.clone().requires_grad_()
    got = scheduler.step(leaf, t, x, dynamics_type="ODE")
    close(got.next_latents.detach(), euler)  # not rounded
    assert got.next_latents is got.next_latents_mean and got.next_latents.dtype == torch.float32
    assert not got.log_prob.any() and not got.std_dev_t.any() and got.log_prob.shape == (3,)
    (grad,) = torch.autograd.grad(got.next_latents_mean.sum(), leaf)
    torch.testing.assert_close(grad.float(), torch.full(x.shape, dt), rtol=1e-2, atol=0)
    given = torch.randn_like(x)
    assert torch.equal(
        scheduler.step(v, t, x, given, dynamics_type="ODE").next_latents, given.float()
    )
    scheduler.is_eval = True
    got = scheduler.step(v, t, x, noise_level=0.7)
    assert torch.equal(got.next_latents, got.next_latents_mean.bfloat16().float())
    close(got.next_latents_mean, euler)


def test_only_what_is_asked_for_and_generators_of_samples(scheduler):
    x, v = latents()
    t = scheduler.timesteps[2]
    kept = {"noise_level": 0.7, "generator": torch.Generator().manual_seed(1)}
    some = scheduler.step(v, t, x, return_kwargs=["log_prob", "dt"], **kept)
    assert [n for n in FIELDS if getattr(some, n) is not None] == ["dt", "log_prob"]
    assert scheduler.step(v, t, x, noise_level=0.7, compute_log_prob=False).log_prob is None
    with pytest.warns(UserWarning, match="return_kwargs: a step has no 'sigma'"):
        scheduler.step(v, t, x, noise_level=0.7, return_kwargs=["sigma"])
    kept["generator"].manual_seed(1)
    made = scheduler.step(v, t, x, return_dict=False, **kept)
    assert torch.equal(made[3], some.log_prob) and len(made) == 6
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    rows = scheduler.step(v, t, x, noise_level=0.7, generator=generators)
    for i in range(3):
        row = slice(i, i + 1)
        one = scheduler.step(
            v[row], t, x[row], noise_level=0.7, generator=torch.Generator().manual_seed(i)
        )
        assert torch.equal(one.next_latents, rows.next_latents[row])
        assert torch.equal(one.log_prob, rows.log_prob[row])


def test_registered_by_a_path_that_imports(registered, scheduler):
    flow_factory.register()
    ((name, path),) = registered.items()
    assert name == "FlowMatchEulerDiscreteScheduler"
    module, _, attribute = path.rpartition(".")
    made = getattr(importlib.import_module(module), attribute)
    assert made is type(scheduler) and issubclass(made, Theirs)
    assert made.from_config(scheduler.config).config.shift == 3.0
    assert f"{made.__module__}.{made.__qualname__}" == path


def test_what_cannot_be_served_is_said(scheduler):
    x, v = latents()
    t = scheduler.timesteps
    for timestep, sentence in [
        (123.0, "timestep: expected one of the scheduler's"),
        (t[:4].reshape(2, 2), r"timestep: expected a number or shape \(B,\), got \(2, 2\)"),
        (torch.tensor([1, 2, 3]), "timestep: expected floating-point timesteps for each sample"),
        (10, "timestep: an integer is a step from 0 to 9, got 10"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            scheduler.step(v, timestep, x, noise_level=0.7)
    short = x[:1]
    for dynamics in (*DYNAMICS, "ODE"):  # nothing is spread over a batch unasked
        how = {"noise_level": 0.7, "dynamics_type": dynamics}
        with pytest.raises(ValueError, match=r"^noise_pred: expected shape \(3, 16, 8\), got \(1"):
            scheduler.step(short, t[0], x, **how)
        with pytest.raises(
            ValueError, match=r"^next_latents: expected shape \(3, 16, 8\), got \(1"
        ):
            scheduler.step(v, t[0], x, short, **how)
        with pytest.raises(ValueError, match="^timestep: expected one or 3, one per sample; got 2"):
            scheduler.step(v, t[:2], x, **how)
    with pytest.raises(ValueError, match="dynamics_type: expected one of"):
        scheduler.step(v, t[0], x, dynamics_type="flow")


def test_a_version_that_lacks_what_the_step_asks_is_refused_at_once(registered):
    bare = type("Bare", (diffusers.FlowMatchEulerDiscreteScheduler,), {})
    sys.modules["flow_factory.scheduler"].FlowMatchEulerDiscreteSDEScheduler = bare
    with pytest.raises(ImportError, match="Bare.get_noise_level_for_sigma: this version of Flow-"):
        flow_factory.register()
    assert not registered


def test_without_flow_factory_one_line_says_so():
    for call in (flow_factory.register, lambda: flow_factory.FlowMatchEulerDiscreteSDEScheduler):
        with pytest.raises(ImportError, match="flow_factory.scheduler: Flow-Factory cannot be imp"):
            call()
    assert not hasattr(flow_factory, "UniPCMultistepSDEScheduler")
