"""What the steps of the recipes weigh, their ratio and KL, and who gets the credit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planned import plan_of, std

from flowkern.ops.policy_loss import policy_loss
from flowkern.rl import objectives
from flowkern.rl.algorithms import names, recipe
from flowkern.rollout import Source, batch, prompt_ids, run
from flowkern.schedules import flux_sigmas, sd3_sigmas, shifted_sigmas

# ---- weights, ratio and KL of the steps ----


@pytest.mark.parametrize(
    "grid, noise_level, constant",
    [(sd3_sigmas, 0.7, 2.2522), (lambda steps: flux_sigmas(steps, 4096), 0.9, 1.7260)],
)
def test_noise_aware_weights_follow_from_the_grid(grid, noise_level, constant):
    """Released, the constant is 2.25 or 1.73 whatever the grid."""
    plan = plan_of("tempflow_grpo", grid=grid, noise_level=noise_level)
    trained = [plan.nodes[i] for i in plan.trained]
    for node in trained:
        assert node.weight / std(node) == pytest.approx(constant, abs=5e-5)
    by_step = {node.depth: node.weight for node in trained}
    assert sum(by_step.values()) / 9 == pytest.approx(1, abs=1e-12)
    if grid is sd3_sigmas:
        table = [1.575, 1.672, 1.206, 1.003, 0.882, 0.794, 0.718, 0.635, 0.507]
        released = [2.25 * std(node) for node in trained[:54:6]]
        assert released == pytest.approx(table, abs=5e-4)
    other = plan_of("tempflow_grpo", grid=lambda steps: shifted_sigmas(steps, 1.0), kl_coef=0.0)
    weights = {other.nodes[i].depth: other.nodes[i].weight for i in other.trained}
    assert sum(weights.values()) / 9 == pytest.approx(1, abs=1e-12)


def test_the_weights_of_all_others():
    for name in names():
        plan = plan_of(name)
        for node in (plan.nodes[i] for i in plan.trained):
            if name == "grpo_guard":
                dt = node.sigma - plan.nodes[node.parent].sigma
                assert node.weight == pytest.approx(-1 / dt)
            elif name not in ("tempflow_grpo", "flash_grpo"):
                assert node.weight == 1


def velocity_of(slope):
    def call(x_t, sigma, prompt, on_host=None):
        return torch.sin(slope * x_t) * (1 + sigma[:, None]) + 0.1 * prompt[:, None]

    return call


def rollout_of(name, **options):
    source = Source(5, prompt_ids(0, torch.arange(2)), (6,), torch.float64)
    plan = plan_of(name, num_inference_steps=5, group_size=3, **options)
    return run(plan, velocity_of(1.0), source, 100, keep_velocity=True)


def objective_of(name, **options):
    options = {"num_inference_steps": 5, "group_size": 3, "guidance_scale": 1.0} | options
    it = recipe(name)(**options)
    return replace(it.objective(it.guidance(9)), backend="reference")


def all_sites(rollout):
    """Every trained site of two prompts, at all steps mixed."""
    sites = len(rollout.plan.origins)
    pair = torch.randperm(2 * sites, generator=torch.Generator().manual_seed(1))
    return pair % sites, pair // sites, torch.ones(2, len(rollout.plan.trained))


@pytest.mark.parametrize("name", ["flow_grpo", "tempflow_grpo", "mixgrpo"])
def test_the_kl_has_its_dt(name):
    """Released Flow-GRPO divides by 2 g^2 instead of 2 std^2 = 2 g^2 (-dt)."""
    options = {"window": 2} if name == "mixgrpo" else {}
    rollout = rollout_of(name, kl_coef=0.5, **options)
    part = batch(rollout, *all_sites(rollout))
    anchors = {"reference": velocity_of(0.7)}
    weighed = objective_of(name, kl_coef=0.5, **options)
    out = weighed(part, velocity_of(1.0), anchors)
    c, row = part.coefficients, torch.arange(len(part.x_t)) if part.row is None else part.row
    v, v_ref = (
        f(part.x_t, part.sigma, part.prompt)[row] for f in (velocity_of(1.0), *anchors.values())
    )
    kl = (c.b[:, None] * (v - v_ref)).square().mean(1) / (2 * c.std**2)
    torch.testing.assert_close(out.statistics["kl"], kl, rtol=1e-9, atol=0)
    # On policy the policy term is -weight A: the step weight leaves the KL alone.
    policy = -(part.weight * part.advantage).sum()
    torch.testing.assert_close(out.loss, policy + 0.5 * kl.sum(), rtol=1e-9, atol=0)
    if name == "tempflow_grpo":
        assert part.weight.std() > 0.1


def test_the_guarded_ratio_is_each_samples_own(monkeypatch):
    """Released, std and dt are means over the batch: wrong where its samples differ in step."""
    found = []  # what the op says beside the outcome

    def watched(*arguments, **options):
        found.append(policy_loss(*arguments, **options).log_ratio)
        return policy_loss(*arguments, **options)

    monkeypatch.setattr(objectives, "policy_loss", watched)
    rollout = rollout_of("grpo_guard")
    site, prompt, advantage = all_sites(rollout)
    objective, moved = objective_of("grpo_guard"), velocity_of(1.0001)
    part = batch(rollout, site, prompt, advantage)
    together = objective(part, moved, {})
    c = part.coefficients
    assert len({*c.std.tolist()}) == 4
    moved_mean = c.b[:, None] * (moved(part.x_t, part.sigma, part.prompt) - part.old_velocity)
    old_mean = c.a[:, None] * part.x_t + c.b[:, None] * part.old_velocity
    noise = (part.x_next - old_mean) / c.std[:, None]
    (log_ratio,) = found
    torch.testing.assert_close(log_ratio, (noise * moved_mean).mean(1), rtol=1e-9, atol=0)
    loss = 0
    for i in range(len(site)):
        alone = batch(rollout, site[i : i + 1], prompt[i : i + 1], advantage)
        out = objective(alone, moved, {})
        torch.testing.assert_close(found[-1][0], log_ratio[i], rtol=1e-12, atol=0)
        loss += out.loss
    torch.testing.assert_close(loss, together.loss, rtol=1e-9, atol=1e-12)
    assert (objective.clip_low, objective.clip_high) == (2e-6, 2e-6)


# ---- credit ----


STATISTICS = {
    # ddof, eps, std of all rewards, scale
    "flash_grpo": (0, 1e-4, True, 1.0),
    "flow_dppo": (0, 1e-4, True, 1.0),
    "flow_grpo": (0, 1e-4, True, 1.0),
    "flow_grpo_fast": (0, 1e-4, True, 1.0),
    "gardo": (0, 1e-4, True, 1.0),
    "grpo_guard": (0, 1e-4, False, 1.0),
    "dance_grpo": (1, 1e-8, False, 1.0),
    "mixgrpo": (1, 1e-8, False, 1.0),
    "mixgrpo_flash": (1, 1e-8, False, 1.0),
    "mixgrpo_flash_star": (1, 1e-8, False, 1.0),
    "pref_grpo": (1, 1e-8, False, 1.0),
    "tempflow_grpo": (0, 1e-4, False, 1.0),
    "branch_grpo": (1, 1e-8, False, 1.0),
    "tree_rpo": (1, 1e-8, False, 1.0),
    "dense_grpo": (0, 1e-4, False, 1.0),
    "g2rpo": (1, 1e-8, False, 1.0),
    "awm": (0, 1e-4, True, 0.2),
    "diffusion_nft": (0, 1e-4, True, 0.2),
    "dgpo": (0, 1e-4, True, 1.0),
    "crd": (0, 1e-4, True, 0.2),
}


def test_all_but_those_that_learn_from_no_reward_have_statistics():
    assert {*STATISTICS, "diffusion_opd"} == {*names()}


@pytest.mark.parametrize("name", STATISTICS)
def test_each_algorithm_has_its_own_statistics(name):
    ddof, eps, is_global, scale = STATISTICS[name]
    options = {"num_inference_steps": 10, "group_size": 4}
    options |= {"split_steps": [0, 3]} if name == "branch_grpo" else {}
    plan = plan_of(name, **options)
    groups, count = np.array(plan.groups), len(plan.leaves)
    # Rewards so close that the eps shows.
    reward = 1e-3 * np.random.default_rng(0).standard_normal((2, count))
    given = torch.from_numpy(reward)
    if name == "pref_grpo":  # of four, all different: who beats how many of the others
        reward = reward.argsort(1).argsort(1) / 3
    below, compared = plan.below().double().numpy().T, reward
    if by_depth := name in ("branch_grpo", "tree_rpo", "dense_grpo"):
        groups = np.array([plan.nodes[i].depth for i in plan.trained])
        compared = reward @ below / below.sum(0)
        if name == "dense_grpo":  # 4 samples of 10 images each
            compared = np.diff(reward.reshape(2, 4, 10), axis=2).reshape(2, 36)
    leaf = np.empty_like(compared)
    for prompt in range(2):
        for tag in {*groups.tolist()}:
            mine = compared[prompt, groups == tag]
            spread = np.std(reward if is_global else mine, ddof=ddof)
            divided_by = 1 if name == "gardo" else spread + eps
            leaf[prompt, groups == tag] = (mine - mine.mean()) / divided_by
    if by_depth:
        expected = leaf
    elif plan.points:
        expected = leaf[:, [image for image, _ in plan.points]]
    else:
        expected = leaf @ below
    expected = expected.clip(-5, 5) * scale
    more = {"diversity": torch.ones(2, count)} if name == "gardo" else {}  # all as far apart
    scores = {"toy": given, **more}
    actual = recipe(name)(**options).credit()(scores, {"toy": 1.0}, plan)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)
    high = torch.zeros(2, count, dtype=torch.float64)
    high[0, 0] = 1e9
    assert (
        recipe(name)(**options).credit()({"toy": high, **more}, {"toy": 1.0}, plan).abs().max()
        <= 5 * scale
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_what_advantages_are_divided_by_is_an_option(name):
    """By nothing, by the std of a group, or by that of all: the second prompt's rewards have ten
    times the spread of the first's."""
    kind, options = recipe(name), {"num_inference_steps": 10, "group_size": 4, "adv_clip_max": 1e3}
    options |= {"split_steps": [0, 3]} if name == "branch_grpo" else {}
    plan = plan_of(name, **options)
    reward = torch.randn(1, len(plan.leaves), generator=torch.Generator().manual_seed(0)).double()
    scores = {"toy": torch.cat([reward, 10 * reward]), "diversity": torch.ones(2, reward.numel())}

    def credited(**more):
        return kind(**options | more).credit()(scores, {"toy": 1.0}, plan)

    plain, divided = credited(scale_rewards=False), credited(scale_rewards=True)
    is_rate = name == "pref_grpo"  # which rewards' spread is nothing to
    torch.testing.assert_close(plain[1], plain[0] * (1 if is_rate else 10))
    assert not torch.allclose(plain, divided)
    if "global_std" in kind.__dataclass_fields__:
        for is_global, factor in ((True, 10), (False, 1)):
            of_all = credited(scale_rewards=True, global_std=is_global)
            torch.testing.assert_close(of_all[1], of_all[0] * factor, rtol=1e-3, atol=1e-6)


def test_seed_groups_stay_seed_groups():
    """Released, they hang on one rank holding one seed: gathered first, they turn into prompt
    groups, and a lucky seed is praised for its luck."""
    plan = plan_of("tempflow_grpo")
    assert len({*plan.groups}) == 36 and plan.groups == sorted(plan.groups)
    luck = torch.tensor(plan.groups).double().expand(3, -1)  # depends on seed and step alone
    credit = recipe("tempflow_grpo")().credit()
    assert not credit({"toy": luck}, {"toy": 1.0}, plan).any()
    siblings = torch.tensor(plan.trained).view(36, 6)
    for group in siblings.tolist():
        assert len({plan.nodes[node].parent for node in group}) == 1
    reward = torch.randn(3, 216, generator=torch.Generator().manual_seed(0))
    advantage = credit({"toy": reward}, {"toy": 1.0}, plan).view(3, 36, 6)
    assert advantage.sum(2).abs().max() < 1e-4


def test_granularities_are_summed_or_averaged():
    scores = {"toy": torch.randn(2, 192, generator=torch.Generator().manual_seed(0))}
    plan = plan_of("g2rpo")
    total, mean = (
        recipe("g2rpo")(over_leaves=how).credit()(scores, {"toy": 1.0}, plan)
        for how in ("sum", "mean")
    )
    assert total.abs().max() < 5  # nothing is clamped
    torch.testing.assert_close(total, 2 * mean)


def test_best_of_and_trimming_are_options_of_the_even_grid():
    plan = plan_of("dance_grpo")
    scores = {"toy": torch.arange(12.0)[None]}
    advantage = recipe("dance_grpo")(best_of=4).credit()(scores, {"toy": 1.0}, plan)
    steps = [plan.nodes[i].member for i in plan.trained]
    kept = {member for member, a in zip(steps, advantage[0].tolist(), strict=True) if a}
    assert kept == {0, 1, 10, 11}
    assert recipe("mixgrpo")(trimmed_ratio=0.25).credit().trimmed_ratio == 0.25
    key = "multi_objective_aggregation"
    assert recipe("mixgrpo")().credit().multi_objective_aggregation == "normalize_then_mean"
    for name in STATISTICS:
        made = recipe(name)(**{key: "normalize_then_sum"}).credit()
        assert getattr(made, key) == "normalize_then_sum", name
