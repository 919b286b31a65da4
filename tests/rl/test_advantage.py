"""Credit: group statistics against numpy, and how leaves' advantages reach what is trained."""

import numpy as np
import pytest
import torch

from flowkern.rl.advantage import Credit, group_advantage, keep_extremes, zero_std_ratio
from flowkern.rollout import Plan


def rewards_and_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(5).repeat_interleave(8)[torch.randperm(40, generator=generator)] * 7 - 3
    return torch.randn(40, generator=generator) + group, group


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_statistics_are_numpys(global_std, unbiased):
    reward, group = rewards_and_groups()
    actual = group_advantage(reward, group, global_std=global_std, unbiased=unbiased, eps=0.01)
    r, g, expected = reward.double().numpy(), group.numpy(), np.empty(40)
    for key in np.unique(g):
        mine = r[g == key]
        spread = np.std(r if global_std else mine, ddof=int(unbiased))
        expected[g == key] = (mine - mine.mean()) / (spread + 0.01)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-6)
    for key in np.unique(g):
        assert abs(actual[group == int(key)].double().sum()) < 1e-5


def test_equal_rewards_teach_nothing():
    reward = torch.tensor([0.1] * 24 + [0.3, 0.4] + [0.7])
    group = torch.tensor([0] * 24 + [1, 1] + [2])
    for unbiased in (False, True):
        advantage = group_advantage(reward, group, unbiased=unbiased)
        assert not advantage[:24].any(), "not even by rounding"
        assert advantage[-1] == 0, "a group of one"


def test_bad_rewards_are_refused_by_name():
    group = torch.tensor([0, 0, 1])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"reward: got (nan|inf) for sample 2 \(1 of 3"):
            group_advantage(torch.tensor([0.0, 1.0, bad]), group)
    with pytest.raises(ValueError, match=r"group: got shape \(3,\) for reward \(2,\)"):
        group_advantage(torch.zeros(2), group)
    with pytest.raises(TypeError, match=r"group: got torch\.float32, expected integer keys"):
        group_advantage(torch.zeros(3), group.float())


@pytest.mark.parametrize("global_std", [False, True])
def test_trimming_leaves_the_lowest_of_every_group_out_of_the_statistics(global_std):
    reward, group = rewards_and_groups()
    options = {"global_std": global_std, "unbiased": True, "eps": 1e-8}
    actual = group_advantage(reward, group, trimmed_ratio=0.25, **options)
    r, g = reward.double().numpy(), group.numpy()
    kept = {key: np.sort(r[g == key])[2:] for key in np.unique(g)}  # 2 of 8
    everything = np.concatenate([*kept.values()])
    for key, values in kept.items():
        spread = (everything if global_std else values).std(ddof=1)
        expected = (r[g == key] - values.mean()) / (spread + 1e-8)
        np.testing.assert_allclose(actual[group == int(key)].numpy(), expected, rtol=1e-9)
    assert actual.isfinite().all(), "those left out get an advantage all the same"


def test_the_best_and_the_worst_are_kept():
    advantage = torch.tensor([3.0, -1, 0, 2, -4, 1, 5, -5, 7, 6])
    group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    actual = keep_extremes(advantage, group, 2)
    scale = torch.tensor([6 / 2] * 6 + [4 / 2] * 4)
    kept = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 1, 0])
    assert torch.equal(actual, kept * scale)
    assert torch.equal(keep_extremes(advantage[:6], group[:6], 6), torch.ones(6))
    ties = keep_extremes(torch.zeros(6) + 1.5, torch.zeros(6, dtype=torch.int64), 4)
    assert int((ties != 0).sum()) == 4, "as many among equals"
    for count in (3, 6):
        with pytest.raises(ValueError, match=f"best_of: got {count}, .* at most the 4 of a group"):
            keep_extremes(advantage, group, count)


# ---- from leaves to choices ----


def tree() -> Plan:
    """Two trunks, of which each edge leads to two branches: (E, L) = (4, 4) in two groups."""
    plan = Plan()
    for trunk in range(2):
        node = plan.draw(plan.root(trunk), 0.8, "flow_sde", 0.7, trunk, is_trained=True)
        for branch in range(2):
            trains = branch == 0
            end = plan.draw(node, 0.4, "flow_sde", 0.7, 2 * trunk + branch, is_trained=trains)
            plan.leaf(plan.step(end, 0.0), group=branch)
    return plan


def advantages(scores, weights=None, plan=None, **options):
    scores = {name: torch.tensor(score, dtype=torch.float64) for name, score in scores.items()}
    weights = weights or dict.fromkeys(scores, 1.0)
    return Credit(eps=0.0, **options)(scores, weights, plan or tree())


def test_leaves_of_a_group_are_compared_and_edges_sum_what_is_below_them():
    # Leaves 0 and 2 are one group, 1 and 3 the other; edges lead to leaves 0 1, 0, 2 3 and 2.
    scores = {"a": [[1.0, 0, 3, 10], [1, 10, 3, 0]]}
    expected = torch.tensor([[-2.0, -1, 2, 1], [0, -1, 0, 1]])
    assert torch.equal(advantages(scores), expected)
    shares = torch.tensor([2.0, 1, 2, 1])
    assert torch.equal(advantages(scores, over_leaves="mean"), expected / shares)
    alike = {"a": torch.tensor([[5.0, 2, 5, 4]])}
    half = 1 / (1 + 1e-4)
    actual = Credit()(alike, {"a": 1.0}, tree())
    torch.testing.assert_close(actual, torch.tensor([[-half, 0, half, 0]], dtype=torch.float64))


def test_the_limit_comes_after_the_sums_and_the_scale_last():
    scores = {"a": [[1.0, 0, 3, 10]]}
    limited = advantages(scores, limit=1.5, scale=0.5)
    assert torch.equal(limited, torch.tensor([[-0.75, -0.5, 0.75, 0.5]]))


def test_rewards_are_mixed_before_or_after_they_are_compared():
    scores = {"small": [[0.0, 0, 1, 1]], "large": [[100.0, 100, 0, 0]], "watched": [[9.0, 0, 0, 0]]}
    weights = {"small": 3.0, "large": 1.0}
    by_reward = advantages(scores, weights)
    assert torch.equal(by_reward, torch.tensor([[2.0, 1, -2, -1]])), "the large one decides"
    by_advantage = advantages(scores, weights, mix="advantage")
    assert torch.equal(by_advantage, torch.tensor([[-1.0, -0.5, 1, 0.5]])), "3/4 against 1/4"
    summed = advantages(scores, weights, mix="sum", limit=50.0)
    assert torch.equal(summed, 4 * torch.tensor([[-1.0, -0.5, 1, 0.5]]))


def test_points_get_the_advantage_of_their_leaf():
    plan = Plan()
    for member in range(2):
        plan.leaf(plan.step(plan.root(member), 0.0))
    for leaf, sigma in ((1, 0.5), (0, 0.9), (1, 0.2)):
        plan.match(leaf, sigma)
    actual = advantages({"a": [[1.0, 3.0], [3.0, 1.0]]}, plan=plan, scale=0.2)
    expected = torch.tensor([[0.2, -0.2, 0.2], [-0.2, 0.2, -0.2]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected)


def test_a_global_std_spans_groups_and_prompts():
    scores = {"a": [[1.0, 0, 3, 10], [2, 2, 4, 6]]}
    spread = np.std(scores["a"])
    expected = np.array([[-6.0, -1, 6, 1], [-3, -1, 3, 1]]) / spread
    actual = advantages(scores, global_std=True, limit=50.0)
    torch.testing.assert_close(actual, torch.from_numpy(expected))


def test_credit_keeps_the_extremes_of_groups():
    plan = Plan()
    for member in range(4):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    actual = advantages({"a": [[0.0, 1, 2, 3]]}, plan=plan, best_of=2)
    outer = 2 * 1.5 / np.std([0, 1, 2, 3])
    torch.testing.assert_close(actual, torch.tensor([[-outer, 0, 0, outer]], dtype=torch.float64))
    limited = advantages({"a": [[0.0, 1, 2, 3]]}, plan=plan, best_of=2, limit=1.0)
    assert limited.tolist() == [[-2, 0, 0, 2]], "the limit is on the advantage, not on the scale"


def test_groups_without_a_spread_are_counted():
    plan = tree()
    reward = torch.tensor([[1.0, 5, 1, 6], [2, 3, 2, 3], [0.1, 0, 0.2, 1]])
    assert zero_std_ratio(reward, plan) == pytest.approx(3 / 6)


def chain(members: int) -> Plan:
    plan = Plan()
    for member in range(members):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    return plan


@pytest.mark.parametrize("mix", ["reward", "advantage", "sum"])
def test_a_negative_weight_is_a_penalty(mix):
    scores = {"good": [[0.0, 0, 1, 1]], "bad": [[0.0, 1, 2, 3]]}
    alone = advantages(scores, {"bad": -1.0}, plan=chain(4), mix=mix)
    assert alone[0, 0] > alone[0, 1] > alone[0, 3]
    mixed = advantages(scores, {"good": 1.0, "bad": -1.0}, plan=chain(4), mix=mix)
    assert mixed[0, 2] > mixed[0, 3] and torch.isfinite(mixed).all()


def test_trimming_rounds_down_and_never_takes_a_whole_group():
    reward, group = torch.arange(12.0), torch.zeros(12, dtype=torch.int64)
    one_dropped = (reward - reward[1:].mean()) / reward[1:].std(correction=0)
    actual = group_advantage(reward, group, trimmed_ratio=0.1, eps=0.0)
    torch.testing.assert_close(actual, one_dropped.double())
    assert torch.isfinite(group_advantage(reward[:4], group[:4], trimmed_ratio=0.9)).all()


def test_leaves_that_are_kept_speak_for_their_choice():
    # Both images of the first draw's branch are among the extremes of one group only.
    plan = Plan()
    for member in range(4):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        for group in range(2):
            end = plan.step(node, 0.25 / (1 + group))
            plan.leaf(plan.step(end, 0.0), group=group)
    scores = {"a": [[0.0, 1, 1, 0, 2, 3, 3, 2]]}  # leaf 2 m + group
    actual = advantages(scores, plan=plan, best_of=2, limit=50.0)
    by_group = [np.array([0.0, 1, 2, 3]), np.array([1.0, 0, 3, 2])]
    unit = [(r - r.mean()) / r.std() for r in by_group]
    kept = [np.array([1, 0, 0, 1]), np.array([0, 1, 1, 0])]
    expected = 2 * sum(u * k for u, k in zip(unit, kept, strict=True))
    torch.testing.assert_close(actual, torch.from_numpy(expected)[None])
