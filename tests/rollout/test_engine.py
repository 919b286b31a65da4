"""The rollout engine: its samples are those of the plainest recursion, however they are batched."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.rl.algorithms import recipe
from flowkern.rl.objectives import RatioClip
from flowkern.rollout import (
    Guidance,
    Layout,
    Plan,
    Source,
    batch,
    network_batches,
    prompt_ids,
    run,
)
from flowkern.schedules import sd3_sigmas

SHAPE, SEED, UNCOND = (2, 4, 4), 11, 3
SIGMAS = sd3_sigmas(6).tolist()


def make_tree() -> Plan:
    """Two trunks of order 2; siblings with tails of several orders; edges trained at two depths."""
    plan = Plan()
    for seed in range(2):
        trunk = plan.step(plan.root(seed), SIGMAS[1])
        trunk = plan.step(trunk, SIGMAS[2], order=2)
        for k in range(3):
            member = 3 * seed + k
            node = plan.draw(trunk, SIGMAS[3], "flow_sde", 0.7, member, is_trained=True)
            for sigma in SIGMAS[4:6]:
                last = plan.step(node, sigma, order=3)
                node = last if k else plan.draw(node, sigma, "cps", 0.6, member, is_trained=True)
                if not k:
                    plan.leaf(plan.step(last, 0.0), group=10 + seed)
            plan.leaf(plan.step(node, 0.0), group=seed)
    return plan


def make_source(iteration: int = 0, slots=(0, 1, 2), dtype=torch.float32) -> Source:
    return Source(SEED, prompt_ids(iteration, torch.tensor(slots)), SHAPE, dtype)


def field(x_t, sigma, prompt, on_host=None):
    """A velocity without any arithmetic across samples."""
    level, shift = (v.view(-1, 1, 1, 1) for v in (sigma, prompt.to(x_t.dtype)))
    return torch.tanh(x_t * (1 + level)) + 0.1 * shift


class Plain:
    """One state at a time, from its own noise on, each worked out once: nothing is batched."""

    def __init__(self, plan, source, scale, guide=None):
        self.plan, self.source, self.scale, self.guide = plan, source, scale, guide
        self.velocity, self.state = cache(self.velocity), cache(self.state)

    def noise(self, prompt, member, step, stream):
        one, key = (1, *SHAPE), self.source.prompt_id[prompt : prompt + 1] + member
        return fk.philox_normal(one, SEED, key, step, stream).double()

    def velocity(self, node, prompt):
        x, sigma = (
            self.state(node, prompt),
            torch.tensor([self.plan.nodes[node].sigma], dtype=torch.float64),
        )
        uncond, v = (field(x, sigma, torch.tensor([p])) for p in (UNCOND, prompt))
        if self.guide is not None:
            return self.guide(v, uncond, self.scale, sigma)
        return uncond + self.scale * (v - uncond)

    def clean(self, node, prompt):
        sigma = self.plan.nodes[node].sigma
        return self.state(node, prompt) - sigma * self.velocity(node, prompt)

    def state(self, node, prompt):
        it = self.plan.nodes[node]
        if it.parent < 0:
            return self.noise(prompt, it.member, 0, "init")
        c, before = it.edge, self.plan.nodes[it.parent]
        x = c.a * self.state(it.parent, prompt) + c.b * self.velocity(it.parent, prompt)
        earlier = it.parent
        for weight in c.history[: c.num_history]:
            earlier = self.plan.nodes[earlier].parent
            x = x + weight * self.clean(earlier, prompt)
        if it.member is not None:
            x = x + c.std * self.noise(prompt, it.member, before.depth, "step")
        return x


def of_two_scales(v, uncond, scale, sigma):
    """As a family of two networks has it."""
    w = torch.where(sigma > 0.5, scale, scale - 1)
    return uncond + w.view(-1, *[1] * (v.ndim - 1)) * (v - uncond)


@pytest.mark.parametrize("guide", [None, of_two_scales])
def test_the_engine_is_the_plain_recursion_in_float64(guide):
    plan, source, scale = make_tree(), make_source(dtype=torch.float64), 2.5
    guidance = Guidance(scale, UNCOND, guide)
    rollout = run(plan, field, source, max_batch=7, guidance=guidance, keep_velocity=True)
    plain, near = Plain(plan, source, scale, guide), {"rtol": 0, "atol": 1e-10}
    assert not rollout.is_redrawn, "only float32 states can be drawn again"
    for prompt in range(3):
        for node, position in plan.leaves.items():
            expected = plain.state(node, prompt)[0]
            torch.testing.assert_close(rollout.latents[prompt, position], expected, **near)
    advantage = torch.randn(3, len(plan.trained))
    site, prompt = (g.flatten() for g in torch.meshgrid(
        torch.arange(len(plan.origins)), torch.arange(3), indexing="ij"))  # fmt: skip
    trained = batch(rollout, site, prompt, advantage)
    assert len(trained.x_t) == len(site) and len(trained.x_next) == advantage.numel()
    for i in range(len(site)):
        node = plan.origins[site[i]]
        torch.testing.assert_close(trained.x_t[i], plain.state(node, int(prompt[i]))[0], **near)
        velocity = plain.velocity(node, int(prompt[i]))[0]
        torch.testing.assert_close(trained.old_velocity[i], velocity, **near)
        assert trained.sigma[i] == plan.nodes[node].sigma and trained.prompt[i] == prompt[i]
    seen = set()
    for j, i in enumerate(trained.row.tolist()):
        x_next, where = trained.x_next[j], int(prompt[i])
        for e, node in enumerate(plan.trained):
            if torch.allclose(x_next, plain.state(node, where)[0], rtol=0, atol=1e-10):
                it = plan.nodes[node]
                assert (
                    it.parent == plan.origins[site[i]] and rollout.layout.trained.site[e] == site[i]
                )
                assert trained.advantage[j] == advantage[where, e]
                assert torch.equal(trained.coefficients.table[j], it.edge.table)
                assert trained.key["sample_id"][j] == source.prompt_id[where] + it.member
                assert trained.key["step"][j] == it.depth - 1
                seen.add((where, e))
    assert len(seen) == advantage.numel(), "every trained edge of every prompt, once"


@pytest.mark.parametrize("guidance", [None, Guidance(3.0, UNCOND)])
def test_samples_depend_on_neither_max_batch_nor_the_rank(guidance):
    plan, per_node = make_tree(), 1 if guidance is None else 2

    def walk(slots, max_batch):
        calls, slot = [], torch.tensor([*slots, *[-1] * UNCOND])  # -1: without a prompt

        def counted(x_t, sigma, prompt, on_host):
            assert torch.equal(sigma, torch.tensor(on_host.sigma, dtype=sigma.dtype))
            assert prompt.tolist() == on_host.prompt
            calls.append(len(x_t))
            return field(x_t, sigma, slot[prompt])

        source = make_source(slots=slots)
        return run(plan, counted, source, max_batch, guidance, keep_velocity=True), calls

    whole, calls = walk((0, 1, 2), 1000)
    asked = 3 * per_node * plan.cost().sample
    assert len(calls) == 6 and sum(calls) == asked, "one batch a depth, one call a node"
    for max_batch in (2, 5, 8):
        parts, calls = walk((0, 1, 2), max_batch)
        assert max(calls) <= max_batch and sum(calls) == asked
        for name in ("latents", "states", "velocity"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    ranks = [walk(slots, 5)[0] for slots in ((0,), (1, 2))]
    for name, axis in (("latents", 0), ("states", 1), ("velocity", 1)):
        joined = torch.cat([getattr(rank, name) for rank in ranks], axis)
        assert torch.equal(joined, getattr(whole, name)), name


def test_another_iteration_draws_other_noise():
    first, second = (run(make_tree(), field, make_source(i), 100).latents for i in (0, 1))
    assert (first - second).abs().flatten(2).amax(2).min() > 0.1


def test_only_what_training_needs_is_kept():
    plan = make_tree()
    rollout = run(plan, field, make_source(), 100)
    assert set(rollout.kept) == {*plan.origins, *plan.trained} and not rollout.is_redrawn
    assert rollout.velocity is None and len(rollout.states) == len(rollout.kept)
    plan = Plan()
    root = plan.root(0)
    for member in range(4):
        plan.leaf(plan.step(plan.draw(root, 0.5, "cps", 0.7, member, is_trained=True), 0.0))
    siblings = run(plan, field, make_source(), 100)
    assert siblings.is_redrawn and siblings.states.shape == siblings.velocity.shape
    assert siblings.states.shape == (1, 3, *SHAPE), "one state and one velocity for four siblings"
    nothing = Plan()
    nothing.leaf(nothing.step(nothing.root(0), 0.0))
    assert run(nothing, field, make_source(), 100).states.numel() == 0


def test_calls_of_training_are_as_many_on_every_rank_and_leave_out_what_teaches_nothing():
    plan = make_tree()
    advantage = torch.zeros(2, 3, len(plan.trained))
    every = [network_batches(Layout(plan), advantage, rank, 4, needs_all=True) for rank in (0, 1)]
    sites = len(plan.origins)
    for calls in every:
        pairs = {pair for rows in calls for pair in zip(*(r.tolist() for r in rows), strict=True)}
        assert pairs == {(s, p) for s in range(sites) for p in range(3)}
        assert max(len(site) for site, _ in calls) <= 4
    nothing = [
        network_batches(Layout(plan), advantage, rank, 4, needs_all=False) for rank in (0, 1)
    ]
    assert [len(calls) for calls in nothing] == [1, 1], "momentum and gradient averages go on"
    advantage[1, 2] = 1.0  # one prompt of the second rank
    first, second = (
        network_batches(Layout(plan), advantage, rank, 1, needs_all=False) for rank in (0, 1)
    )
    assert len(first) == len(second) == sites
    assert all(int(prompt) == 2 for _, prompt in second)


def test_ids_never_collide():
    slots = torch.arange(50)
    ids = [prompt_ids(i, slots) for i in (0, 1, 2**24 - 1)]
    ids.append(prompt_ids(1, torch.arange(2**16 - 50, 2**16)))
    ids = (torch.cat(ids)[:, None] + torch.tensor([0, 1, 2**23 - 1])).flatten()
    assert len(ids.unique()) == len(ids) and ids.min() >= 0
    for arguments, name in (((2**24, slots), "iteration"), ((0, torch.tensor([2**16])), "slots")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            prompt_ids(*arguments)


def test_too_small_a_batch_is_refused():
    for guidance, least in ((None, 1), (Guidance(2.0, UNCOND), 2)):
        with pytest.raises(ValueError, match=f"max_batch: got {least - 1}, expected at least"):
            run(make_tree(), field, make_source(), least - 1, guidance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_are_kept_in_the_precision_of_the_step(dtype):
    """Rounded to the dtype of the states they would move the ratio by more than a clip range."""
    source, guidance = make_source(dtype=dtype), Guidance(2.5, UNCOND)
    rollout = run(make_tree(), field, source, 7, guidance, keep_velocity=True)
    assert rollout.states.dtype == dtype and rollout.velocity.dtype == torch.float32
    assert not torch.equal(rollout.velocity, rollout.velocity.to(dtype).float())
    trained = batch(rollout, torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3, 8))
    assert trained.sigma.dtype == trained.advantage.dtype == torch.float32


@pytest.mark.parametrize("max_batch", [1000, 7])
def test_nothing_of_a_rollout_or_of_its_loss_is_read_on_the_host(max_batch):
    """A device that keeps no values stands in for one that is waited for: what reads it raises."""
    plan, scale, on_host = make_tree(), Guidance(2.5, UNCOND), make_source()
    source = replace(on_host, prompt_id=on_host.prompt_id.to("meta"))
    rollout = run(plan, field, source, max_batch, guidance=scale, keep_velocity=True)
    weight = torch.ones((), device="meta", requires_grad=True)
    objective = RatioClip(1e-2, 1e-2, kl_coef=0.1, guidance=scale)
    advantage = torch.linspace(-1, 1, 3 * len(plan.trained)).view(1, 3, -1)
    for site, prompt in network_batches(Layout(plan), advantage, 0, max_batch, needs_all=True):
        trained = batch(rollout, site, prompt, advantage[0])
        out = objective(trained, lambda *x: weight * field(*x), {"reference": field})
        out.loss.backward()
    with pytest.raises(RuntimeError):
        rollout.latents.flatten()[0].item()


class Copies(TorchDispatchMode):
    """How many operations take something from the host to a device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        is_there = isinstance(out, torch.Tensor) and out.is_meta
        self.count += is_there and any(isinstance(x, torch.Tensor) and x.is_cpu for x in arguments)
        return out


@pytest.mark.parametrize("name", ["flow_grpo", "awm"])
def test_tables_are_moved_once_per_rollout_and_places_once_per_batch(name):
    """In two copies, for all waves and blocks; they were four a wave, and seven to thirteen a
    batch."""
    on_host, options = make_source(), {"num_inference_steps": 4, "group_size": 3}
    layout = Layout(recipe(name)(**options).plan(sd3_sigmas))
    source = replace(on_host, prompt_id=on_host.prompt_id.to("meta"))
    with Copies() as copies:
        for block, count in ((slice(0, 1), 2), (slice(1, 3), 0)):
            copies.count = 0
            run(layout, field, source.block(block), 3, Guidance(2.5, UNCOND), keep_velocity=True)
            assert copies.count == count
    rollout = run(layout, field, source, 3, keep_velocity=True)
    advantage = torch.ones(3, len(layout.trained.site))
    with Copies() as copies:
        batch(rollout, torch.arange(2), torch.arange(2), advantage)
        assert copies.count == 2
