"""The laws of credit by depth: choices are compared with those of their depth, and a reward that is
missing is as if it had never been."""

import pytest
import torch

from flowkern.rl import DepthCredit, GainCredit
from flowkern.rl.algorithms import recipe
from flowkern.schedules import sd3_sigmas

TREE = recipe("branch_grpo")(num_inference_steps=6, split_steps=[0, 1, 3], group_size=8)
TREE = TREE.plan(sd3_sigmas)
CHAINS = recipe("dense_grpo")(num_inference_steps=4, group_size=3, kl_coef=0.0).plan(sd3_sigmas)
PLANS = {"mean": (DepthCredit(), TREE), "gain": (GainCredit(), CHAINS)}


def rewards(plan, prompts=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(prompts, len(plan.leaves), generator=generator).double()


def by_depth(plan):
    """{depth: which choices}"""
    depth = torch.tensor([plan.nodes[i].depth for i in plan.trained])
    return {int(d): (depth == d).nonzero().flatten() for d in depth.unique()}


@pytest.mark.parametrize("how", PLANS)
def test_the_choices_of_a_depth_sum_to_nothing(how):
    credit, plan = PLANS[how]
    advantage = credit({"toy": rewards(plan)}, {"toy": 1.0}, plan)
    assert advantage.dtype == torch.float64 and len(by_depth(plan)) > 2
    for choices in by_depth(plan).values():
        assert advantage[:, choices].sum(1).abs().max() < 1e-12
        assert advantage[:, choices].std(1, unbiased=False).sub(1).abs().max() < 1e-2


@pytest.mark.parametrize("how", PLANS)
def test_a_scale_and_an_offset_of_a_prompt_change_nothing(how):
    credit, plan = PLANS[how]
    plain, scores = type(credit)(eps=0.0), rewards(plan)
    offset = torch.tensor([[1e6], [-3.0]])
    found = plain({"toy": 2 * scores + offset}, {"toy": 1.0}, plan)
    torch.testing.assert_close(found, plain({"toy": scores}, {"toy": 1.0}, plan), atol=1e-8, rtol=0)


@pytest.mark.parametrize("how", PLANS)
def test_equal_rewards_teach_nothing_whatever_the_least_std_is(how):
    credit, plan = PLANS[how]
    same = torch.full((2, len(plan.leaves)), 0.1, dtype=torch.float64)
    for least in (0.0, 1e-6):
        exact = type(credit)(min_std=least, eps=0.0)
        assert not exact({"toy": same}, {"toy": 1.0}, plan).any()


def test_a_choice_gets_what_its_leaves_are_on_average():
    """Of two halves every choice speaks for its own; of siblings those after the last split."""
    halves = torch.tensor([[1.0] * 4 + [0.0] * 4])
    advantage = DepthCredit(eps=0.0)({"toy": halves}, {"toy": 1.0}, TREE)[0]
    below, depths = TREE.below(), by_depth(TREE)
    assert advantage[depths[1]].tolist() == [1.0, -1.0]
    for choices in depths.values():
        assert advantage[choices].tolist() == [
            1.0 if below[i, 0:4].any() else -1.0 for i in choices
        ]
    siblings = torch.tensor([[1.0, -1.0] * 4])  # they differ after the last split alone
    advantage = DepthCredit(eps=0.0)({"toy": siblings}, {"toy": 1.0}, TREE)[0]
    assert not advantage[depths[1]].any() and not advantage[depths[2]].any()
    assert (advantage[depths[4]].abs() == 1).all()


def test_a_gain_is_the_step_s_own():
    """A sample's second step adds 1, and what follows keeps it: that step alone is praised."""
    scores = torch.zeros(1, 3, 4)
    scores[0, 1, 2:] = 1.0
    advantage = GainCredit(eps=0.0)({"toy": scores.flatten(1)}, {"toy": 1.0}, CHAINS).view(3, 3)
    assert not advantage[:, [0, 2]].any()
    assert advantage[1, 1] > 0 > advantage[0, 1] == advantage[2, 1]


def test_a_leaf_without_a_score_is_as_if_it_had_never_been():
    scores = rewards(TREE)
    scores[0, [1, 6, 7]], scores[1] = torch.nan, torch.nan
    advantage = DepthCredit()({"toy": scores}, {"toy": 1.0}, TREE)
    led = (TREE.below() & ~scores[0].isnan()).any(1)
    assert (~advantage[0].isnan()).tolist() == led.tolist() and advantage[1].isnan().all()
    for choices in by_depth(TREE).values():
        assert advantage[0, choices].nansum().abs() < 1e-12
    scores = rewards(CHAINS)
    scores[0, 5] = torch.nan  # the second sample's, after its first step: two gains are unknown
    lost = GainCredit()({"toy": scores}, {"toy": 1.0}, CHAINS)[0].view(3, 3).isnan()
    assert lost.tolist() == [[False] * 3, [True, True, False], [False] * 3]


def test_rewards_are_mixed_by_value_or_by_advantage():
    scores = {"a": rewards(TREE), "b": 100 * rewards(TREE, 3)[1:]}
    weights, one = (
        {"a": 1.0, "b": 2.0},
        DepthCredit(multi_objective_aggregation="normalize_then_mean"),
    )
    parts = [DepthCredit()(scores, {name: 1.0}, TREE) for name in scores]
    torch.testing.assert_close(one(scores, weights, TREE), (parts[0] + 2 * parts[1]) / 3)
    total = {"sum": scores["a"] + 2 * scores["b"]}
    summed = DepthCredit()(total, {"sum": 1.0}, TREE)
    torch.testing.assert_close(DepthCredit()(scores, weights, TREE), summed)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="best_of, over_leaves: got 2 and 'mean', expected None"):
        DepthCredit(best_of=2)
    with pytest.raises(ValueError, match="got None and 'sum', expected None and 'mean'"):
        GainCredit(over_leaves="sum")
    with pytest.raises(ValueError, match="have no leaf without a draw"):
        GainCredit()({"toy": rewards(TREE)}, {"toy": 1.0}, TREE)
    with pytest.raises(ValueError, match="reward: got inf for sample 3"):
        scores = rewards(CHAINS)
        scores[0, 3] = torch.inf
        GainCredit()({"toy": scores}, {"toy": 1.0}, CHAINS)
