"""The theory of benchmarks/linear_flow.py against drawing what it speaks of."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import linear_flow as linear

from flowkern.schedules import edge_coefficients, sd3_sigmas

COUNT, SETTING = 200_000, linear.Setting("", 64)


def share(gradient, image):
    """Squared signal over squared noise of samples of a gradient, with the noise of the image."""
    return float((gradient * image).mean() ** 2 / gradient.square().mean() / image.var())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def draws(count=COUNT):
    return torch.randn(count, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"num_inference_steps": 20}, {"noise_level": 0.4}])
def test_what_a_policy_gradient_keeps_is_what_drawing_steps_keeps(options):
    setting = linear.Setting("", 64, {"flow_grpo": options})
    recipe = linear.made("flow_grpo", setting)
    sigmas = sd3_sigmas(recipe.num_inference_steps).tolist()
    x, gradient = draws(), 0
    for i, sigma in enumerate(sigmas[:-1]):
        edge, noise = edge_coefficients(sigma, sigmas[i + 1], *recipe.sde(i)), draws()
        a, b, std = (float(value) for value in (edge.a, edge.b, edge.std))
        x = a * x + b * linear.pull(sigma) * x + std * noise
        gradient = gradient + (b / std * noise if sigmas[i + 1] > 0 else 0)
    said = linear.theory("flow_grpo", setting)
    assert share(gradient, x) == pytest.approx(said["as_weighted"], rel=0.03)
    assert said["as_weighted"] < said["best"] < 1


def test_what_matching_keeps_is_what_drawing_noise_keeps():
    recipe = linear.made("awm", SETTING)
    plan, image = recipe.plan(sd3_sigmas), draws()
    gradient = 0
    for leaf, sigma in plan.points:
        if leaf == plan.points[0][0]:
            noise = draws()
            residual = noise - image - linear.pull(sigma) * ((1 - sigma) * image + sigma * noise)
            weight = sigma * residual.square().mean() ** (recipe.ghuber_power - 1)
            gradient = gradient - weight * residual
    said = linear.theory("awm", SETTING)["as_weighted"]
    assert share(gradient, image) == pytest.approx(said, rel=0.01)


def test_a_shift_of_the_velocity_moves_the_image_by_its_reach():
    net = linear.LinearFlow(1)
    net.shift.data.fill_(1.0)
    x, steps = torch.zeros(1, 1, 1, 1), 1000
    for i in range(steps):
        at = torch.tensor([1 - (i + 0.5) / steps])
        with torch.no_grad():
            x = x - net(x, at, None, None) / steps
    assert float(x) == pytest.approx(-linear.REACH, rel=2e-3)
