"""Options of the recipes are checked by name, and algorithms are found by theirs."""

from pathlib import Path

import pytest
from planned import plan_of

from flowkern.rl import algorithms
from flowkern.rl.algorithms import cost, names, recipe
from flowkern.rollout import Plan

# ---- options are checked by name ----


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("flow_grpo_fast", {"window": 6}, "window: got 6, expected at most 5"),
        ("flow_grpo_fast", {"window": -1}, "window: got -1, expected a number at least 0"),
        (
            "flow_grpo_fast",
            {"branching": True, "train_num_steps": 7},
            "train_num_steps: got 7, expected at most 5",
        ),
        ("diffusion_opd", {"adv_clip_max": 2.0}, "adv_clip_max: got 2.0, but no reward is learned"),
        (
            "diffusion_opd",
            {"guidance_scale": 1.0, "uncond_gradient": False},
            "teacher_guidance_scale: got 4.5, expected at most 1",
        ),
        ("diffusion_opd", {"kl_coef": 0.0}, "kl_coef: got 0.0, expected a number above 0"),
        ("flow_grpo", {"group_size": 1}, "group_size: got 1, expected a number at least 2"),
        ("flash_grpo", {"sde_type": "cps"}, "noise_level: got None, expected a number for 'cps'"),
        ("flash_grpo", {"timestep_fraction": 0.0}, "timestep_fraction: got 0.0, expected"),
        ("flow_dppo", {"num_sde_steps": 6}, "num_sde_steps: got 6, expected at most 5"),
        ("flow_dppo", {"kl_mask_threshold": 0.0}, "kl_mask_threshold: got 0.0, expected"),
        (
            "branch_grpo",
            {"split_steps": [0, 3, 6]},
            "split_steps: got 3 splits into 2, which make 8",
        ),
        (
            "branch_grpo",
            {"split_steps": [0, 3, 6, 19]},
            "split_steps: .*different steps from 0 to 18",
        ),
        ("branch_grpo", {"split_steps": [0, 0, 3, 6, 9]}, "split_steps: got .*different steps"),
        ("tree_rpo", {"window": 3}, "window: got 3 splits into 2, which make 8 samples"),
        ("tree_rpo", {"window": 24}, "window: got 24, expected at most 23"),
        ("tree_rpo", {"noise_scales": [1.0, 0.0, 1.0, 1.0]}, "noise_scales: .*expected 4 above 0"),
        ("dance_grpo", {"timestep_fraction": 1.2}, "timestep_fraction: got 1.2, expected"),
        ("dance_grpo", {"shift": 0.0}, "shift: got 0.0, expected a number above 0"),
        ("mixgrpo", {"window": 24}, "window: got 24, expected at most 23"),
        ("mixgrpo", {"stride": -1}, "stride: got -1"),
        ("mixgrpo", {"trimmed_ratio": 1.0}, "trimmed_ratio: got 1.0"),
        ("mixgrpo_flash", {"tail_ratio": 0.0}, "tail_ratio: got 0.0"),
        ("tempflow_grpo", {"num_seeds": 0}, "num_seeds: got 0"),
        ("g2rpo", {"granularities": []}, r"granularities: got \[\], expected different"),
        ("g2rpo", {"granularities": [2, 2]}, r"granularities: got \[2, 2\], expected different"),
        ("g2rpo", {"granularities": [0, 1]}, r"granularities: got \[0, 1\]"),
        ("g2rpo", {"branch_steps": 16}, "branch_steps: got 16, expected at most 15"),
        (
            "dance_grpo",
            {"uncond_gradient": True},
            "uncond_gradient: got True, but there is no",
        ),
        ("awm", {"num_train_timesteps": 0}, "num_train_timesteps: got 0"),
        ("dgpo", {"trunc_steps": 2}, "num_train_timesteps: got 4, expected at most 3"),
        ("dgpo", {"clip_range": 0.0}, "clip_range: got 0.0, expected"),
        ("crd", {"crd_beta": 0.0}, "crd_beta: got 0.0, expected"),
        *(
            (name, {"ref_coef": 0.0, "ref_guidance_scale": 3.0}, "ref_guidance_scale: got 3.0, whi")
            for name in ("awm", "diffusion_nft", "dgpo", "crd")
        ),
        ("awm", {"ema_coef": -1.0}, "ema_coef: got -1.0"),
        ("awm", {"ghuber_power": 0.0}, "ghuber_power: got 0.0"),
        ("awm", {"weighting": "t2", "ghuber_power": 0.5}, "ghuber_power: got 0.5, expected"),
        ("awm", {"ref_coef": 0.0, "kl_weight": "elbo"}, "kl_weight: got 'elbo', but ref_coef is 0"),
        ("awm", {"ema_coef": 0.0, "kl_ema_weight": "elbo"}, "kl_ema_weight: .*, but ema_coef is 0"),
        ("diffusion_nft", {"nft_beta": 0.0}, "nft_beta: got 0.0"),
        ("diffusion_nft", {"timestep_fraction": 0.0}, "timestep_fraction: got 0.0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(name)(**options)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_short_grids_have_plans_too(name, steps):
    fitting = {"window": 1, "branch_steps": 1, "num_sde_steps": 1, "num_train_timesteps": 1}
    fields = recipe(name).__dataclass_fields__
    options = {key: value for key, value in fitting.items() if key in fields}
    options |= {"group_size": 2} if "branch_factor" in fields else {}
    options |= {"split_steps": [0]} if "split_steps" in fields else {}
    if steps == 2 and "stride" in fields:
        with pytest.raises(ValueError, match="window: got 1, expected at most 0"):
            recipe(name)(num_inference_steps=2, **options)
        return
    plan: Plan = plan_of(name, num_inference_steps=steps, **options)
    plan.check()
    assert plan.trained or plan.points


def test_the_public_count():
    for start in (0, 7, 19):
        counts = cost("mixgrpo", window_start=start)
        assert counts["sample"] == (start + 1) + 12 * (24 - start) and counts["naive_sample"] == 300
        assert (counts["train"], counts["naive_train"], counts["decode"]) == (37, 48, 12)
    assert cost("flow_grpo", group_size=8)["sample"] == 80
    with pytest.raises(ValueError, match="window_start: got 20, which MixGRPO never reaches"):
        cost("mixgrpo", window_start=20)


def test_every_file_is_an_algorithm_that_is_found_by_its_name():
    files = {path.stem for path in Path(algorithms.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {*names(), *algorithms.PLANNERS}
    for name in files:
        assert algorithms.name_of(recipe(name)()) == name


def test_names_of_nothing_are_told_apart():
    for name, message in (
        ("no_such_module:Recipe", "there is no module no_such_module"),
        ("math:Recipe", "math has no 'Recipe'"),
        ("math:pi", "expected a class derived from Recipe"),
    ):
        with pytest.raises(ValueError, match=f"algorithm.name: got '{name}', .*{message}"):
            recipe(name)


def test_guidance_up_to_1_is_none():
    """In every recipe, and what it costs with it; the verbs keep their formula for every w."""
    for name in names():
        alone = {"uncond_gradient": False, "teacher_guidance_scale": 1.0}
        for scale in (0, 0.5, 1):
            options = alone if name == "diffusion_opd" else {}
            chosen = recipe(name)(guidance_scale=scale, **options)
            assert chosen.guidance(uncond=7) is None
        assert recipe(name)(guidance_scale=1.5).guidance(uncond=7).scale == 1.5
