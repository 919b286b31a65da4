"""SGLang's rollout step against its formulas in float64. A stand-in plays its scheduler: the noise
buffer, shards of sequence parallelism and what a session keeps are written after its own.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import published
import pytest
import torch

from flowkern.compat import sglang

SHAPE = (2, 4, 6, 8)


class Scheduler:
    """What the step asks of SchedulerRLMixin."""

    def __init__(self, shard=slice(None)):
        self.shard = shard

    def _get_rollout_session_data(self, batch):
        return batch.session

    def _rollout_variance_noise(self, batch, model_output, generator):
        assert model_output.dtype == torch.float32
        session = batch.session
        session.noise_buffer = torch.cat(
            [torch.randn(1, *SHAPE[1:], generator=g) for g in generator]
        )
        return session.noise_buffer[:, :, self.shard]

    def append_local_rollout_log_probs(self, batch, log_prob_sum, log_prob_count):
        batch.session.log_probs.append((log_prob_sum, log_prob_count))

    def append_local_rollout_debug_tensors(self, batch, **tensors):
        batch.session.debug.append(tensors)


def batch_of(kind, no_const, **more):
    session = SimpleNamespace(
        sigma_max=0.96, latents_shape=SHAPE, noise_buffer=None, log_probs=[], debug=[]
    )
    return SimpleNamespace(
        session=session, rollout_sde_type=kind, rollout_noise_level=0.7,
        rollout_log_prob_no_const=no_const, **more,
    )  # fmt: skip


def generators():
    return [torch.Generator().manual_seed(i) for i in (1, 2)]


def edge(s, n):
    return torch.tensor(s), torch.tensor(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("no_const", [False, True])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_stochastic_step_and_what_is_recorded_of_it(kind, no_const, dtype):
    x, velocity = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    for s, n in (edge(1.0, 0.96), edge(1 - 2e-6, 0.96), edge(0.7, 0.5)):
        batch = batch_of(kind, no_const, rollout_debug_mode=True)
        x_next = sglang.flow_sde_sampling(Scheduler(), batch, velocity, x, s, n, generators())
        noise = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in generators()])
        near = torch.where(s > 1 - 1e-5, 1.0, s).double()  # where they take sigma_max
        how = {"noise": noise, "score": published.gaussian}
        if kind == "cps":
            theirs = published.cps(near, n.double(), velocity, x, 0.7, **how)
        else:
            theirs = published.flow(near, n.double(), velocity, x, 0.7, 0.96, **how)
        expected, _, score, mean, std = theirs
        assert x_next.dtype == torch.float32
        torch.testing.assert_close(x_next.double(), expected, rtol=1e-5, atol=3e-6)
        ((sums, counts),) = batch.session.log_probs
        size = math.prod(SHAPE[1:])
        assert torch.equal(counts, torch.full((2,), float(size))) and counts.dtype == sums.dtype
        if no_const:
            score = -((noise.double() * std) ** 2).flatten(1).mean(1)
        torch.testing.assert_close((sums / counts).double(), score, rtol=1e-5, atol=1e-6)
        (debug,) = batch.session.debug
        assert torch.equal(debug["variance_noise"], noise) and debug["noise_std_dev"].ndim == 0
        torch.testing.assert_close(debug["prev_sample_mean"].double(), mean, rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(debug["noise_std_dev"].double(), std, rtol=1e-6, atol=1e-7)
        assert torch.equal(debug["model_output"], velocity.float())


def test_shards_draw_the_whole_noise_and_record_the_same():
    x, velocity, found, recorded = torch.randn(SHAPE), torch.randn(SHAPE), [], []
    s, n = edge(0.7, 0.5)
    for shard in (slice(None), slice(0, 3), slice(3, 6)):
        batch = batch_of("sde", False)
        local = (t[:, :, shard].contiguous() for t in (velocity, x))
        found.append(sglang.flow_sde_sampling(Scheduler(shard), batch, *local, s, n, generators()))
        recorded += batch.session.log_probs
    assert torch.equal(torch.cat(found[1:], 2), found[0])
    for whole, one, other in zip(*recorded, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ode_step_is_torch_s_bit_for_bit(dtype):
    x, velocity = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    s, n = edge(0.7, 0.5)
    window = {"rollout_sde_step_indices": [2, 3], "_rollout_loop_step_index": 4}
    for batch in (batch_of("ode", True), batch_of("sde", False, **window)):
        batch.rollout_debug_mode = True
        got = sglang.flow_sde_sampling(Scheduler(), batch, velocity, x, s, n, None)
        assert got.dtype == dtype and torch.equal(got, x + (n - s) * velocity)
        sums, counts = batch.session.log_probs[0]
        assert torch.equal(sums, torch.zeros(2)) and counts[0] == math.prod(SHAPE[1:])
        assert batch.session.noise_buffer is None  # nothing is drawn
        debug = batch.session.debug[0]
        assert debug["prev_sample_mean"] is got and not debug["variance_noise"].any()
        assert debug["noise_std_dev"] == 0
    batch._rollout_loop_step_index = 3
    drawn = sglang.flow_sde_sampling(Scheduler(), batch, velocity, x, s, n, generators())
    assert drawn.dtype == torch.float32 and not torch.equal(drawn, got.float())


def test_the_last_step_of_cps_has_no_noise():
    x, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    batch = batch_of("cps", False)
    s, n = edge(0.3, 0.0)
    got = sglang.flow_sde_sampling(Scheduler(), batch, velocity, x, s, n, generators())
    torch.testing.assert_close(got, x - 0.3 * velocity)
    assert torch.equal(batch.session.log_probs[0][0], torch.zeros(2))  # theirs is not finite


def test_what_is_refused():
    x, (s, n) = torch.randn(SHAPE), edge(0.7, 0.5)
    for batch, words in (
        (batch_of("dance", True), "rollout_sde_type: expected 'sde', 'cps' or 'ode', got 'dance'"),
        (batch_of("ode", False), "rollout_log_prob_no_const: an ODE has no density"),
        (batch_of("sde", False), "rollout_noise_level: a density takes a level above 0, got 0"),
    ):
        batch.rollout_noise_level = 0
        with pytest.raises(ValueError, match=words):
            sglang.flow_sde_sampling(Scheduler(), batch, x, x, s, n, generators())


@pytest.mark.parametrize("level", [None, "0.7", float("nan"), -0.1, torch.tensor([0.7, 0.8])])
@pytest.mark.parametrize("no_const", [False, True])
def test_a_level_that_is_no_number(level, no_const):
    batch, x = batch_of("sde", no_const), torch.randn(SHAPE)
    batch.rollout_noise_level = level
    with pytest.raises(ValueError, match="^rollout_noise_level: expected a finite number >= 0"):
        sglang.flow_sde_sampling(Scheduler(), batch, x, x, *edge(0.7, 0.5), generators())


def test_sigmas_of_samples_are_refused():
    batch, x = batch_of("sde", True), torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"^next_sigma: expected one for all samples, .*\(2,\)"):
        sglang.flow_sde_sampling(Scheduler(), batch, x, x, *edge(0.7, [0.5, 0.4]), generators())


def test_latents_of_another_shape_are_said_in_their_words():
    x, (s, n) = torch.randn(SHAPE), edge(0.7, 0.5)
    call = (Scheduler(), batch_of("sde", True), x[:1], x, s, n, generators())
    with pytest.raises(ValueError, match="^model_output: expected shape"):
        sglang.flow_sde_sampling(*call)


def test_install_replaces_the_method_of_the_class(monkeypatch):
    with pytest.raises(ImportError, match="scheduler_rl_mixin: SGLang cannot be imported"):
        sglang.install()
    parts = sglang.MODULE.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match="SchedulerRLMixin: this version of SGLang has none"):
        sglang.install()
    mixin = type("SchedulerRLMixin", (Scheduler,), {})
    monkeypatch.setattr(sys.modules[sglang.MODULE], "SchedulerRLMixin", mixin, raising=False)
    with pytest.raises(ImportError, match="Mixin.flow_sde_sampling: this version of SGLang has no"):
        sglang.install()  # a step of another name would go on as before, and unsaid
    assert not hasattr(mixin, "flow_sde_sampling")
    mixin.flow_sde_sampling = lambda self: "theirs"
    sglang.install()
    sglang.install()
    batch, x = batch_of("sde", True), torch.randn(SHAPE)
    drawn = mixin().flow_sde_sampling(batch, x, x, *edge(0.7, 0.5), generators())
    assert drawn.shape == x.shape and len(batch.session.log_probs) == 1
