"""The plans of the recipes at the papers' defaults: what they cost, draw and train, and that
defects of the released loops are not theirs.
"""

import random
from dataclasses import fields, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import drawn_steps, path, plan_of, std

from flowkern.checks import ConfigError
from flowkern.rl import algorithms
from flowkern.rl.algorithms import names, recipe
from flowkern.rl.cost import mean_cost, network_calls
from flowkern.rl.plans import plans_of
from flowkern.schedules import sd3_sigmas, shifted_sigmas

EVEN_GRID = shifted_sigmas(25, 3.0).tolist()


def test_a_recipe_is_one_short_file():
    for file in Path(algorithms.__file__).parent.glob("[!_]*.py"):
        assert len(file.read_text().splitlines()) < 80, file.name


# ---- network calls per prompt, guidance not counted ----


@pytest.mark.parametrize(
    "name, options, ours, released",
    [
        ("flow_grpo", {}, (240, 216, 24), (240, 216, 24)),
        ("flow_dppo", {}, (160, 48, 16), (160, 48, 16)),
        ("gardo", {}, (217, 169, 24), (240, 192, 24)),
        ("gardo", {"init_same_noise": False}, (240, 192, 24), (240, 192, 24)),
        ("flow_grpo_fast", {}, (240, 72, 24), (240, 72, 24)),
        ("flow_grpo_fast", {"window_per_prompt": True}, (240, 72, 24), (240, 72, 24)),
        ("flash_grpo", {}, (160, 8, 8), (160, 8, 8)),
        ("flow_grpo_fast", {"window": 0}, (240, 216, 24), (240, 216, 24)),
        ("grpo_guard", {}, (240, 216, 24), (240, 216, 24)),
        ("dance_grpo", {"timestep_fraction": 1.0}, (181, 169, 12), (192, 180, 12)),
        ("pref_grpo", {}, (193, 106, 8), (200, 112, 8)),
        ("branch_grpo", {}, (203, 187, 16), (203, 218, 16)),
        ("branch_grpo", {"split_steps": [0], "group_size": 2}, (39, 37, 2), (39, 40, 2)),
        ("tree_rpo", {}, (351, 15, 16), (351, 30, 16)),
        ("dense_grpo", {}, (1320, 216, 240), (1536, 216, 240)),
        ("mixgrpo", {}, (289, 37, 12), (300, 48, 12)),
        ("mixgrpo_flash", {}, (121, 37, 12), (132, 48, 12)),
        ("mixgrpo_flash_star", {}, (73, 37, 12), (84, 48, 12)),
        ("tempflow_grpo", {}, (1116, 36, 216), (1116, 216, 216)),
        ("g2rpo", {}, (1496, 8, 192), (1792, 8, 193)),
        ("g2rpo", {"granularities": [1, 2, 3]}, (1700, 8, 288), (2188, 8, 289)),
        ("g2rpo", {"granularities": [1]}, (1112, 8, 96), (1216, 8, 97)),
        ("awm", {}, (336, 144, 24), (336, 144, 24)),
        ("dgpo", {}, (160, 64, 16), (160, 64, 16)),
        ("crd", {}, (240, 216, 24), (240, 216, 24)),
        ("diffusion_nft", {}, (240, 216, 24), (240, 216, 24)),
        ("diffusion_opd", {}, (10, 9, 1), (10, 9, 1)),
    ],
)
def test_what_a_prompt_costs(name, options, ours, released):
    mine, theirs = mean_cost(recipe(name)(**options), sd3_sigmas)
    assert (mine.sample, mine.train, mine.images) == ours
    assert (theirs.sample, theirs.train, theirs.images) == released


def test_a_window_costs_what_its_place_lets_samples_share():
    every = recipe("mixgrpo")(window_iterations=1)
    for start in range(20):
        plan = every.plan(sd3_sigmas, start)
        assert every.window_start(start, 0) == start
        assert plan.cost().sample == start + 1 + 12 * (24 - start)
        assert plan.cost().train == 1 + 12 * 3
        assert drawn_steps(plan)[1] == {(m, start + i) for m in range(12) for i in range(4)}
    for start in range(4):
        branched = recipe("flow_grpo_fast")(branching=True)
        seed = next(s for s in range(99) if branched.window_start(0, s) == start)
        mine, theirs = branched.plan(sd3_sigmas, 0, seed).cost(), branched.released(0, seed)
        assert mine.sample == start + 1 + 24 * (9 - start) and mine.train == 1 + 24
        assert theirs.sample == start + 24 * (10 - start) and theirs.train == 48


def test_flash_takes_less_than_half_of_the_released_calls():
    mine, theirs = mean_cost(recipe("mixgrpo_flash")(window_iterations=1), sd3_sigmas, range(20))
    assert (mine.sample, theirs.sample) == (pytest.approx(90.9), pytest.approx(205.2))
    assert mine.sample <= 0.5 * theirs.sample
    # The paper's own run: 15.6 calls per sample in the released loop ("16 on average").
    mine, theirs = mean_cost(recipe("mixgrpo_flash")(), sd3_sigmas, range(300))
    assert (mine.sample, theirs.sample) == (pytest.approx(99.2), pytest.approx(15.6 * 12))
    mine, theirs = mean_cost(recipe("mixgrpo")(), sd3_sigmas, range(300))
    assert (mine.sample, theirs.sample) == (pytest.approx(228.5), 300)


# ---- the same tree on every rank ----


@pytest.mark.parametrize("name", names())
def test_the_tree_follows_from_iteration_and_seed_alone(name):
    """Unsynchronized windows: released, every rank asked its own generator."""

    def tree(state, iteration=3, seed=5):
        random.seed(state), np.random.seed(state), torch.manual_seed(state)
        options = {"strategy": "random"} if name == "mixgrpo" else {}
        plan = plan_of(name, iteration, seed, **options)
        edges = [node.edge.table.tolist() for node in plan.nodes if node.parent >= 0]
        return [replace(node, edge=None) for node in plan.nodes], edges, plan.groups, plan.points

    assert tree(0) == tree(1)
    by_chance = "flash_grpo", "flow_dppo", "flow_grpo_fast", "dance_grpo", "pref_grpo", "mixgrpo"
    if name in (*by_chance, "awm", "diffusion_nft", "dgpo", "crd"):
        for other in ({"iteration": 4}, {"seed": 6}):
            key, value = next(iter(other.items()))
            assert any(tree(0, **{key: value + i}) != tree(0) for i in range(3)), key


def test_the_random_windows_go_everywhere():
    fast, mixed = recipe("flow_grpo_fast")(), recipe("mixgrpo")(strategy="random")
    assert {fast.window_start(i) for i in range(60)} == {0, 1, 2}
    assert {mixed.window_start(i, 0) for i in range(300)} == set(range(20))
    for i in range(20):
        drawn, trained = drawn_steps(fast.plan(sd3_sigmas, i))
        window = range(start := fast.window_start(i), start + 3)
        assert drawn == trained == {(m, step) for m in range(24) for step in window}
    drawn, trained = drawn_steps(plan_of("flow_grpo_fast", window=0))
    assert drawn == trained == {(m, step) for m in range(24) for step in range(9)}


# ---- plans of a rollout ----


@pytest.mark.parametrize("name", ["flash_grpo", "flow_grpo_fast"])
def test_each_prompt_has_its_own_steps_and_all_samples_of_it_the_same(name):
    options = {"window_per_prompt": True} if name == "flow_grpo_fast" else {}
    made, seen = recipe(name)(**options), []
    size, places, length = made.group_size, *{"flash_grpo": (10, 1)}.get(name, (3, 3))
    for iteration in range(20):
        plans = plans_of(made, sd3_sigmas, iteration, 5)
        assert len(plans) == made.prompts_per_rollout
        first = made.plan(sd3_sigmas, iteration, 5)
        assert drawn_steps(first) == drawn_steps(plans[0])
        for share in (plans[:24], plans[24:]):  # of an update
            assert 1 < len([*groupby(share, id)]) == len({*map(id, share)}), "sampled together"
        for plan in {id(plan): plan for plan in plans}.values():
            drawn, trained = drawn_steps(plan)
            start = min(step for _, step in drawn)
            steps = range(start, start + length)
            assert drawn == trained == {(m, step) for m in range(size) for step in steps}
        seen += [min(plan.nodes[i].depth for i in plan.trained) - 1 for plan in plans]
    count = np.bincount(seen, minlength=places)
    assert len(count) == places, "and no step beyond"
    assert np.abs(count / len(seen) - 1 / places).max() < 4 * (places * len(seen)) ** -0.5


def test_the_rescaling_is_the_released_table():
    """Its ten numbers are of Wan's grid, that of equal steps shifted by 3."""
    table = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    drawn = recipe("flash_grpo")().drawn(partial(shifted_sigmas, shift=3.0))
    weights = [node.weight for i in range(10) for node in drawn(i).nodes if node.is_trained]
    np.testing.assert_allclose(weights[::8], np.array(table) / np.mean(table), rtol=1e-3)
    assert np.mean(weights) == pytest.approx(1, rel=1e-12)
    std = [float(node.edge.std) for i in range(2) for node in drawn(i).nodes if node.is_trained]
    sigma = shifted_sigmas(20, 3.0).tolist()
    expected = [s * sigma[1] * (s - n) ** 0.5 for s, n in pairwise(sigma[:3])]
    np.testing.assert_allclose(std[::8], expected, rtol=1e-12)


@pytest.mark.parametrize("more", [{"group_size": 3}, {"branching": True}, {"window": 2}])
def test_the_plans_of_a_rollout_are_of_one_form(more):
    one, other = recipe("flow_grpo_fast")(group_size=4), recipe("flow_grpo_fast")
    other = other(**{"group_size": 4} | more)

    class Mixed(type(one)):
        def plans(self, *where):
            return [one.plan(*where), other.plan(*where)] * 24

    mixed = Mixed(**{field.name: getattr(one, field.name) for field in fields(one)})
    with pytest.raises(ConfigError, match="^algorithm: plans: have 12, .* choices; expected plans"):
        plans_of(mixed, sd3_sigmas)


# ---- windows ----


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay", "exp_decay"])
@pytest.mark.parametrize("roll_back", [False, True])
@pytest.mark.parametrize("stride", [0, 1, 4])
def test_the_window_is_whole_at_any_iteration(strategy, roll_back, stride):
    """Released, it is cut short from place 20 on, and empty at the end."""
    it = recipe("mixgrpo")(strategy=strategy, roll_back=roll_back, stride=stride)
    starts = [it.window_start(i, 1) for i in range(1500)]
    assert min(starts) >= 0 and max(starts) <= 19
    for start in {*starts}:
        assert len(it.plan(sd3_sigmas, starts.index(start), 1).trained) == 12 * 4
    if strategy != "random":
        assert starts[0] == 0 and (max(starts) == 19 or stride == 0)
        falls = [(a, b) for a, b in pairwise(starts) if b < a]
        assert {*falls} == ({(19, 0)} if roll_back and stride else set())


def test_windows_move_as_the_strategy_says():
    def stays(iterations=2000, **options):
        it = recipe("mixgrpo")(**options)
        starts = [it.window_start(i, 0) for i in range(iterations)]
        moves = [i for i, (a, b) in enumerate(pairwise(starts), start=1) if a != b]
        return [b - a for a, b in pairwise([0, *moves])], starts

    held, starts = stays()
    assert held == [25] * 19 and starts[-1] == 19
    assert stays(stride=4)[1][::25][:7] == [0, 4, 8, 12, 16, 19, 19]
    assert stays(stride=4, roll_back=True)[1][::25][:8] == [0, 4, 8, 12, 16, 19, 0, 4]
    assert set(stays(stride=0)[1]) == {0}
    # tau = max(1, int(10 (1 - c / 23) + c / 23)), and ceil(25 exp(-.1 max(0, c - 13)))
    expected = [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2]
    assert stays(strategy="decay")[0] == expected
    assert stays(strategy="exp_decay")[0] == [25] * 14 + [23, 21, 19, 17, 16]


@pytest.mark.parametrize("ratio", [0.4, 0.2, 0.05, 1.0])
@pytest.mark.parametrize("start", range(20))
def test_the_tail_of_flash_ends_in_an_image(ratio, start):
    """The one-point tail: released, no step was left at L >= 21 (16 at .2), and the image noisy."""
    plan = plan_of("mixgrpo_flash", start, window_iterations=1, tail_ratio=ratio)
    last = start + 3
    points = max(2, int(max((25 - last) * ratio, 1)))
    u = [(1 - (last + 1) / 25) * (1 - i / (points - 1)) for i in range(points)]
    tail = [3 * level / (1 + 2 * level) for level in u]
    for leaf in (0, 11):
        assert path(plan, leaf) == pytest.approx(EVEN_GRID[: last + 1] + tail, abs=1e-12)
        assert path(plan, leaf)[-1] == 0
    after = [node for node in plan.nodes if node.depth > last + 1]
    assert all(node.member is None for node in after)
    # The path's history counts, the predictions made in the window too; to 0 the order is 1.
    orders = {node.edge.num_history for node in after if node.sigma > 0}
    assert orders == ({1} if points > 2 else set())
    assert {node.edge.num_history for node in after if node.sigma == 0} == {0}


def test_a_tail_on_the_models_own_grid():
    grid = sd3_sigmas(25).tolist()
    own = plan_of("mixgrpo_flash", shift=None, tail_ratio=None)
    assert path(own, 0) == grid and own.nodes[-2].edge.num_history == 1
    levels = path(plan_of("mixgrpo_flash", shift=None), 0)[4:]
    assert len(levels) == 8 and levels[-1] == 0
    assert levels == pytest.approx(np.interp(np.linspace(4, 25, 8), range(26), grid))
    plain = plan_of("mixgrpo")
    assert path(plain, 0) == EVEN_GRID
    assert {node.edge.num_history for node in plain.nodes[1:]} == {0}, "Euler"


# ---- whose noise, and what is trained ----


def test_dance_trains_other_steps_of_every_sample():
    plan = plan_of("dance_grpo")
    drawn, trained = drawn_steps(plan)
    assert drawn == {(m, step) for m in range(12) for step in range(15)}, "none to the image"
    chosen = [frozenset(step for m, step in trained if m == member) for member in range(12)]
    assert {len(steps) for steps in chosen} == {9} and len({*chosen}) > 6
    assert drawn_steps(plan_of("dance_grpo", iteration=1))[1] != trained
    assert [node.member for node in plan.nodes if node.parent < 0] == [0]
    roots = plan_of("dance_grpo", init_same_noise=False)
    assert [node.member for node in roots.nodes if node.parent < 0] == list(range(12))
    assert path(plan, 7) == shifted_sigmas(16, 3.0).tolist()
    # The spec's test vectors: i = 0, 9 and 14 of the shifted grid.
    edges = {n.depth - 1: n.edge for n in plan.nodes if n.depth}
    vectors = ((0, (0.999022, -0.021739, 0.044233)), (9, (0.996327, -0.058245, 0.071714)))
    for step, vector in (*vectors, (14, (0.98, -0.147333, 0.109545))):
        edge = edges[step]
        assert (float(edge.a), float(edge.b), float(edge.std)) == pytest.approx(vector, abs=1e-6)
    last = float(shifted_sigmas(16, 3.0)[-2])
    for node in (plan.nodes[i] for i in plan.leaves):  # x0_hat = x - sigma v
        assert (float(node.edge.a), float(node.edge.b), std(node)) == (1, -last, 0)


def test_granularities_walk_the_strided_grids_to_a_clean_prediction():
    t, sizes = shifted_sigmas(16, 3.0), [1, 2, 3]
    plan = plan_of("g2rpo", granularities=sizes)
    for k in range(8):
        for j, size in enumerate(sizes):
            expected = torch.cat([t[: k + 2], t[k + 2 :: size]])
            expected[-1] = 0  # x0_hat of the last evaluated state, where the stride misses 0
            group = [leaf for leaf, tag in enumerate(plan.groups) if tag == k * 3 + j]
            assert len(group) == 12
            for leaf in group:
                assert path(plan, leaf) == expected.tolist()
    below = plan.below()
    assert below.shape == (96, 288) and torch.equal(below.sum(1), torch.full((96,), 3))
    assert not below.sum(0).ne(1).any(), "an image rewards one edge"
    parents = [node.parent for node in plan.nodes]
    for branch in plan.trained:  # t_{k+1} and t_{k+2} are one node for all step sizes
        assert parents.count(branch) == 1
        assert parents.count(parents.index(branch)) == 3
    trunk = {plan.nodes[i].depth: i for i in plan.origins}
    assert sorted(trunk) == list(range(8))
    assert {parents.count(i) for i in plan.origins} == {12, 13}
    assert parents.count(trunk[7]) == 12, "the trunk ends where its last branches begin"


def test_awm_draws_and_matches_where_the_released_code_does():
    plan, grid = plan_of("awm"), sd3_sigmas(14).tolist()
    for node in plan.nodes:
        if node.parent >= 0:
            origin = plan.nodes[node.parent]
            assert (node.member is not None) == (0.3 <= origin.sigma <= 0.9)
            if node.member is None:
                is_first_order = origin.depth == 0 or node.sigma == 0
                assert node.edge.num_history == (0 if is_first_order else 1)
    strata = [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]
    index = [grid.index(sigma) for _, sigma in plan.points]
    assert [leaf for leaf, _ in plan.points] == [leaf for leaf in range(24) for _ in range(6)]
    for i, stratum in enumerate(strata):
        assert set(index[i::6]) == stratum, "over 24 images, each is met"
    assert not any(node.is_trained for node in plan.nodes)
    it = recipe("awm")()
    objective = it.objective(it.guidance(0))
    assert (objective.objective, objective.weighting) == ("awm", "ghuber")
    assert (objective.ema, objective.ema_coef, objective.ref_coef) == ("ema", 1.0, 0.001)
    assert set(objective.anchors) == {"ema", "reference"} and it.sampler is None
    assert [it.copies["ema"](n) for n in (1, 100, 300, 900)] == pytest.approx([1e-3, 0.1, 0.3, 0.3])
    assert recipe("awm")(ref_coef=0.0, ema_coef=0.0).objective(None).anchors == ()
    still = plan_of("awm", noise_level=0.0)
    assert drawn_steps(still)[0] == set()
    index = [grid.index(sigma) for _, sigma in plan_of("awm", from_noise=True).points]
    for i in range(6):
        assert set(index[i::6]) == {2 * i, 2 * i + 1}, "as released for PickScore"


def test_nft_matches_nine_of_ten_levels_of_every_image():
    plan, grid = plan_of("diffusion_nft"), sd3_sigmas(10).tolist()
    left_out = []
    for image in range(24):
        mine = [sigma for leaf, sigma in plan.points if leaf == image]
        assert len(mine) == len({*mine}) == 9 and {*mine} < {*grid[:-1]}
        left_out += {*grid[:-1]} - {*mine}
    assert len({*left_out}) > 5
    orders = [node.edge.num_history for node in plan.nodes[1:11]]
    assert orders == [0, *[1] * 8, 0] and path(plan, 3) == [*grid[:-2], grid[-3] / 2, 0.0]
    released = plan_of("diffusion_nft", last_sigma_ratio=0.0, solver_order=3)
    orders = [node.edge.num_history for node in released.nodes[1:11]]
    assert orders == [0, 1, *[2] * 7, 0] and path(released, 3) == grid
    assert drawn_steps(plan)[0] == set()
    it = recipe("diffusion_nft")()
    objective = it.objective(it.guidance(0))
    assert (objective.objective, objective.old, objective.ref_coef) == ("nft", "old", 1e-4)
    assert it.sampler == "old" and objective.needs_all

    def decay(kind, n, **options):
        return recipe("diffusion_nft")(decay_type=kind, **options).copies["old"](n)

    assert [decay(0, n) for n in (1, 500)] == [0, 0]
    assert [decay(1, n) for n in (1, 100, 900)] == pytest.approx([0.001, 0.1, 0.5])
    assert [decay(2, n) for n in (74, 75, 95, 900)] == pytest.approx([0, 0, 0.15, 0.999])
    assert decay(1, 10, updates_per_rollout=2) == pytest.approx(0.02), "it counts optimizer steps"


def test_a_group_is_matched_at_levels_of_its_own():
    """DGPO's are four of the first seven, CRD's nine of ten; others in each rollout."""
    for name, few, early in (("dgpo", 4, 7), ("crd", 9, 10)):
        grid, seen = sd3_sigmas(10).tolist(), set()
        for iteration in range(20):
            plan = plan_of(name, iteration)
            levels = [sigma for leaf, sigma in plan.points if leaf == 0]
            assert len({*levels}) == few and {*levels} <= {*grid[:early]}
            assert plan.points == [(leaf, s) for leaf in range(len(plan.leaves)) for s in levels]
            seen |= {*levels}
        assert seen == {*grid[:early]}
        for is_one in (False, True):
            noises = plan_of(name, use_shared_noise=is_one).noises
            assert len({*noises}) == (few if is_one else len(noises))
    assert {s for _, s in plan_of("dgpo", trunc_steps=3).points} == {*grid[:4]}
    assert len(plan_of("crd", timestep_fraction=0.5).points) == 24 * 5


def test_what_samples_and_what_a_group_is_held_against():
    dgpo, crd = recipe("dgpo")(), recipe("crd")()
    assert (dgpo.sampler, crd.sampler) == ("old", "sampling")
    assert [dgpo.copies["old"](n) for n in (1, 100, 900)] == pytest.approx([0.001, 0.1, 0.3])
    twice = recipe("dgpo")(updates_per_rollout=2).copies["old"]
    assert twice(10) == pytest.approx(0.02), "it counts optimizer steps"
    assert [crd.copies["old"](n) for n in (0, 10, 900)] == pytest.approx([0.25, 0.3, 0.999])
    still = [crd.copies["sampling"](n) for n in (74, 75, 95, 900)]
    assert still == pytest.approx([0, 0, 0.15, 0.999])
    assert {*dgpo.objective(None).anchors} == {"old", "reference"}
    moving = recipe("dgpo")(use_ema_ref=True, ref_coef=0.0).objective(None)
    assert {*moving.anchors} == {"old"}
    assert {*crd.objective(None).anchors} == {"old", "reference"}


@pytest.mark.parametrize("name", ["awm", "diffusion_nft", "dgpo", "crd"])
def test_a_guided_reference_is_one_call_more(name):
    """Of what is trained, in what is counted; none where nothing pulls to it."""
    plain, guided = (recipe(name)(ref_guidance_scale=scale) for scale in (1.0, 2.5))
    trained = plain.prompts_per_rollout * plan_of(name).cost().train
    cost = plan_of(name).cost()
    counted = [network_calls(it, cost, 3) for it in (plain, guided)]
    assert counted[0][0] == counted[1][0]
    assert sum(counted[1][1]) - sum(counted[0][1]) == trained
    assert recipe("crd")(ref_coef=0.0).objective_at(0).ref_guidance is None


def test_dppo_draws_some_of_the_early_steps():
    for options, few, early in (({}, 3, 5), ({"num_sde_steps": 2, "timestep_fraction": 1.0}, 2, 9)):
        seen = set()
        for iteration in range(60):
            drawn, trained = drawn_steps(plan_of("flow_dppo", iteration, **options))
            steps = {step for _, step in drawn}
            assert drawn == trained == {(m, step) for m in range(16) for step in steps}
            assert len(steps) == few
            seen |= steps
        assert seen == {*range(early)}


def test_a_state_splits_into_as_many_as_there_are():
    """Samples are shared out evenly."""

    def states(**options):
        plan = plan_of("branch_grpo", num_inference_steps=6, split_steps=[0, 3], **options)
        depths = [node.depth for node in plan.nodes]
        return [depths.count(depth) for depth in range(1, 7)]

    assert states(group_size=4) == [2, 2, 2, 4, 4, 4]
    assert states(group_size=9, branch_factor=3) == [3, 3, 3, 9, 9, 9]
    assert states(group_size=5, branch_factor=3) == [3, 3, 3, 5, 5, 5]


def test_a_clip_range_is_for_the_latents_that_it_was_released_for():
    others = {name: getattr(recipe(name), "clip_elements", 65_536) for name in names()}
    others = {name: elements for name, elements in others.items() if elements != 65_536}
    assert others == {"branch_grpo": 90 * 90 * 16, "flash_grpo": 21 * 60 * 104 * 16}


def test_the_window_of_a_tree_slides_as_one_of_mixgrpo_does():
    every = recipe("tree_rpo")(window_iterations=1)
    assert [every.window_start(i) for i in (0, 1, 18, 19, 20, 99)] == [0, 1, 18, 19, 19, 19]
    assert recipe("tree_rpo")().window_start(49) == 1
    assert recipe("tree_rpo")(window_iterations=1, stride=0).window_start(99) == 0
    for start in (0, 5):
        drawn, trained = drawn_steps(every.plan(sd3_sigmas, start))
        assert {step for _, step in drawn} == {*range(start, start + 4)} and drawn == trained
