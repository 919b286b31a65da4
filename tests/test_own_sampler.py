"""Samplers of one's own: their rows, by function and by name, and what is said of wrong ones."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flowkern as fk
from flowkern.checks import ConfigError
from flowkern.rl.algorithms import names, recipe
from flowkern.rl.plans import plans_of
from flowkern.rl.recipe import SDES, StepRecipe
from flowkern.rollout import Plan
from flowkern.schedules import (
    KINDS,
    device_coefficients,
    edge_coefficients,
    sd3_sigmas,
    step_coefficients,
)

GRID = sd3_sigmas(6)
MODULE = """
import math

def cps(sigma, sigma_next, noise_level):
    kept, std = (sigma_next * f(noise_level * math.pi / 2) for f in (math.cos, math.sin))
    a = 1 - sigma_next + kept
    return a, kept * (1 - sigma) - (1 - sigma_next) * sigma, std, 1.0, 0.0

def dance(sigma, sigma_next, noise_level):
    dt = sigma_next - sigma
    rate = noise_level**2 / (2 * sigma)
    return 1 + rate * dt, dt * (1 + rate * (1 - sigma)), noise_level * math.sqrt(-dt)

def late(sigma, sigma_next, noise_level):
    return dance(sigma, sigma_next, noise_level) if sigma > 0.7 else 1 / 0

def still(sigma, sigma_next, noise_level):
    return 1.0, sigma_next - sigma, 0.0

def sharp(sigma, sigma_next, noise_level):
    return 1.0, sigma_next - sigma, 1e-30

def fixed(sigma, sigma_next, noise_level):
    return 1.0, sigma_next - sigma, 0.0, 1.0, 0.0

def leaves(sigma, sigma_next, noise_level):
    raise SystemExit(3)

ratio = 0.5
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    """A user's own, where Python finds it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "samplers_of_mine.py").write_text(MODULE)
    (folder / "broken_sampler.py").write_text("import nothing_of_the_kind")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.mark.parametrize("name, kind", [("cps", "cps"), ("dance", "dance_sde")])
def test_a_row_is_a_row(name, kind):
    """Those of a kind that flowkern has, written by a user: k and c given, or a Gaussian's."""
    import samplers_of_mine

    for level in (0.0, 0.6):
        expected = step_coefficients(GRID, kind, level).table
        for own in (getattr(samplers_of_mine, name), f"samplers_of_mine:{name}"):
            got = step_coefficients(GRID, own, level)
            torch.testing.assert_close(got.table, expected, rtol=1e-12, atol=1e-15)
            one = edge_coefficients(GRID[2], GRID[3], own, level)
            assert torch.equal(one.table, got.table[2])
    x, v, noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    known = step_coefficients(GRID, kind, 0.6)
    steps = [fk.sde_step(x, v, c[1], noise=noise) for c in (got, known)]
    for mine, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_sigma_near_1_is_1_to_it_and_rows_come_in_any_form():
    seen = []

    def sampler(*edge):
        seen.append(edge)
        return torch.tensor([1.0, edge[1] - edge[0], 0.5], dtype=torch.float64)

    c = step_coefficients([1 - 1e-6, 0.5, 0.0], sampler, 2)
    assert seen == [(1.0, 0.5, 2.0), (0.5, 0.0, 2.0)]
    assert all(type(x) is float for edge in seen for x in edge)
    assert c.std.tolist() == [0.5, 0.5] and c.k.tolist() == [2.0, 2.0]
    assert c.c.tolist() == pytest.approx([-math.log(0.5 * math.sqrt(2 * math.pi))] * 2)
    assert len(step_coefficients([1.0, 0.0], lambda *edge: [1, -1, 0, 0, 0], 0.0)) == 1
    assert edge_coefficients([], [], sampler, 0.7).table.shape == (0, 9)


@pytest.mark.parametrize(
    "row, said",
    [
        ((1, 2), r"gave \(1, 2\), expected \(a, b, std\) or \(a, b, std, k, c\)"),
        (None, r"gave None, expected \(a, b, std\)"),
        ("abc", "gave 'abc', expected"),
        (1.0, "gave 1.0, expected"),
        ((1, math.nan, 0), "b: expected a finite number, got nan"),
        ((1, 0, -0.1), "std: expected a finite number >= 0, got -0.1"),
        ((1, 0, 0.1, -1, 0), "k: expected a finite number >= 0, got -1"),
        ((1, "x", 0.1), "b: expected a finite number, got 'x'"),
    ],
)
def test_what_is_no_row_is_said_with_its_edge(row, said):
    def mine(*edge):
        return row

    with pytest.raises(ValueError, match=rf"^kind: \S*mine\(1, 0.5, 0.7\):? {said}"):
        step_coefficients([1.0, 0.5, 0.0], mine, 0.7)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("samplers_of_mine:late", r"late\(0.6, 0.3, 0.7\) raised ZeroDivisionError: division by"),
        ("samplers_of_mine:leaves", r"leaves\(0.8, 0.6, 0.7\) raised SystemExit: 3"),
        (
            "samplers_of_mine:sharp",
            r"sharp: expected .* std 1e-30, k 5e\+59.* sigma 0.8$",
        ),
        (lambda *edge: torch.ones(3, device="meta"), "raised NotImplementedError"),
        ("samplers_of_mine:danse", "has no 'danse'; did you mean 'dance'"),
        ("samplers_of_mine:ratio", "which is 0.5, expected a function"),
        ("no_such_module:step", "there is no module no_such_module in"),
        ("broken_sampler:step", "broken_sampler imports nothing_of_the_kind, which is not there"),
        ("flow_sd", "expected one of .*; did you mean 'flow_sde'"),
        (None, "got None, expected one of"),
    ],
)
def test_what_is_no_sampler_is_said_in_a_line(kind, said):
    with pytest.raises(ValueError, match=f"^kind: .*{said}"):
        step_coefficients([0.8, 0.6, 0.3], kind, 0.7)


def test_on_a_device_it_is_a_table_of_its_grid():
    s = torch.tensor([0.9])
    with pytest.raises(ValueError, match=r"kind: .*step_coefficients makes a grid's edges of it"):
        device_coefficients(s, s / 2, lambda *edge: (1, 0, 0), 0.7)


# diffusion_opd's is one number, which may be 0.
DRAWN = [n for n in names() if issubclass(recipe(n), StepRecipe) and n != "diffusion_opd"]


@pytest.mark.parametrize("name", DRAWN)
def test_every_recipe_that_draws_steps_takes_every_sampler(name):
    """Trained edges are those of the sampler that is asked for, and of no other."""
    kind = recipe(name)
    for sde_type in (*SDES, "samplers_of_mine:dance"):
        plan = kind(sde_type=sde_type, noise_level=0.6).plan(sd3_sigmas)
        node = plan.nodes[plan.trained[0]]
        edge = plan.nodes[node.parent].sigma, node.sigma, sde_type, 0.6
        assert torch.equal(node.edge.table, edge_coefficients(*edge).table)
    with pytest.raises(ValueError, match="^sde_type: got .ode., expected one of cps, dance_sde"):
        kind(sde_type="ode")


@pytest.mark.parametrize("name", DRAWN)
def test_every_recipe_that_draws_steps_takes_a_noise_level_for_each(name):
    """A list's are those of the grid's steps, wherever a window lies."""
    steps = recipe(name)().num_inference_steps
    levels = [0.3 + i / 50 for i in range(steps)]
    for iteration in (0, 60):
        plan = recipe(name)(noise_level=levels).plan(sd3_sigmas, iteration)
        drawn = [node for node in plan.nodes if node.parent >= 0 and node.member is not None]
        assert {id(plan.nodes[i]) for i in plan.trained} <= {id(node) for node in drawn}
        for node in drawn:
            edge = plan.nodes[node.parent].sigma, node.sigma
            wanted = edge_coefficients(*edge, recipe(name)().sde_type, levels[node.depth - 1])
            assert torch.equal(node.edge.table, wanted.table)
    with pytest.raises(ValueError, match=rf"^noise_level: got 2 of them, expected {steps}, one"):
        recipe(name)(noise_level=[0.7, 0.7])
    with pytest.raises(ValueError, match=r"^noise_level\[1\]: got 0.0, expected a number above 0"):
        recipe(name)(noise_level=[0.7, 0.0, *levels[2:]])


def test_a_run_that_it_cannot_serve_is_refused_by_its_key():
    """Where the model's grid is known, which the configuration does not."""
    pytest.importorskip("accelerate")
    from flowkern.train.flow import FlowTask

    def check(name, rollouts):
        late = recipe(name)(sde_type="samplers_of_mine:late", updates_per_rollout=1)
        config = SimpleNamespace(train=SimpleNamespace(steps=rollouts), seed=0)
        model = SimpleNamespace(sigmas=sd3_sigmas)
        FlowTask._check_plan(SimpleNamespace(recipe=late, model=model, config=config))

    said = r"^algorithm.sde_type: samplers_of_mine:late\(.* raised"
    with pytest.raises(ConfigError, match=said):
        check("flow_grpo", 1)
    check("mixgrpo", 200)  # whose window does not come so far
    with pytest.raises(ConfigError, match=said):
        check("mixgrpo", 400)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sde_type": "cps", "noise_level": 3.0}, "noise_level: cps takes an angle"),
        (
            {"noise_level": 1e200},
            "noise_level: expected coefficients that float32",
        ),
        ({"sde_type": "samplers_of_mine:late"}, r"sde_type: samplers_of_mine:late\(.* raised"),
        (
            {"sde_type": "samplers_of_mine:sharp"},
            "sde_type: samplers_of_mine:sharp: expected",
        ),
        ({"sde_type": "samplers_of_mine:still"}, "sde_type: the edge from sigma 1.0 .* has k = 0"),
        ({"noise_level": 2.0, "sde_type": "cps", "kl_coef": 0.1}, None),
    ],
)
def test_what_a_plan_refuses_is_said_by_its_key(options, said):
    made = recipe("flow_grpo")(**options)
    if said is None:
        return plans_of(made, sd3_sigmas)[0].check()
    with pytest.raises(ConfigError, match=rf"^algorithm\.{said}"):
        plans_of(made, sd3_sigmas)


def test_steps_are_not_weighted_by_noise_that_there_is_not():
    made = recipe("tempflow_grpo")(sde_type="samplers_of_mine:fixed", kl_coef=0.0)
    with pytest.raises(ConfigError, match="^algorithm: weight: expected a finite number, got nan"):
        plans_of(made, sd3_sigmas)


@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "flow_dppo"])
def test_what_is_divided_by_the_noise_needs_some(name):
    """By a KL to the reference or to the policy that sampled, and by a guarded ratio."""
    made = recipe(name)(sde_type="samplers_of_mine:fixed")
    with pytest.raises(ConfigError, match="^algorithm.sde_type: .* has std = 0, so it has no KL"):
        plans_of(made, sd3_sigmas)


def test_a_plan_says_what_is_no_option_of_its_recipe():
    def refuses(grid, iteration, seed):
        raise ValueError("member: 0 draws noise at depth 1 already")

    made = recipe("awm")()
    object.__setattr__(made, "plan", refuses)
    with pytest.raises(ConfigError, match="^algorithm: member: 0 draws noise"):
        plans_of(made, sd3_sigmas)


def test_a_sampler_that_has_no_hash_draws():
    class Still:
        __hash__ = None

        def __call__(self, sigma, sigma_next, noise_level):
            return 1.0, sigma_next - sigma, 0.5

    plan = Plan()
    assert plan.nodes[plan.draw(plan.root(0), 0.5, Still(), 0.7, 0)].edge.std == 0.5
    with pytest.raises(ValueError, match="^kind: got \\['ode'\\], expected one of"):
        plan.draw(plan.root(1), 0.5, ["ode"], 0.7, 1)


def test_the_one_in_the_docs_keeps_the_noise_levels_as_they_say(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/algorithms.md").read_text()
    sampler, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-2:]
    (tmp_path / "churn.py").write_text(sampler)
    monkeypatch.syspath_prepend(tmp_path)
    made = {}
    exec(compile(use, "docs/algorithms.md", "exec"), made)
    c, n = made["c"], sd3_sigmas(10)[1:]
    torch.testing.assert_close(c.a * (1 - c.sigma) - c.b, 1 - n)
    torch.testing.assert_close((c.a * c.sigma + c.b) ** 2 + c.std**2, n**2)
    assert (c.std[:-1] > 0).all()


def test_the_samplers_that_draw_are_named_once_more():
    """Where options are read without torch."""
    assert {*SDES} == {*KINDS} - {"ode", "dpm_sde"}
