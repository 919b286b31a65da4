"""Laws of solvers on a Gaussian, whose flow is known: of the benchmark, and so of the recipes."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import solver_error as bench  # noqa: E402

from flowkern.checks import ConfigError  # noqa: E402
from flowkern.rl.algorithms import recipe  # noqa: E402
from flowkern.rl.plans import plans_of  # noqa: E402
from flowkern.schedules import flux_sigmas, sd3_sigmas, shifted_sigmas  # noqa: E402

MATCHING = ("awm", "diffusion_nft", "dgpo", "crd")


def off(name, steps, std, **options):
    """How far the std of what it samples is from that of the data, over that."""
    made = recipe(name)(num_inference_steps=steps, group_size=2, **options)
    return abs(bench.gaussian(made.plan(sd3_sigmas), std) - 1)


@pytest.mark.parametrize("name", MATCHING)
def test_sampling_by_default_is_nearer_to_the_flow_than_eulers_method(name):
    """On SD3's own grid, where order 2 is not."""
    euler = {"solver_order": 1, "last_sigma_ratio": 0.0}
    for steps in (10, 14, 25, 40):
        for std in (0.1, 0.35, 1.0, 2.0):
            assert off(name, steps, std) < off(name, steps, std, **euler), (steps, std)
    assert off("diffusion_nft", 10, 0.5, last_sigma_ratio=0.0) > off(name, 10, 0.5, **euler)


@pytest.mark.parametrize("order, rate", [(1, 1), (2, 2)])
def test_the_order_of_convergence_is_the_solvers(order, rate):
    coarse, fine = (
        off("diffusion_nft", steps, 2.0, solver_order=order, timestep_fraction=0.01)
        for steps in (100, 200)
    )
    assert math.log2(coarse / fine) == pytest.approx(rate, abs=0.1)


def test_the_published_figures_of_a_gaussian():
    """Mean absolute errors at std .35 and AWM's 14 steps, with the last two steps at order 1."""
    sigmas = sd3_sigmas(14).tolist()
    expected = {"order 1": 0.073, "order 2": 0.099, "order 2, last two steps 1": 0.055}
    for way, error in expected.items():
        found = abs(bench.gaussian(bench.WAYS[way](sigmas), 0.35) - 1) * 0.35
        assert found * math.sqrt(2 / math.pi) == pytest.approx(error, abs=5e-4), way


def test_only_a_last_level_that_is_far_below_the_one_before_is_another():
    made = recipe("crd")()
    for steps in (2, 3, 10, 40):
        for even in (shifted_sigmas(steps, 1.0), shifted_sigmas(steps, 3.0), flux_sigmas(steps, 9)):
            assert made.path(even.tolist()) == pytest.approx(even.tolist(), abs=1e-15)
        sigmas = sd3_sigmas(steps).tolist()
        path = made.path(sigmas)
        assert path[:-2] == sigmas[:-2] and path[-2:] == [sigmas[-3] / 2, 0]
        assert recipe("crd")(last_sigma_ratio=0.0).path(sigmas) == sigmas
    assert made.path([1.0, 0.7, 0.4, 0.0, 0.0]) == [1.0, 0.7, 0.4, 0.0, 0.0], "not above 0"
    assert made.path([1.0, 0.0]) == [1.0, 0.0]


@pytest.mark.parametrize("name", MATCHING)
def test_what_cannot_be_sampled_is_refused_by_its_option(name):
    twice = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(ConfigError, match="expected falling values"):
        plans_of(recipe(name)(group_size=2, num_inference_steps=5), lambda _: twice)
    with pytest.raises(ConfigError, match=r"algorithm\.solver_order: expected 1, 2 or 3, got 4"):
        plans_of(recipe(name)(group_size=2, solver_order=4), sd3_sigmas)
