"""A rollout by blocks of prompts is the same rollout, and takes the memory of one block."""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowkern.rl.algorithms import recipe
from flowkern.rollout import Blocks, Deal, Guidance, Layout, Source, batch, prompt_ids, run
from flowkern.schedules import sd3_sigmas

PROMPTS, ON_POLICY = 8, 5
SMALL = {
    "awm": {"num_inference_steps": 4, "group_size": 2},
    "flow_grpo": {"num_inference_steps": 4, "group_size": 2},
    "tempflow_grpo": {"num_inference_steps": 5, "group_size": 3, "num_seeds": 2},
}


def field(x_t, sigma, prompt, on_host):
    """A velocity without any arithmetic across samples, as a network of bfloat16 gives it."""
    level, shift = (v.view(-1, 1, 1, 1) for v in (sigma, prompt.to(x_t.dtype)))
    return (torch.tanh(x_t * (1 + level)) + 0.1 * shift).bfloat16()


def blocks_of(name, size, shape=(2, 4, 4), prompts=PROMPTS, max_batch=4):
    layout = Layout(recipe(name)(**SMALL[name]).plan(sd3_sigmas))
    source = Source(11, prompt_ids(0, torch.arange(prompts)), shape)
    keep = 0 if layout.plan.points else ON_POLICY

    def walk(layout, part):
        left = max(0, keep - part.first)
        scale = Guidance(2.5, PROMPTS)
        return run(layout, field, part, max_batch, scale, keep_velocity=True, keep_uncond=left)

    return Blocks(walk, source, Deal.one(layout, prompts), size, keep)


@pytest.mark.parametrize("name", SMALL)
def test_blocks_are_the_whole_bit_for_bit(name):
    whole = blocks_of(name, None)
    ((_, leaves),) = whole
    kept = ("latents",) if whole.rollout.plan.points else ("states", "velocity", "uncond")
    for size in (1, 3, PROMPTS, 100):
        parts = blocks_of(name, size)
        first, some = zip(*parts, strict=True)
        assert first == tuple(sum(map(len, some[:i])) for i in range(len(some)))
        assert max(map(len, some)) <= size and torch.equal(torch.cat(some), leaves)
        for key in ("latents", "states", "velocity", "uncond"):
            a, b = (getattr(each.rollout, key) for each in (parts, whole))
            assert (a is None) == (b is None) and (a is not None or key not in kept)
            assert a is None or torch.equal(a, b), key
    if "uncond" in kept:
        assert whole.rollout.uncond.shape[1] == ON_POLICY
        assert whole.rollout.uncond.dtype == torch.bfloat16, "as the network gave it"


@pytest.mark.parametrize("name", SMALL)
def test_what_a_video_leaves_waits_on_the_host(name, monkeypatch):
    """From a number of bytes on, where there is a device; nothing of it is another."""
    whole, ids = blocks_of(name, None), prompt_ids(0, torch.arange(PROMPTS))
    for shape, dtype, waits in (
        ((16, 128, 128), torch.float32, False),  # an image of 1024 x 1024
        ((128, 64, 64), torch.float32, False),  # FLUX.2's
        ((16, 9, 60, 104), torch.float32, True),  # Wan, 33 frames in 480p
        ((16, 9, 60, 104), torch.bfloat16, False),
    ):
        source = Source(11, ids.to("meta"), shape, dtype)
        assert replace(whole, source=source).waits == waits
        assert not replace(whole, source=replace(source, prompt_id=ids)).waits, "it is the host"
    ((_, leaves),) = whole
    monkeypatch.setattr(Blocks, "waits", True)
    hosted = blocks_of(name, None)
    ((_, others),) = hosted
    assert torch.equal(leaves, others) and hosted.rollout.states is not whole.rollout.states
    sites = torch.arange(min(3, whole.rollout.layout.sites))
    advantage = torch.ones(PROMPTS, len(whole.rollout.layout.trained.site))
    asked = sites, torch.arange(len(sites)), advantage
    one, other = (batch(each.rollout, *asked) for each in (whole, hosted))
    for key, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, key)), key


@pytest.mark.parametrize("name", ["flow_grpo", "tempflow_grpo"])
def test_what_is_kept_is_what_the_network_says(name):
    """Of the prompts that are trained on before the weights move, and of no others."""
    parts = blocks_of(name, 3)
    list(parts)
    sites = torch.arange(len(parts.rollout.layout.origins))
    advantage = torch.ones(PROMPTS, len(parts.rollout.plan.trained))
    for prompt in range(PROMPTS):
        where = parts.rollout, sites, torch.full_like(sites, prompt), advantage
        now, later = batch(*where, is_on_policy=True), batch(*where)
        assert now.old_velocity is None and now.x_next is not None and later.uncond is None
        nobody = torch.full_like(now.prompt, PROMPTS)
        asked = (now.x_t, now.sigma)
        uncond = field(*asked, nobody, now.on_host)
        assert now.on_host.sigma == pytest.approx(now.sigma.tolist(), rel=1e-7)
        assert (now.uncond is None) == (prompt >= ON_POLICY)
        assert now.uncond is None or torch.equal(now.uncond, uncond)
        v = field(*asked, now.prompt, now.on_host).float()
        guided = uncond.float() + 2.5 * (v - uncond.float())
        assert torch.equal(later.old_velocity, guided)
        row = torch.arange(len(now.x_t)) if now.row is None else now.row
        c = now.coefficients
        residual = now.x_next - c.a.view(-1, 1, 1, 1) * now.x_t[row]
        noise = (residual - c.b.view(-1, 1, 1, 1) * guided[row]) / c.std.view(-1, 1, 1, 1)
        assert noise.std() == pytest.approx(1, abs=0.2), "drawn from there"


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, counted at every operation: `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                before = self.storages.get(storage._cdata, (None, 0))[1]
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.most += storage.nbytes() - before
        if self.most > self.peak:  # with those that are gone
            live = {key: it for key, it in self.storages.items() if not it[0].expired()}
            self.storages, self.most = live, sum(size for _, size in live.values())
            self.peak = max(self.peak, self.most)
        return out


def test_a_rollout_takes_the_memory_of_one_block():
    """Beside what training needs, which waits on the host where there is a device."""
    shape, peaks = (16, 8, 16), {}
    for size, prompts in ((None, 1), (1, PROMPTS), (None, PROMPTS)):
        blocks = blocks_of("tempflow_grpo", size, shape, prompts, max_batch=4)
        with Live() as live:
            for _, leaves in blocks:
                assert leaves.isfinite().all()
                del leaves
        rollout = blocks.rollout
        kept = sum(x.nbytes for x in (rollout.states, rollout.velocity, rollout.uncond))
        peaks[size, prompts] = live.peak - kept
    one = peaks[None, 1]
    assert one > 10 * 2**13, "a state takes 8 KiB"
    assert peaks[1, PROMPTS] < 1.3 * one and peaks[None, PROMPTS] > 5 * one, peaks
