"""What FLUX.2 alone has: a grid that follows from the size, and a klein that was distilled."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from test_families import PIXELS, PROMPTS, STEPS, euler, latents

from flowkern.models import load_model
from flowkern.models.flux2 import empirical_mu


@pytest.mark.parametrize("is_distilled", [False, True], ids=["base", "distilled"])
def test_klein_is_guided_unless_it_was_distilled(is_distilled, tmp_path):
    """Whatever scale the distilled one's pipeline is given, 4 by default, it ignores."""
    made = tiny.pipeline("klein")
    made.register_to_config(is_distilled=is_distilled)
    made.save_pretrained(tmp_path)
    model, calls = load_model(tmp_path, **PIXELS), []
    model.pipeline.set_progress_bar_config(disable=True)
    assert model.guidance.kind == ("none" if is_distilled else "cfg")
    assert model.guidance_embedding is None
    found = euler(model, latents(model), 1.0 if is_distilled else 4.0)
    mine = model.to_vae(found)
    count = model.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    own = {"num_inference_steps": STEPS, **PIXELS, "latents": latents(model)}
    seen, images = tiny.called(model.pipeline, PROMPTS, own, instead=mine)
    count.remove()
    assert len(calls) == STEPS * (1 if is_distilled else 2)
    torch.testing.assert_close(mine, seen, rtol=0, atol=5e-6)
    torch.testing.assert_close(model.decode(found), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flux2", "klein"])
def test_the_grid_is_its_pipelines_on_both_sides_of_4300_tokens(name, loaded, directories):
    """Beyond, its shift no longer depends on the number of steps. Nothing of that size is made."""
    model, shifts = loaded(directories(name), **PIXELS), {}
    for model.height, model.width in (
        (32, 32),
        (1024, 1024),
        (1056, 1040),
        (1072, 1040),
        (2048,) * 2,
    ):
        _, height, width = model.latent_shape
        for steps in (4, 10, 50):
            mu = compute_empirical_mu(height * width, steps)
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)
            scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            assert torch.equal(model.sigmas(steps).float(), scheduler.sigmas)
            shifts.setdefault(height * width, set()).add(mu)
    assert {tokens: len(found) for tokens, found in shifts.items()} == {
        4: 3, 4096: 3, 4290: 3, 4355: 1, 16384: 1
    }  # fmt: skip
    for tokens in (4299, 4300, 4301):
        assert empirical_mu(tokens, 10) == pytest.approx(compute_empirical_mu(tokens, 10), rel=1e-9)
