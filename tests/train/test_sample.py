"""flowkern sample: the base model beside what was learned, in between, and one after the other."""

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import torch
from PIL import Image

from flowkern.cli import main
from flowkern.models import load_model
from flowkern.ops._common.philox import philox_normal
from flowkern.rollout import prompt_ids
from flowkern.train import tracking
from flowkern.train.draw import Asked, draw
from flowkern.train.loop import Loop
from flowkern.train.trained import Blend
from flowkern.train.validation import SAMPLE_ITERATION, Sampler

PROMPTS = ["the digit 3", "a handwritten seven"]


@pytest.fixture
def saved(tiny, tmp_path):
    """saved("key=value", ...): a configuration, and the checkpoint of its run that learned much."""

    def make(*options):
        config = tiny(*options, "data.test_prompts=null")
        loop = Loop(config)
        loop.begin()
        moved = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in loop.parameters:
                weight += 0.1 * torch.randn(weight.shape, generator=moved)
        loop.checkpoint()
        return config, tmp_path / "run/checkpoint-0"

    return make


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_strengths_and_the_first_steps(saved, lora):
    config, checkpoint = saved(lora)
    base, model = load_model(config.model.path), load_model(config.model.path)
    blend = Blend(model, config.lora, checkpoint)
    conditioning = model.encode(PROMPTS)
    sigmas = model.sigmas(2).tolist()
    x = philox_normal((2, *model.latent_shape), 7, prompt_ids(SAMPLE_ITERATION, torch.arange(2)), 0,
                      "init")  # fmt: skip

    def step(network, x, i):
        with torch.no_grad():
            v = network.velocity(x, torch.full((2,), sigmas[i]), conditioning)
        return x + (sigmas[i + 1] - sigmas[i]) * v

    def drawn(**options):
        asked = Asked(PROMPTS, Sampler(2), (7,), **options)
        return draw(model, blend, asked, torch.device("cpu"))

    of_base = base.decode(step(base, step(base, x, 0), 1))
    by_both = base.decode(step(base, step(model, x, 0), 1))  # the blend is whole until it draws
    trained = base.decode(step(model, step(model, x, 0), 1))
    assert (trained - of_base).abs().max() > 0.1 and (by_both - trained).abs().max() > 0.01
    for expected, options in (
        (trained, {}),
        (by_both, {"trained_steps": 1}),
        (of_base, {"strength": 0.0}),
        (trained, {"trained_steps": 2}),
    ):
        torch.testing.assert_close(drawn(**options), expected, rtol=0, atol=1e-5)
    between = [(drawn(strength=s) - of_base).abs().mean() for s in (0.25, 0.5, 1.0)]
    assert 0 < between[0] < between[1] < between[2]
    if config.lora is None:
        name, weight = next(iter(model.network.named_parameters()))
        blend.set(0.5)
        middle = (base.network.get_parameter(name) + blend._learned[name]) / 2
        torch.testing.assert_close(weight, middle)


def test_pairs_seeds_and_folders(saved, tmp_path, monkeypatch, capsys):
    saved()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    hushed = []
    monkeypatch.setattr("flowkern.train.quiet.quiet", lambda: hushed.append(True))
    grids, save = [], tracking.save_grid
    monkeypatch.setattr(tracking, "save_grid", lambda *a, **k: grids.append((a, k)) or save(*a))
    (tmp_path / "mine.txt").write_text("\n".join(PROMPTS))
    sample = ["sample", "run", "--num-inference-steps", "2"]
    assert main([*sample, "--prompts", "mine.txt", "--compare", "--seed", "1", "2"]) == 0
    assert hushed, "libraries' bars"
    (arguments, options) = grids.pop()
    images, captions = arguments[1:3]
    assert captions[::4] == [f"base: {prompt}" for prompt in PROMPTS] and len(captions) == 8
    assert captions[1] == f"trained: {PROMPTS[0]}" and options == {"title": "", "columns": 4}
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8, "no two are the same"
    assert main([*sample, "--prompts", "mine.txt", "--compare", "--output", "new/folder"]) == 0
    names = ["0000-0-base.png", "0000-0-trained.png", "0001-0-base.png", "0001-0-trained.png"]
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == names
    one = [*sample, "--prompt", PROMPTS[0]]
    big = ["--height", "64", "--width", "32", "--strength", "0.5", "--trained-steps", "1"]
    assert main([*one, *big, "--output", "big.png"]) == 0
    with Image.open("big.png") as picture:
        assert picture.size == (32, 64)
    capsys.readouterr()
    for arguments, status, said in (
        (["--height", "33"], 2, "--height: got 33, expected a positive multiple of"),
        (["--width", "72"], 2, "--width: got 72, expected at most 64: the network has no pos"),
        (["--num-frames", "5"], 2, "--num-frames: got 5, but StableDiffusion3Pipeline takes"),
        (
            ["--trained-steps", "3"],
            2,
            "--trained-steps: got 3, expected 1 to --num-inference-steps",
        ),
        (["--trained-steps", "0"], 2, "--trained-steps: got 0, expected 1 or more"),
        (["--strength", "nan"], 2, "--strength: got nan, expected -10 to 10"),
        (["--negative-prompt", "ugly", "--guidance-scale", "1"], 2, "which asks for no guidance"),
        (["--output", "new"], 2, "--output: 'new' is there; expected a new folder"),
        (["--output", "big.png/x.png"], 2, "is no directory"),
        (["--output", "a.mp4"], 2, "--output: got 'a.mp4' for what does not move"),
        (["--seed", "1", "-1"], 2, "--seed: got -1"),
    ):
        pytest.importorskip("av") if "a.mp4" in arguments else None
        assert main([*one, *arguments]) == status, arguments
        assert said in capsys.readouterr().err.splitlines()[-1], arguments
    monkeypatch.setattr("flowkern.train.loading.load_pipeline", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("flowkern.train.tracking.find_spec", lambda name: name)  # as if av is here
    for several in ([], ["--num-images", "2"]):
        assert main([*one, *several, "--output", "a.mp4"]) == 2
        assert "--output: got 'a.mp4' for what does not move" in capsys.readouterr().err
    for prompts, said in (
        ("none.txt", "--prompts: cannot read 'none.txt'"),
        ("a.pdf", "--prompts"),
    ):
        assert main([*sample, "--prompts", prompts]) == 2
        assert capsys.readouterr().err.startswith(f"flowkern: {said}")
