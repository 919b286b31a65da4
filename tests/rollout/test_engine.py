"""The rollout engine: its samples are those of the plainest loop, however they are batched."""

import pytest
import torch

import flowkern as fk
from flowkern.rollout import Chain, Roots, run, sample_ids
from flowkern.schedules import edge_coefficients, sd3_sigmas, step_coefficients

SHAPE, SEED, UNCOND = (2, 4, 4), 11, 3


def make_chain(steps: int = 6, trained=(1, 2, 4)) -> Chain:
    """SDE edges, with one ODE edge in the middle."""
    sigmas = sd3_sigmas(steps)
    table = step_coefficients(sigmas, "flow_sde", 0.7).table.clone()
    table[3] = edge_coefficients(float(sigmas[3]), float(sigmas[4]), "ode", 0.0).table
    return Chain(sigmas, fk.schedules.Coefficients(table), trained)


def make_roots(iteration: int = 0, slots=(0, 1, 2), members: int = 4, dtype=torch.float32) -> Roots:
    slots = torch.tensor(slots)
    prompt = slots.repeat_interleave(members)
    return Roots(SEED, sample_ids(iteration, slots, members), prompt, SHAPE, dtype)


def field(x_t, sigma, prompt):
    """A velocity without any arithmetic across samples."""
    level, shift = (v.view(-1, 1, 1, 1) for v in (sigma, prompt.to(x_t.dtype)))
    return torch.tanh(x_t * (1 + level)) + 0.1 * shift


def test_the_engine_is_the_one_sample_at_a_time_loop_in_float64():
    chain, roots, scale = make_chain(), make_roots(dtype=torch.float64), 2.5
    rollout = run(
        chain, field, roots, max_batch=7, guidance_scale=scale, uncond=UNCOND, keep_velocity=True
    )
    c = chain.coefficients
    for i, (sample_id, prompt) in enumerate(zip(roots.sample_id, roots.prompt, strict=True)):
        one, sample_id = (1, *SHAPE), sample_id[None]
        x = fk.philox_normal(one, SEED, sample_id, 0, "init").double()
        for step in range(len(chain)):
            sigma = chain.sigmas[step : step + 1]
            uncond = field(x, sigma, torch.tensor([UNCOND]))
            v = uncond + scale * (field(x, sigma, prompt[None]) - uncond)
            noise = fk.philox_normal(one, SEED, sample_id, step).double()
            x_next = c.a[step] * x + c.b[step] * v + c.std[step] * noise
            if step in chain.trained:
                edge = torch.tensor([chain.trained.index(step)])
                batch = rollout.batch(edge, torch.tensor([i]))
                torch.testing.assert_close(batch.x_t, x, rtol=0, atol=1e-10)
                torch.testing.assert_close(batch.x_next, x_next, rtol=0, atol=1e-10)
                torch.testing.assert_close(batch.old_velocity, v, rtol=0, atol=1e-10)
                assert batch.sigma == chain.sigmas[step] and batch.prompt == prompt
                assert torch.equal(batch.coefficients.table, c[step].table[None])
            x = x_next
        torch.testing.assert_close(rollout.latents[i : i + 1], x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samples_depend_on_neither_max_batch_nor_the_rank(guidance_scale):
    def walk(slots, max_batch):
        calls = []

        def counted(x_t, sigma, prompt):
            calls.append(len(x_t))
            return field(x_t, sigma, prompt)

        options = {"guidance_scale": guidance_scale, "uncond": UNCOND, "keep_velocity": True}
        return run(make_chain(), counted, make_roots(slots=slots), max_batch, **options), calls

    whole, calls = walk((0, 1, 2), 1000)
    rows = 12 * (2 if guidance_scale != 1 else 1)
    assert calls == [rows] * 6, "one network call per step, guidance in it"
    for max_batch in (2, 5, 8):
        parts, calls = walk((0, 1, 2), max_batch)
        assert max(calls) <= max_batch and sum(calls) == rows * 6
        for name in ("latents", "states", "velocity"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    ranks = [walk(slots, 5)[0] for slots in ((0,), (1, 2))]
    assert torch.equal(torch.cat([rank.latents for rank in ranks]), whole.latents)
    assert torch.equal(torch.cat([rank.states for rank in ranks], 1), whole.states)


def test_another_iteration_draws_other_noise():
    first, second = (run(make_chain(), field, make_roots(i), 100).latents for i in (0, 1))
    assert (first - second).abs().flatten(1).amax(1).min() > 0.1


def test_only_what_training_needs_is_kept():
    rollout = run(make_chain(trained=(1, 2, 4)), field, make_roots(), 100)
    assert rollout.chain.kept == (1, 2, 3, 4, 5)
    assert rollout.states.shape == (5, 12, *SHAPE) and rollout.velocity is None
    assert run(make_chain(trained=()), field, make_roots(), 100).states.numel() == 0


def test_sample_ids_never_collide():
    ids = [sample_ids(i, torch.arange(50), 24) for i in (0, 1, 2**24 - 1)]
    ids.append(sample_ids(1, torch.arange(2**16 - 50, 2**16), 24))
    ids = torch.cat(ids)
    assert len(ids.unique()) == len(ids) and ids.min() >= 0
    for arguments, name in (
        ((2**24, torch.arange(2), 2), "iteration"),
        ((0, torch.tensor([2**16]), 2), "prompts"),
        ((0, torch.arange(2), 2**23 + 1), "members"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got"):
            sample_ids(*arguments)


def test_a_plan_that_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"trained: got edges \[3\] with k = 0"):
        make_chain(trained=(2, 3))
    sigmas = sd3_sigmas(4)
    edges = step_coefficients(sigmas, "cps", 0.7)
    assert edges.std[-1] == 0 < edges.k[-1]
    assert Chain(sigmas, edges, range(4)).trained == (0, 1, 2, 3), "CPS keeps k = 1 at std = 0"
    with pytest.raises(ValueError, match=r"trained: got edges \[3\] with std = 0, .* no KL"):
        Chain(sigmas, edges, range(4), has_kl=True)
    with pytest.raises(ValueError, match=r"trained: got .* expected rising edges from 0 to 5"):
        make_chain(trained=(2, 6))
    with pytest.raises(ValueError, match=r"sigmas: got shape \(6,\), expected \(7,\)"):
        Chain(sd3_sigmas(5), make_chain().coefficients)
    with pytest.raises(ValueError, match="uncond: needed for guidance_scale=2"):
        run(make_chain(), field, make_roots(), 8, guidance_scale=2.0)
    with pytest.raises(ValueError, match="max_batch: got 1, expected at least 2"):
        run(make_chain(), field, make_roots(), 1, guidance_scale=2.0, uncond=UNCOND)
