"""What is off is said by the argument's name in the project's function, not in the kernel."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from flowkern.compat import awm, dance_grpo, diffusion_nft, flow_grpo, g2rpo, mixgrpo, tempflow
from flowkern.compat._grid import _MOST, _known
from flowkern.schedules import shifted_sigmas

SIGMAS = shifted_sigmas(8, 3.0).float()
MINE = SimpleNamespace(sigmas=SIGMAS, index_for_timestep=int)
ONE = torch.tensor([2])
SOLVER = SimpleNamespace(
    dpm_algorithm_type="dpmsolver++", dpm_solver_order=1, dpm_solver_type="midpoint"
)
CONFIG = SimpleNamespace(train=SimpleNamespace(cfg=False))
T = torch.full((2, 1, 1), 0.5)
CALLS = {  # (x, velocity, x_next, sigmas), and what the first three are called
    flow_grpo.sde_step_with_logprob: (
        lambda f, x, v, n, s: f(MINE, v, ONE, x, prev_sample=n),
        "sample", "model_output", "prev_sample",
    ),
    flow_grpo.wan_sde_step_with_logprob: (
        lambda f, x, v, n, s: f(MINE, v, ONE, x, n), "sample", "model_output", "prev_sample",
    ),
    flow_grpo.ode_step_with_logprob: (
        lambda f, x, v, n, s: f(MINE, v, v, ONE, x, prev_sample=n),
        "sample", "model_output and mean_model_output", "prev_sample",
    ),
    tempflow.sde_step_with_logprob: (
        lambda f, x, v, n, s: f(MINE, v, ONE, x, n), "sample", "model_output", "prev_sample",
    ),
    mixgrpo.flow_grpo_step: (
        lambda f, x, v, n, s: f(v, x, 0.7, s, 2, n), "latents", "model_output", "prev_sample",
    ),
    mixgrpo.dance_grpo_step: (
        lambda f, x, v, n, s: f(v, x, 0.7, s, 2, n, True, True),
        "latents", "model_output", "prev_sample",
    ),
    mixgrpo.dpm_step: (
        lambda f, x, v, n, s: f(
            SOLVER, v, x, 2, s[:-1], s, variance_noise=n, sde_solver=True
        ),
        "sample", "model_output", "variance_noise",
    ),
    dance_grpo.flux_step: (
        lambda f, x, v, n, s: f(v, x, 0.7, s, 2, n, True, True),
        "latents", "model_output", "prev_sample",
    ),
    g2rpo.flow_grpo_step: (
        lambda f, x, v, n, s: f(v, x, 0.7, s, 2, n), "latents", "model_output", "prev_sample",
    ),
    diffusion_nft.run_sampling: (
        lambda f, x, v, n, s: f(lambda z, sigma: v, x, s), "z", "the velocity of v_pred_fn", None,
    ),
    awm.compute_log_prob_awm: (
        lambda f, x, v, n, s: f(
            lambda **_: (v,), None, None, T[: len(x)], None, None, CONFIG, x, x, n
        ),
        "clean_latents", "the transformer's answer", "random_noise",
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", CALLS, ids=lambda f: f"{f.__module__[16:]}.{f.__name__}")
def test_latents_of_another_shape(step):
    call, of_x, of_velocity, of_next = CALLS[step]
    x, short = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    call(step, x, x, x, SIGMAS)
    for given, name in (((x, short, x), of_velocity), ((x, x, short), of_next)):
        if name:
            with pytest.raises(ValueError, match=rf"^{name}: expected shape \(2, 4, 6\), got \(2"):
                call(step, *given, SIGMAS)
    with pytest.raises(ValueError, match=rf"^{of_x}: expected shape \(B, \*D\)"):
        call(step, *[torch.randn(2)] * 3, SIGMAS)
    assert "kwargs" not in inspect.signature(step).parameters  # the signature stays theirs


def test_a_wrong_number_of_timesteps_and_a_step_that_is_no_number():
    x = torch.randn(2, 4)
    for count in (0, 3):
        at = torch.arange(count)
        for step in (flow_grpo.sde_step_with_logprob, tempflow.sde_step_with_logprob):
            with pytest.raises(ValueError, match=f"^timestep: expected one or 2, .* got {count}$"):
                step(MINE, x, at, x)
    for index in (torch.tensor([1, 2]), torch.tensor(1.0), 1.0, None):
        with pytest.raises(TypeError, match="^index: expected one integer, got "):
            g2rpo.flow_grpo_step(x, x, 0.7, SIGMAS, index, x)
        with pytest.raises(TypeError, match="^step_index: expected one integer, got "):
            mixgrpo.dpm_step(SOLVER, x, x, index, SIGMAS[:-1], SIGMAS)


def test_a_noise_level_that_is_no_number_for_all():
    x = torch.randn(2, 4)
    calls = {
        "noise_level": lambda level: flow_grpo.sde_step_with_logprob(MINE, x, ONE, x, level),
        "eta": lambda level: dance_grpo.flux_step(x, x, level, SIGMAS, 2, x, True, True),
        "eta or noise_level": lambda level: mixgrpo.flow_grpo_step(x, x, level, SIGMAS, 2, x),
    }
    for name, call in calls.items():
        call(torch.tensor([0.7]))
        for level in (torch.tensor([0.7, 0.8]), "a", float("nan"), -0.1):
            with pytest.raises(ValueError, match=f"^{name}: expected a finite number >= 0, got"):
                call(level)


def test_a_grid_that_is_none():
    x = torch.randn(2, 4)
    for sigmas in (SIGMAS.tolist(), SIGMAS.numpy(), None):
        with pytest.raises(TypeError, match="^sigmas: expected a tensor, got "):
            mixgrpo.flow_grpo_step(x, x, 0.7, sigmas, 2, x)
    mine = SimpleNamespace(sigmas=SIGMAS.flip(0), index_for_timestep=int)
    with pytest.raises(ValueError, match=r"^self.sigmas: expected values in \(0, 1\], got \[0.0"):
        flow_grpo.sde_step_with_logprob(mine, x, ONE, x)
    with pytest.raises(ValueError, match="^sigma_schedule: expected falling values, got"):
        diffusion_nft.run_sampling(lambda z, s: z, x, SIGMAS.flip(0), "dpm2", determistic=True)


def test_what_is_remembered_of_a_grid_is_of_its_values_and_has_a_bound():
    x = torch.randn(1, 4)

    def std(sigmas, level=0.5):
        return float(mixgrpo.flow_grpo_step(x, x, level, sigmas, 2, x)[4])

    with torch.inference_mode():  # whose tensors count no edits
        sigmas = SIGMAS.clone()
        before = std(sigmas)
        sigmas.mul_(0.5)
        assert std(sigmas) == std(SIGMAS * 0.5) != before
    sigmas, known = SIGMAS.clone(), None
    std(sigmas)
    known = _known[sigmas]
    known.update({("no version", i): None for i in range(_MOST)})
    assert std(sigmas, 0.25) == std(SIGMAS, 0.25) and len(known) == 1
