"""Credit: group statistics against numpy, and how leaves' advantages reach what is trained."""

import typing
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkern.rl.advantage import Credit, group_advantage, keep_extremes
from flowkern.rl.algorithms import names, recipe
from flowkern.rl.recipe import RewardAggregation
from flowkern.rl.win_rate import win_rates
from flowkern.rollout import Plan
from flowkern.schedules import sd3_sigmas

tensor = partial(torch.tensor, dtype=torch.float64)


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


def test_undivided_advantages_are_differences():
    """Also where the std of all would divide; equal ones are exactly 0, and all are clamped."""
    reward, group = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0]), torch.tensor([0, 0, 0, 1, 1])
    for global_std in (False, True):
        how = {"global_std": global_std, "scale_rewards": False}
        assert group_advantage(reward, group, **how).tolist() == [-2, -1, 3, 0, 0]
    plan = Plan()
    for member in range(3):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    credit = Credit(scale_rewards=False, limit=2.5, scale=0.1)
    found = credit({"toy": reward[None, :3]}, {"toy": 1.0}, plan)
    assert found.tolist() == [[-0.2, -0.1, 0.25]]


def test_win_rates_are_over_those_that_can_be_met():
    """Of the group, with a score: ties count half, also those that only rounding tells apart."""
    plan = Plan()
    for member, tag in enumerate((0, 0, 0, 0, 1, 1, 2)):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0), group=tag)
    nan = float("nan")
    score = tensor([[3.0, 1.0, 1.0 + 1e-9, nan, 5.0, 9.0, 2.0]])
    (found,) = win_rates({"toy": score}, plan, 1e-6).values()
    wanted = tensor([[1.0, 0.25, 0.25, nan, 0.0, 1.0, 0.5]])
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))
    also = torch.where(torch.arange(7) == 0, nan, 1.0)[None].double()  # what lacks one is not there
    (found, _) = win_rates({"toy": score, "other": also}, plan).values()
    wanted = tensor([[nan, 0.0, 1.0, nan, 0.0, 1.0, 0.5]])
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))


OPTIONS = [
    {"global_std": whole, "unbiased": unbiased, "eps": eps, "trimmed_ratio": trimmed}
    for whole in (False, True)
    for unbiased in (False, True)
    for eps, trimmed in ((0.0, 0.0), (1e-8, 0.25), (1e-4, 0.0))
]


@pytest.mark.parametrize("level", [0.1, -7.0, 1e6 + 0.1, 1e30, -1e150, 2**53 - 1])
def test_equal_rewards_teach_nothing_whatever_they_are(level):
    """Not even by rounding, of huge ones, beside others that differ, or one by one."""
    equal = torch.full((24,), level, dtype=torch.float64)
    beside = torch.cat([equal, torch.tensor([0.3, 0.4]), torch.tensor([0.7])])
    group = torch.tensor([0] * 24 + [1, 1] + [2])
    for options in OPTIONS:
        for group_of_equals in (group[:24], torch.arange(24) // 5, torch.arange(24)):
            assert not group_advantage(equal, group_of_equals, **options).any()
        advantage = group_advantage(beside, group, **options)
        assert not advantage[:24].any() and not advantage[26:].any()
        if not options["global_std"]:
            assert advantage[24:26].isfinite().all() and advantage[24:26].any()
    rounded = 0.7 + 9e-7 * torch.linspace(-1, 1, 24).double()
    for options in OPTIONS:
        assert not group_advantage(rounded, group[:24], **options).any()
        assert group_advantage(rounded, group[:24], min_std=0.0, **options).any()


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(OPTIONS),
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 3)), min_size=1, max_size=24),
    st.integers(-(2**40), 2**40),
    st.integers(-4, 20),
    st.randoms(use_true_random=False),
)
def test_credit_looks_at_differences_within_groups(options, pairs, shift, power, chance):
    reward, group = (torch.tensor(each) for each in zip(*pairs, strict=True))
    own = shift * (1 + group)  # every group its own level; one of all, where the std is of all
    level = torch.full_like(own, shift) if options["global_std"] else own
    actual = group_advantage(reward, group, **options)
    assert actual.dtype == torch.float64 and actual.isfinite().all()
    assert torch.equal(group_advantage(reward + level, group, **options), actual)
    assert torch.equal(group_advantage((reward + level).double(), group, **options), actual)
    scaled = options | {"eps": options["eps"] * 2.0**power}
    assert torch.equal(group_advantage(reward * 2.0**power, group, **scaled), actual)
    order = list(range(len(pairs)))
    chance.shuffle(order)
    moved = group_advantage(reward[order], group[order], **options)
    torch.testing.assert_close(moved, actual[order], rtol=1e-12, atol=1e-12)
    for key in group.unique():
        mine = group == key
        if options["trimmed_ratio"] == 0:
            assert abs(actual[mine].sum()) < 1e-9
            assert bool(actual[mine].any()) == (len(reward[mine].unique()) > 1)
        assert (reward[mine][:, None] < reward[mine]).logical_and(
            actual[mine][:, None] > actual[mine]
        ).sum() == 0, "a better sample never gets less"


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "float16", "float64"])
def test_rewards_of_any_real_dtype_are_compared_in_float64(dtype):
    small = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    reward, group = small.to(getattr(torch, dtype)), torch.arange(8) % 2
    expected = group_advantage(small.double(), group)
    assert expected.any() and torch.equal(group_advantage(reward, group), expected)
    signal = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = group_advantage(1e6 + 0.01 * signal, torch.arange(64) % 8, eps=0.0)
    expected = group_advantage(signal, torch.arange(64) % 8, eps=0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_bad_rewards_are_refused_by_name():
    group = torch.tensor([0, 0, 1])
    for bad in (float("nan"), float("inf"), -float("inf"), 2e150):
        with pytest.raises(ValueError, match=r"reward: got \S+ for sample 2 \(1 of 3"):
            group_advantage(torch.tensor([0.0, 1.0, bad], dtype=torch.float64), group)
    with pytest.raises(TypeError, match=r"reward: got torch\.complex64, expected real numbers"):
        group_advantage(torch.tensor([0.0, 1, 1j]), group)
    with pytest.raises(TypeError, match=r"reward: got torch\.complex64"):
        Credit()({"a": torch.ones(1, 4) * 1j}, {"a": 1.0}, tree())
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
    scores = {name: torch.as_tensor(score, dtype=torch.float64) for name, score in scores.items()}
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
    by_advantage = advantages(scores, weights, multi_objective_aggregation="normalize_then_mean")
    assert torch.equal(by_advantage, torch.tensor([[-1.0, -0.5, 1, 0.5]])), "3/4 against 1/4"
    summed = advantages(
        scores, weights, multi_objective_aggregation="normalize_then_sum", limit=50.0
    )
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


def test_groups_without_a_spread_are_counted_and_get_exactly_nothing():
    plan, ratio = tree(), Credit(multi_objective_aggregation="normalize_then_mean").zero_std_ratio
    reward = torch.tensor([[1.0, 5, 1, 6], [2, 3, 2, 3], [0.1, 0, 0.1 + 9e-7, 1]])
    reward = reward.double()
    scores = {"a": reward, "b": reward * torch.tensor([[1.0], [0], [0]]), "c": reward.flip(1)}
    assert ratio(scores, {"a": 1.0}, plan) == pytest.approx(4 / 6)
    assert ratio(scores, {"a": 1.0, "b": 0.3}, plan) == pytest.approx(4 / 6)
    assert ratio(scores, {"a": 1.0, "c": 0.0}, plan) == pytest.approx(4 / 6), "weight 0: watched"
    assert ratio(scores, {"a": 1.0, "c": 1.0}, plan) == pytest.approx(2 / 6), "one of them teaches"
    assert Credit(min_std=0.0).zero_std_ratio(scores, {"a": 1.0}, plan) == pytest.approx(3 / 6)
    # (P, C): edges lead to leaves 0 1, 0, 2 3 and 2; leaves 0 and 2 are one group.
    live = [[True, False, True, False], [False] * 4, [True, False, True, False]]
    assert (advantages({"a": reward}) != 0).tolist() == live


@pytest.mark.parametrize("name", [name for name in names() if name != "diffusion_opd"])
def test_every_recipe_has_a_least_standard_deviation(name):
    """What rounding leaves of equal rewards is nothing to learn from, whatever eps is."""
    with pytest.raises(ValueError, match="min_std: got -1, expected a number at least 0"):
        recipe(name)(min_std=-1)
    made = {least: recipe(name)(min_std=least) for least in (1e-6, 1e-8)}
    plan = made[1e-6].plan(sd3_sigmas)
    reward = 0.7 + 1e-7 * torch.randn(
        2, len(plan.leaves), generator=torch.Generator().manual_seed(0)
    )
    scores, weights = {"toy": reward.double(), "diversity": torch.ones_like(reward)}, {"toy": 1.0}
    flat, dense = (made[least].credit() for least in made)
    assert not flat(scores, weights, plan).any()
    assert flat.zero_std_ratio(scores, weights, plan) == 1
    assert dense(scores, weights, plan).any()
    assert dense.zero_std_ratio(scores, weights, plan) == 0


def chain(members: int) -> Plan:
    plan = Plan()
    for member in range(members):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    return plan


@pytest.mark.parametrize("how", typing.get_args(RewardAggregation))
def test_a_negative_weight_is_a_penalty(how):
    scores = {"good": [[0.0, 0, 1, 1]], "bad": [[0.0, 1, 2, 3]]}
    alone = advantages(scores, {"bad": -1.0}, plan=chain(4), multi_objective_aggregation=how)
    assert alone[0, 0] > alone[0, 1] > alone[0, 3]
    mixed = advantages(
        scores, {"good": 1.0, "bad": -1.0}, plan=chain(4), multi_objective_aggregation=how
    )
    assert mixed[0, 2] > mixed[0, 3] and torch.isfinite(mixed).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.booleans(), min_size=7, max_size=7).filter(lambda failed: not all(failed)),
    st.sampled_from(typing.get_args(RewardAggregation)),
    st.sampled_from([{}, {"trimmed_ratio": 0.4}, {"unbiased": True}, {"best_of": 2}]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_what_has_no_score_is_as_if_it_had_never_been_to_the_bit(failed, how, options, whole, seed):
    """Whichever reward has none; beside a prompt that has none at all."""
    failed, draw = torch.tensor(failed), torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(1, 7, generator=draw).double() for name in ("a", "b")}
    lost = {name: torch.cat([x, x + 1]) for name, x in scores.items()}
    lost["b"][0, failed], lost["a"][1] = torch.nan, torch.nan
    weights = {"a": 1.0, "b": -0.4}
    credit = Credit(global_std=whole, multi_objective_aggregation=how, **options)
    found, ratio = (f(lost, weights, chain(7)) for f in (credit, credit.zero_std_ratio))
    assert found[1].isnan().all() and torch.equal(found[0].isnan(), failed)
    left = {name: x[:, ~failed] for name, x in scores.items()}
    members = int((~failed).sum())
    if members < 2:  # nothing to compare it with
        assert (found[0, ~failed] == 0).all() and ratio == 1
    else:
        assert torch.equal(found[:1, ~failed], credit(left, weights, chain(members)))
        assert ratio == credit.zero_std_ratio(left, weights, chain(members))


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
