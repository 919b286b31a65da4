"""Which step a timestep is: what diffusers' schedulers answer, looked up at once."""

import pytest
import torch

from flowkern.compat import dance_grpo
from flowkern.compat._scheduler import step_index
from flowkern.compat.flow_grpo import sde_step_with_logprob

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture
def scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_the_schedulers(scheduler, dtype):
    timesteps = scheduler.timesteps[[7, 0, 0, 9]]
    found = step_index(scheduler, timesteps.to(dtype), CPU)
    assert found.tolist() == [scheduler.index_for_timestep(t) for t in timesteps] == [7, 0, 0, 9]
    assert step_index(scheduler, scheduler.timesteps[4], CPU).tolist() == [4]


def test_of_equal_timesteps_the_scheduler_has_its_own_choice(scheduler):
    scheduler.timesteps[5] = scheduler.timesteps[4]
    expected = scheduler.index_for_timestep(scheduler.timesteps[4])
    assert step_index(scheduler, scheduler.timesteps[4:5], CPU).tolist() == [expected] == [5]


def test_no_samples_have_no_steps(scheduler):
    """An empty share of a batch is no error."""
    x = torch.empty(0, 2, 3)
    x_next, log_prob, *_ = sde_step_with_logprob(scheduler, x, scheduler.timesteps[:0], x)
    assert x_next.shape == x.shape and log_prob.shape == (0,)


@pytest.mark.parametrize("level", [None, "0.7", torch.ones(2), -1.0])
def test_a_noise_level_that_is_none_is_said_by_its_name(scheduler, level):
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="^noise_level: expected a finite number >= 0, got"):
        sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, noise_level=level)
    with pytest.raises(ValueError, match="^(eta|noise_level): expected a finite number >= 0, got"):
        dance_grpo.flux_step(x, x, level, scheduler.sigmas, 0, None, True, True)


def test_a_noise_level_may_be_a_tensor_of_one(scheduler):
    x = torch.ones(1, 2, 3)
    found, same = (
        sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, level, prev_sample=x)[1]
        for level in (torch.tensor([0.5]), 0.5)
    )
    assert torch.equal(found, same)


def test_a_timestep_that_is_not_there_is_said(scheduler):
    with pytest.raises(ValueError, match=r"timestep: expected one of the scheduler's \[1000.0, .*"):
        step_index(scheduler, torch.tensor([1000.0, 3.0]), CPU)
