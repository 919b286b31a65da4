"""Credit: group statistics against numpy, and the laws they obey."""

import numpy as np
import pytest
import torch

from flowkern.rl.advantage import group_advantage, zero_std_ratio


def rewards_and_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(5).repeat_interleave(8)[torch.randperm(40, generator=generator)] * 7 - 3
    return torch.randn(40, generator=generator) + group, group


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_statistics_are_numpys(global_std, unbiased):
    reward, group = rewards_and_groups()
    actual = group_advantage(
        reward, group, global_std=global_std, unbiased=unbiased, eps=0.01, limit=None
    )
    r, g, expected = reward.double().numpy(), group.numpy(), np.empty(40)
    for key in np.unique(g):
        mine = r[g == key]
        spread = np.std(r if global_std else mine, ddof=int(unbiased))
        expected[g == key] = (mine - mine.mean()) / (spread + 0.01)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-6)
    for key in np.unique(g):
        assert abs(actual[group == int(key)].double().sum()) < 1e-5


def test_limit_cuts_both_ends():
    reward = torch.tensor([0.0] * 50 + [1.0] + [1.0] * 50 + [0.0])
    group = torch.tensor([0] * 51 + [1] * 51)
    assert group_advantage(reward, group, limit=None).abs().max() > 6
    advantage = group_advantage(reward, group, limit=5.0)
    assert advantage.max() == 5 and advantage.min() == -5


def test_equal_rewards_teach_nothing():
    reward = torch.tensor([0.1] * 24 + [0.3, 0.4] + [0.7])
    group = torch.tensor([0] * 24 + [1, 1] + [2])
    for unbiased in (False, True):
        advantage = group_advantage(reward, group, unbiased=unbiased)
        assert torch.equal(advantage[:24], torch.zeros(24)), "not even by rounding"
        assert advantage[-1] == 0, "a group of one"
    assert zero_std_ratio(reward, group) == pytest.approx(2 / 3)


def test_bad_rewards_are_refused_by_name():
    group = torch.tensor([0, 0, 1])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"reward: got (nan|inf) for sample 2 \(1 of 3"):
            group_advantage(torch.tensor([0.0, 1.0, bad]), group)
    with pytest.raises(ValueError, match=r"group: got shape \(3,\) for reward \(2,\)"):
        group_advantage(torch.zeros(2), group)
    with pytest.raises(TypeError, match=r"group: got torch\.float32, expected integer keys"):
        group_advantage(torch.zeros(3), group.float())
