"""The laws of a plan: what it refuses, what it costs, and that its samples are its own."""

import random

import pytest
import torch

from flowkern.rl.algorithms import names, recipe
from flowkern.rollout import Cost, Guidance, Layout, Plan, Source, network_batches, prompt_ids, run
from flowkern.schedules import edge_coefficients, multistep_coefficients, sd3_sigmas

SHAPE, PROMPTS = (2, 4, 4), 3
SMALL = {"num_inference_steps": 6, "group_size": 3, "branch_steps": 3, "num_seeds": 2}
SMALL |= {"split_steps": [0, 2]}
FORMS = [
    *((name, {}) for name in names()),
    ("flow_grpo", {"sde_type": "cps"}),
    ("flow_grpo_fast", {"branching": True}),
    ("flow_grpo_fast", {"window": 0}),
    ("dance_grpo", {"init_same_noise": False}),
    ("mixgrpo", {"strategy": "random", "init_same_noise": False}),
    ("mixgrpo_flash", {"tail_order": 3, "tail_ratio": 1.0}),
    ("g2rpo", {"granularities": [1, 2, 3], "num_inference_steps": 10, "shift": None}),
]


def small(name, options, iteration=0):
    """The plan of a recipe at a small size."""
    kind = recipe(name)
    sizes = {key: value for key, value in SMALL.items() if key in kind.__dataclass_fields__}
    return kind(**sizes | options).plan(sd3_sigmas, iteration, seed=4)


def field(x_t, sigma, prompt, on_host=None):
    """A velocity without any arithmetic across samples."""
    level, shift = (v.view(-1, 1, 1, 1) for v in (sigma, prompt.to(x_t.dtype)))
    return torch.tanh(x_t * (1 + level)) + 0.1 * shift


def walk(plan, max_batch=1000, slots=range(PROMPTS), guidance=None):
    """A rollout, and how many network calls its batches had; a prompt is told apart by its slot."""
    calls, slots = [], torch.tensor(slots)
    asked = torch.cat([slots, torch.tensor([-1])])

    def counted(x_t, sigma, prompt, on_host):
        calls.append(len(x_t))
        return field(x_t, sigma, asked[prompt])

    source = Source(11, prompt_ids(2, slots), SHAPE)
    return run(plan, counted, source, max_batch, guidance, keep_velocity=True), calls


# ---- what a plan refuses ----


def test_a_noise_is_drawn_once():
    plan = Plan()
    root = plan.root(0)
    with pytest.raises(ValueError, match="member: 0 draws noise at depth -1 already"):
        plan.root(0)
    node = plan.draw(root, 0.5, "flow_sde", 0.7, 0)
    with pytest.raises(ValueError, match="member: 0 draws noise at depth 0 already"):
        plan.draw(root, 0.4, "flow_sde", 0.7, 0)
    plan.draw(root, 0.5, "flow_sde", 0.7, 1)  # another member, and another depth
    plan.draw(node, 0.2, "flow_sde", 0.7, 0)
    assert len(plan.nodes) == 4, "what was refused left nothing behind"


def test_a_trained_edge_has_a_ratio_and_what_its_kl_needs():
    plan = Plan()
    root = plan.root(0)
    with pytest.raises(ValueError, match=r"is_trained: the edge from sigma 1\.0 to 0\.0 has k = 0"):
        plan.draw(root, 0.0, "dpm_sde", 0.0, 0, is_trained=True)
    plan.leaf(plan.draw(root, 0.0, "dpm_sde", 0.0, 0))  # not trained, it may stay
    plan.leaf(plan.draw(root, 0.0, "cps", 0.8, 1, is_trained=True))  # CPS keeps k = 1 at std = 0
    plan.check()
    plan = Plan(needs_std=True)
    with pytest.raises(
        ValueError, match=r"needs_std: the trained edge from sigma 1\.0 to 0\.0 has"
    ):
        plan.draw(plan.root(0), 0.0, "cps", 0.8, 0, is_trained=True)


def test_a_leaf_is_clean_and_one():
    plan = Plan()
    node = plan.step(plan.root(0), 0.5)
    with pytest.raises(ValueError, match=r"node: a leaf is clean, got one at sigma 0\.5"):
        plan.leaf(node)
    node = plan.step(node, 0.0)
    assert plan.leaf(node) == 0
    with pytest.raises(ValueError, match="node: 2 is a leaf already"):
        plan.leaf(node)
    for sigma in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sigma: expected a noise level in"):
            plan.match(0, sigma)


def test_points_of_a_group_lie_in_one_batch_and_may_share_a_noise():
    plan, shared = Plan(), {}
    for member in range(3):
        leaf = plan.leaf(plan.step(plan.root(member), 0.0), group=0 if member < 2 else 7)
        for sigma in (0.9, 0.4):
            point = plan.match(leaf, sigma, noise_of=shared.get(sigma))
            shared.setdefault(sigma, point)
    assert plan.noises == [(0, 0), (0, 1)] * 3
    with pytest.raises(ValueError, match=r"noise_of: got 6, expected the number of one of 6"):
        plan.match(0, 0.5, noise_of=6)
    layout = Layout(plan)
    assert layout.trained.unit.tolist() == [0, 1, 0, 1, 2, 3]
    advantage = torch.ones(1, 2, 6)
    advantage[0, 1, 2] = 0.0  # of the second prompt, one is left of two
    parts = network_batches(layout, advantage, 0, 2, needs_all=False, whole=True)
    found = sorted((int(prompt[0]), site.tolist()) for site, prompt in parts)
    alone = [[4], [5]]
    assert found == sorted(
        [(0, x) for x in [[0, 2], [1, 3], *alone]] + [(1, x) for x in [[0], [1, 3], *alone]]
    )
    with pytest.raises(ValueError, match="max_batch: got 1, expected at least 2, a whole group"):
        network_batches(layout, advantage, 0, 1, needs_all=False, whole=True)


def test_a_tree_ends_in_leaves_and_trains_one_way():
    with pytest.raises(ValueError, match=r"nothing leaves nodes \[0\], and they are no leaves"):
        plan = Plan()
        plan.root(0)
        plan.check()
    with pytest.raises(ValueError, match="plan: nothing leaves"):
        Plan().check()
    plan = Plan()
    root = plan.root(0)
    plan.leaf(plan.step(root, 0.0))
    dead = plan.draw(root, 0.5, "flow_sde", 0.7, 0, is_trained=True)
    with pytest.raises(ValueError, match=rf"nothing leaves nodes \[{dead}\]"):
        plan.check()
    with pytest.raises(ValueError, match="nothing leaves"):
        walk(plan)
    plan.leaf(plan.step(dead, 0.0))
    plan.check()
    plan.match(0, 0.5)
    with pytest.raises(ValueError, match="has points to match and trained edges"):
        plan.check()


def test_noise_levels_fall():
    plan = Plan()
    node = plan.step(plan.root(0), 0.5)
    for wrong in (0.5, 0.7):
        with pytest.raises(ValueError, match="sigma_next: expected values below sigma"):
            plan.step(node, wrong)
        with pytest.raises(ValueError, match="sigma_next: expected values below sigma"):
            plan.draw(node, wrong, "flow_sde", 0.7, 0)


# ---- what follows from a tree ----


def test_edges_know_the_leaves_below_them():
    plan = Plan()
    root = plan.root(0)
    trunk = plan.draw(root, 0.8, "flow_sde", 0.7, 0, is_trained=True)
    left, right = (plan.draw(trunk, 0.5, "cps", 0.5, m, is_trained=m == 1) for m in (0, 1))
    for node in (right, left, right, trunk):
        plan.leaf(plan.step(node, 0.0))
    assert plan.trained == [trunk, right] and plan.origins == [root, trunk]
    expected = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    assert torch.equal(plan.below(), expected)
    assert plan.cost() == Cost(4, 2, 4), "a node is called once, however many edges leave it"


def test_edges_are_those_of_the_schedules_with_the_history_of_the_path():
    plan, path = Plan(), [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]
    node = plan.draw(plan.root(0), path[1], "flow_sde", 0.7, 0)
    drawn = edge_coefficients(1.0, 0.9, "flow_sde", 0.7)
    assert torch.equal(plan.nodes[node].edge.table, drawn.table)
    for i, sigma in enumerate(path[2:], start=2):
        node = plan.step(node, sigma, order=3)
        expected = multistep_coefficients(path[max(0, i - 3) : i + 1], 3)
        assert torch.equal(plan.nodes[node].edge.table, expected.table)
        assert plan.nodes[node].edge.num_history == (0 if sigma == 0 else min(i - 1, 2))


# ---- the network is called as often as the plan says ----


@pytest.mark.parametrize("name, options", FORMS)
def test_the_cost_is_what_the_network_counts(name, options):
    plan = small(name, options, iteration=30)
    plan.check()
    cost = plan.cost()
    rollout, calls = walk(plan)
    assert sum(calls) == PROMPTS * cost.sample
    assert len(calls) == max(node.depth for node in plan.nodes), "what is ready runs together"
    assert rollout.latents.shape == (PROMPTS, cost.images, *SHAPE)
    assert rollout.latents.isfinite().all()
    assert sum(walk(plan, guidance=Guidance(2.0, PROMPTS))[1]) == 2 * PROMPTS * cost.sample
    advantage = torch.ones(1, PROMPTS, len(plan.points or plan.trained))
    trained = network_batches(Layout(plan), advantage, 0, 5, needs_all=False)
    assert sum(len(site) for site, _ in trained) == PROMPTS * cost.train


def random_plan(seed):
    """A tree of any shape: draws and steps of any order, branches and leaves anywhere."""
    chance, plan = random.Random(seed), Plan()
    kinds = ("flow_sde", "dance_sde", "cps", "dpm_sde")
    open_ends = [plan.root(member) for member in range(2)]
    members = 2
    while open_ends:
        node = open_ends.pop(chance.randrange(len(open_ends)))
        for _ in range(chance.choice([1, 1, 2, 3]) if len(plan.nodes) < 40 else 1):
            sigma = plan.nodes[node].sigma * chance.uniform(0.3, 0.9)
            is_last = plan.nodes[node].depth > 4 or len(plan.nodes) > 60
            if is_last or chance.random() < 0.1:
                plan.leaf(plan.step(node, 0.0, order=2))
            elif chance.random() < 0.5:
                open_ends.append(plan.step(node, sigma, order=chance.choice([1, 2, 3])))
            else:
                kind = chance.choice(kinds)
                open_ends.append(plan.draw(node, sigma, kind, 0.5, members, kind != "dpm_sde"))
                members += 1
    return plan


@pytest.mark.parametrize("seed", range(8))
def test_any_tree_costs_a_call_per_node_and_is_the_same_in_any_batches(seed):
    plan = random_plan(seed)
    whole, calls = walk(plan)
    leaves = set(plan.leaves)
    assert sum(calls) == PROMPTS * plan.cost().sample
    assert plan.cost().sample == len(plan.nodes) - len(leaves)
    check_parts(plan, whole, max_batches=(1, 7))


@pytest.mark.parametrize("name, options", FORMS)
def test_samples_depend_on_neither_max_batch_nor_the_rank(name, options):
    plan = small(name, options, iteration=30)
    check_parts(plan, walk(plan)[0], max_batches=(5,))


def check_parts(plan, whole, max_batches):
    for max_batch in max_batches:
        parts, calls = walk(plan, max_batch)
        assert max(calls) <= max_batch
        for key in ("latents", "states", "velocity"):
            assert torch.equal(getattr(parts, key), getattr(whole, key)), key
    ranks = [walk(plan, 5, slots)[0] for slots in ((0,), (1, 2))]
    assert torch.equal(torch.cat([rank.latents for rank in ranks]), whole.latents)
    for key in ("states", "velocity"):
        joined = torch.cat([getattr(rank, key) for rank in ranks], 1)
        assert torch.equal(joined, getattr(whole, key)), key


@pytest.mark.parametrize("name, options", FORMS)
def test_no_two_samples_are_alike(name, options):
    """Those that share their noise part where the plan says."""
    latents = walk(small(name, options))[0].latents.flatten(0, 1).flatten(1)
    distance = (latents[:, None] - latents).abs().amax(2)
    assert distance[~torch.eye(len(latents), dtype=torch.bool)].min() > 1e-4
