"""configs/models and configs/papers: each composes, fits the pipelines that it is for, and is
refused in one sentence for what is not there; each paper's run makes two steps on a tiny pipeline.

FLOWKERN_EVERY_CELL=1 runs all of them; the suite has one.
"""

import copy
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
from accelerate.state import AcceleratorState
from huggingface_hub import constants

from flowkern.checks import ConfigError
from flowkern.cli import main
from flowkern.lookup import load
from flowkern.models import MODELS
from flowkern.rewards import REWARDS
from flowkern.rl.algorithms import names, recipe
from flowkern.train import tracking, tree
from flowkern.train.config import load_config
from flowkern.train.loading import OURS, load_pipeline
from flowkern.train.lora import hits
from flowkern.train.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs/digits/flow_grpo.yaml"
FAMILIES = {
    "chroma": "chroma",
    "flux1_dev": "flux",
    "flux1_krea_dev": "flux",
    "flux2_dev": "flux2",
    "flux2_klein_4b": "klein",
    "flux2_klein_9b": "klein",
    "hunyuan_video": "hunyuan_video",
    "ltx_video": "ltx",
    "qwen_image": "qwen_image",
    "sd35_large": "sd3",
    "sd35_medium": "sd3",
    "wan21_1.3b": "wan",
    "wan21_14b": "wan",
    "wan22_a14b": "wan_a14b",
    "wan22_ti2v_5b": "wan_ti2v",
    "z_image": "z_image",
    "z_image_turbo": "z_image",
}
"""The tiny pipeline of each file."""
CHANNELS = {"ltx": 8}  # of the published latents to one of the tiny ones
PAPERS = {path.stem: path for path in sorted((ROOT / "configs/papers").glob("*.yaml"))}
DEFAULTS = {
    "awm": "awm_sd35m_geneval",
    "branch_grpo": "branch_grpo_flux_hps",
    "dance_grpo": "dance_grpo_flux_hps",
    "dense_grpo": "dense_grpo_sd35m_pickscore",
    "crd": "crd_sd35m_ocr",
    "dgpo": "dgpo_sd35m_ocr",
    "diffusion_nft": "diffusion_nft_sd35m_geneval",
    "diffusion_opd": "diffusion_opd_sd35m_ocr",
    "flash_grpo": "flash_grpo_wan21_hps",
    "flow_dppo": "flow_dppo_sd35m_pickscore",
    "flow_grpo": "flow_grpo_sd35m_geneval",
    "flow_grpo_fast": "flow_grpo_fast_sd35m_geneval",
    "g2rpo": "g2rpo_flux_hps",
    "gardo": "gardo_sd35m_ocr",
    "grpo_guard": "grpo_guard_sd35m_ocr",
    "mixgrpo": "mixgrpo_flux",
    "mixgrpo_flash": "mixgrpo_flash_flux",
    "mixgrpo_flash_star": "mixgrpo_flash_star_flux",
    "pref_grpo": "pref_grpo_flux",
    "tempflow_grpo": "tempflow_grpo_sd35m_geneval",
    "tree_rpo": "tree_rpo_flux",
}
"""The run that a recipe's defaults are."""
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
RUN = list(PAPERS) if EVERY else ["flow_grpo_sd35m_geneval"]
COUNTING = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
    "prompt": "a photo of two cat",
}
POSITION = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "prompt": "a photo of a red cat left of a dog",
}
SEEN = []
"""The metadata that the toy reward got."""


def model_file(name):
    return ROOT / f"configs/models/{name}.yaml"


def brightness(images, prompts, metadata):
    """In millionths: a VAE of random weights makes siblings alike, and equals teach nothing."""
    SEEN.extend(metadata)
    return 1e6 * images.double().flatten(1).mean(1)


def toys(path):
    """The rewards of a file, each of them the toy: an override."""
    kind = {"kind": f"{__name__}:brightness"}
    return f"reward={json.dumps({name: one | kind for name, one in rewards(path).items()})}"


@lru_cache
def rewards(path):
    return tree.read([path])["reward"]


def released(folder, config):
    """Files of the shape that was released, where a configuration has them."""
    for place in (config.data.train_prompts, config.data.test_prompts):
        place = folder / Path(place).relative_to(Path.cwd())
        place.parent.mkdir(parents=True, exist_ok=True)
        lines = ['a red sign that says "Old Dog"', "a photo of a blue cat, small, on the dog"]
        if place.suffix == ".jsonl":
            lines = [json.dumps(COUNTING), json.dumps(POSITION)]
        place.write_text("\n".join(lines) + "\n")


parsed = lru_cache(tree.read_file)


@pytest.fixture(autouse=True)
def each_file_is_parsed_once(monkeypatch):
    """Most of a refusal is YAML."""
    monkeypatch.setattr(tree, "read_file", lambda path: copy.deepcopy(parsed(path)))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub, and nothing in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)


@lru_cache
def pipeline(family):
    return tiny.pipeline(family)


def test_every_file_is_looked_at():
    assert sorted(FAMILIES) == sorted(path.stem for path in (ROOT / "configs/models").glob("*"))
    assert {*FAMILIES.values()} == {*tiny.PIPELINES}
    assert sorted(DEFAULTS) == names() and {*DEFAULTS.values()} <= {*PAPERS}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_file_fits_its_family(name):
    """Its size, text length, guidance and LoRA targets, and what it says of its latents."""
    config = load_config([DIGITS, model_file(name)])
    options = config.model.model_dump(exclude=OURS - {"vae_dtype"})
    options = {option: value for option, value in options.items() if value is not None}
    assert options.pop("vae_dtype") == "fp32"
    family = FAMILIES[name]
    made = pipeline(family)
    model = load(type(made).__name__, MODELS)(made, **options)
    for option in options.keys() - {"negative_prompt", "guidance_scale_2", "vae_slicing"}:
        assert getattr(model, option) == options[option]
    scale = config.algorithm.guidance_scale
    assert scale == config.validation.guidance_scale
    # A network that is told a scale, or was distilled, goes one way; others two.
    assert (scale > 1) == (model.guidance.kind != "embedded" and name != "z_image_turbo")
    targets = config.lora.target_modules or model.lora_targets
    assert all(hits(model, targets).values()) and config.lora.rank == 32
    said = re.search(r"([\d,]+) elements", _text(name))[1]
    elements = math.prod(model.latent_shape) * CHANNELS.get(family, 1)
    assert elements == int(said.replace(",", ""))
    factor = re.search(r"for 65,536\s+(?:# )?(?:width: \d+ # )?times (\.\d+)", _text(name))
    assert (elements == 65_536) == (factor is None)
    assert factor is None or float(factor[1]) == pytest.approx((65_536 / elements) ** 0.5, abs=5e-3)
    assert model.sigmas(config.validation.num_inference_steps)[0] == 1


def _text(name):
    """Of a file, or of what it extends where it says nothing of its latents itself."""
    text = model_file(name).read_text()
    if "elements" not in text:
        return _text(re.search(r"^extends: (\S+)\.yaml", text, re.MULTILINE)[1])
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_is_nowhere_is_refused_in_a_sentence(name, offline):
    config = load_config([DIGITS, model_file(name)])
    with pytest.raises(ConfigError) as stop:
        load_pipeline(config, "cpu")
    assert re.fullmatch(
        f"model.path: '{config.model.path}' is no directory here and no pipeline in the hub's "
        r"cache, '\S+', and HF_HUB_OFFLINE is set",
        str(stop.value),
    )


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_file_is_refused_in_a_sentence_for_what_is_missing(
    name, offline, tmp_path, capsys
):
    """A reward, prompts, weights, in this order, before a model is loaded."""

    def refused(*overrides):
        assert main(["train", str(PAPERS[name]), *overrides]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    lacking = [one for one in rewards(PAPERS[name]) if one not in REWARDS]
    if lacking:
        one = lacking[0]
        assert re.fullmatch(
            rf"flowkern: reward\.{one}: got '{one}', expected one of .*; '{one}' is not built in: "
            rf'write it, and name it in reward\.{one}\.kind="module:attribute"',
            refused(),
        )
    config = load_config(PAPERS[name], [toys(PAPERS[name])])
    given = [toys(PAPERS[name]), "train.mixed_precision=no"]  # float16 takes a GPU
    where = f"model.path={ROOT / 'assets/digits-sd3'}"
    missing = refused(*given, where)
    assert missing.startswith("flowkern: data.train_prompts: cannot read '")
    assert missing.endswith(f"; a path is relative to the working directory, and the file is "
                            f"published at {config.data.source}")  # fmt: skip
    released(tmp_path, config)
    Path(config.data.test_prompts).unlink()
    few = ["algorithm.prompts_per_rollout=2", "algorithm.updates_per_rollout=1"]
    missing = refused(*given, where, *few)
    assert missing.startswith("flowkern: data.test_prompts: cannot read '")
    released(tmp_path, config)
    for option in config.algorithm.read_from.values():
        assert refused(*given, *few).startswith(f"flowkern: algorithm.{option}: got null")
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
        few.append(f"algorithm.{option}={tmp_path}")
    assert refused(*given, *few).startswith(f"flowkern: model.path: '{config.model.path}' is")
    assert not list(tmp_path.glob("runs/*"))


def test_released_prompts_come_as_they_are(tmp_path, monkeypatch):
    """With all that a row has."""
    monkeypatch.chdir(tmp_path)
    for name, path in PAPERS.items():
        config = load_config(path, [toys(path)])
        released(tmp_path, config)
        rows = read_prompts(config.data.train_prompts)
        if "geneval" in name:
            assert rows == [COUNTING, POSITION]
        else:
            assert [[*row] for row in rows] == [["prompt"]] * 2 and '"Old Dog"' in rows[0]["prompt"]


# What was released and is no default: a solver's last level (docs/algorithms.md), and the other
# half of guidance, whose gradient is an option of all (docs/choosing.md).
RELEASED = {
    "diffusion_nft": {"last_sigma_ratio": 0.0},
    **{key: {"uncond_gradient": True} for key in ("gardo", "grpo_guard", "tempflow_grpo")},
}


@pytest.mark.parametrize("algorithm, name", DEFAULTS.items())
def test_a_recipes_defaults_are_its_papers_run(algorithm, name):
    config = load_config(PAPERS[name], [toys(PAPERS[name])])
    assert config.algorithm == recipe(algorithm)(**RELEASED.get(algorithm, {}))


@pytest.mark.parametrize("name, differs", [
    ("awm_flux_ocr", {"ref_coef": 0.4, "ema_coef": 0.0, "prompts_per_rollout": 72}),
    ("awm_flux_pickscore", {"ref_coef": 0.01, "ema_coef": 0.0, "from_noise": True}),
    ("awm_sd35m_ocr", {"ref_coef": 0.003, "noise_level": 0.4}),
    ("awm_sd35m_pickscore", {"ref_coef": 1e-4, "prompts_per_rollout": 24, "noise_level": 0.0}),
    ("flow_grpo_fast_flux_pickscore", {"num_inference_steps": 6, "global_std": False, "window": 3}),
    ("flow_grpo_fast_sd35m_pickscore", {"group_size": 18, "prompts_per_rollout": 64}),
    ("flow_grpo_flux_pickscore", {"noise_level": 0.9, "kl_coef": 0.0, "clip_range": 1e-4}),
    ("flow_grpo_sd35m_ocr", {"kl_coef": 0.004}),
    ("flow_grpo_sd35m_pickscore", {"kl_coef": 0.001}),
    ("grpo_guard_sd35m_pickscore", {"clip_range": 4e-6}),
    ("tempflow_grpo_flux_hps", {"noise_level": 0.9, "guidance_scale": 1.0, "kl_coef": 0.004}),
    ("tempflow_grpo_sd35m_pickscore", {"kl_coef": 0.001}),
])  # fmt: skip
def test_the_other_runs_differ_as_released(name, differs):
    algorithm = load_config(PAPERS[name], [toys(PAPERS[name])]).algorithm
    assert {key: getattr(algorithm, key) for key in differs} == differs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(family): of a tiny pipeline."""

    @lru_cache
    def of(family):
        folder = tmp_path_factory.mktemp(family)
        tiny.pipeline(family).save_pretrained(folder)
        return folder

    return of


@pytest.mark.parametrize("name", RUN)
def test_a_papers_run_makes_two_steps_on_a_tiny_pipeline(
    name, directory, tmp_path, monkeypatch, capfd
):
    """With nothing but overrides on the command line."""
    for draw in ("save_grid", "save_curves"):  # half of a tiny run
        monkeypatch.setattr(tracking, draw, lambda *_, **__: None)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    released(tmp_path, load_config(PAPERS[name], [toys(PAPERS[name])]))
    SEEN.clear()
    overrides = {
        "model.path": directory("sd3" if "sd35m" in name else "flux"),
        "model.height": 32,
        "model.width": 32,
        "train.mixed_precision": "no",
        "train.max_batch": 64,
        "train.steps": 2,
        "train.checkpointing_steps": 2,
        "algorithm.group_size": 2,
        "algorithm.prompts_per_rollout": 2,
        "algorithm.updates_per_rollout": 1,
        "validation.num_prompts": 1,
        "validation.num_inference_steps": 2,
    }
    overrides = [f"{key}={value}" for key, value in overrides.items()]
    status = main(["train", str(PAPERS[name]), toys(PAPERS[name]), *overrides])
    assert status == 0, capfd.readouterr().err
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "prompt_cache")
    assert run.name == name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and (run / "checkpoint-2").is_dir()
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert {f"reward/{reward}" for reward in rewards(PAPERS[name])} <= record.keys()
    assert records[0]["grad_norm"] > 0 and records[0]["ratio_mean"] == 1
    if "geneval" in name:
        rows = [{key: value for key, value in row.items() if key != "group"} for row in SEEN]
        assert all(row in (COUNTING, POSITION) for row in rows)
        assert {row["tag"] for row in SEEN} == {"counting", "position"}
