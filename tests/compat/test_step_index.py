"""Which step a timestep is: what diffusers' schedulers answer, looked up at once."""

import pytest
import torch

from flowkern.compat._scheduler import step_index

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


def test_a_timestep_that_is_not_there_is_said(scheduler):
    with pytest.raises(ValueError, match=r"timestep: expected one of the scheduler's \[1000.0, .*"):
        step_index(scheduler, torch.tensor([1000.0, 3.0]), CPU)
