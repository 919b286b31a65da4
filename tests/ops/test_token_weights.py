"""What each token weighs in a loss, and advantages of rollouts of several turns."""

import pytest
import torch

import flowkern as fk
from flowkern.rl.advantage import group_advantage

ROW = torch.tensor([5, 5, 5, 9, 9, 2, 7, 7, 7, 7])
TRAJECTORY = torch.tensor([1, 1, 1, 1, 1, 8, 8, 8, 8, 8])


@pytest.mark.parametrize("agg", ["turn_mean", "seq_mean", "token_mean", "constant"])
@pytest.mark.parametrize("total", [None, 40])
def test_weights_are_a_triple_loop(agg, total):
    if agg == "constant":
        total = 40
    expected = []
    for row, trajectory in zip(ROW.tolist(), TRAJECTORY.tolist(), strict=True):
        mine = TRAJECTORY == trajectory
        turns, length = len(ROW[mine].unique()), int((ROW == row).sum())
        expected.append(
            {
                "turn_mean": 1 / ((total or 2) * turns * length),
                "seq_mean": 1 / ((total or 2) * int(mine.sum())),
                "token_mean": 1 / (total or len(ROW)),
                "constant": 1 / 40,
            }[agg]
        )
    for order in (torch.arange(10), torch.randperm(10)):
        made = fk.token_weights(ROW[order], TRAJECTORY[order], agg, total)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, torch.tensor(expected)[order])


def test_weights_refuse_what_they_cannot_weigh():
    empty = ROW[:0]
    assert fk.token_weights(empty, empty).shape == (0,)
    with pytest.raises(ValueError, match="^row: expected every turn within one trajectory"):
        fk.token_weights(ROW, torch.arange(10))
    with pytest.raises(ValueError, match="^agg: expected one of"):
        fk.token_weights(ROW, TRAJECTORY, "mean")
    with pytest.raises(ValueError, match="^total: needed"):
        fk.token_weights(ROW, TRAJECTORY, "constant")
    with pytest.raises(ValueError, match="^total: expected a number > 0"):
        fk.token_weights(ROW, TRAJECTORY, total=0)
    with pytest.raises(ValueError, match="^trajectory: expected shape"):
        fk.token_weights(ROW, TRAJECTORY[1:])


def test_a_group_by_trajectory_and_by_row():
    """Eight rollouts, two of one turn that succeed, six of three turns that fail."""
    reward, turns = torch.tensor([1.0] * 2 + [0.0] * 6), torch.tensor([1] * 2 + [3] * 6)
    by_trajectory = group_advantage(reward, torch.zeros(8, dtype=torch.long), unbiased=True, eps=0)
    rows = reward.repeat_interleave(turns)
    by_row = group_advantage(rows, torch.zeros(20, dtype=torch.long), unbiased=True, eps=1e-6)
    assert by_trajectory[[0, -1]].tolist() == pytest.approx([1.620, -0.540], abs=1e-3)
    assert by_row[[0, -1]].tolist() == pytest.approx([2.924, -0.325], abs=1e-3)
