"""The adapter's files: what others read of them, and that nothing that they name is imported."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

from flowkern.checks import ConfigError
from flowkern.models.lora import WEIGHTS
from flowkern.train.config import LoraConfig
from flowkern.train.lora import add_lora, restore_lora
from flowkern.train.trained import attach_trained

MODEL = Path(__file__).resolve().parents[2] / "assets/digits-sd3"
CONFIG = LoraConfig(rank=4, alpha=8, target_modules=["to_q", "to_out.0"])
PIPELINE_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, loaded):
    """(directory, the model with a trained adapter, a block of whose network is compiled)"""
    directory = tmp_path_factory.mktemp("lora")
    model = loaded(MODEL)
    network = add_lora(model, CONFIG)
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=generator)
    blocks = network.base_model.model.transformer_blocks
    plain, blocks[0] = blocks[0], torch.compile(blocks[0])
    before = os.umask(0o027)
    try:
        model.save_lora(directory)
    finally:
        os.umask(before)
        blocks[0] = plain
    return directory, model


def velocity(model):
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prompts = model.encode(["the digit 3", "the digit 4"])
        return model.velocity(x_t, torch.tensor([0.9, 0.4]), prompts)


def test_tensors_alone_carry_the_whole_strength(saved, loaded):
    """As a loader applies them that knows of no alpha: W + B A."""
    directory, trained = saved
    tensors = load_file(directory / PIPELINE_FILE)
    assert tensors and not any("_orig_mod" in name for name in tensors)
    model = loaded(MODEL)
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            model.network.get_submodule(layer).weight.data += up @ down
    expected = velocity(trained)
    assert (velocity(loaded(MODEL)) - expected).abs().max() > 0.1
    torch.testing.assert_close(velocity(model), expected, rtol=0, atol=1e-4)


def test_diffusers_draws_the_same_bits_as_the_run(saved, loaded):
    directory, trained = saved
    model = loaded(MODEL)
    model.pipeline.load_lora_weights(directory)
    model.network = model.pipeline.transformer
    assert torch.equal(velocity(model), velocity(trained)), "alpha / rank is a power of two"


def test_the_group_reads_it_and_the_base_model_is_named(saved):
    directory = saved[0]
    files = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert {WEIGHTS, "adapter_config.json", PIPELINE_FILE} <= files.keys()
    assert set(files.values()) == {0o640}, files
    adapter = json.loads((directory / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]) == MODEL
    assert adapter["lora_alpha"] == 8 and not any(
        "_orig_mod" in n for n in load_file(directory / WEIGHTS)
    )


def test_it_goes_back_where_it_came_from_and_nothing_named_in_it_is_imported(
    saved, loaded, tmp_path
):
    directory, trained = saved
    adapter = json.loads((directory / "adapter_config.json").read_text())
    adapter |= {"megatron_config": {"x": 1}, "megatron_core": "evil_core"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    old = {  # as was written before names were plain
        name.replace("transformer_blocks.0.", "transformer_blocks.0._orig_mod."): value
        for name, value in load_file(directory / WEIGHTS).items()
    }
    save_file(old, tmp_path / WEIGHTS)
    (tmp_path / "evil_core.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    try:
        for where in (directory, tmp_path):
            model = loaded(MODEL)
            attach_trained(model, CONFIG, where)
            assert torch.equal(velocity(model), velocity(trained))
        assert "evil_core" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))
    for other, message in (
        (LoraConfig(rank=8, target_modules=CONFIG.target_modules), "lora.rank: .* has shape"),
        (LoraConfig(rank=4, target_modules=["to_q"]), "lora.target_modules: .* holds"),
        (LoraConfig(rank=4, target_modules=["to_q", "to_out.0", "to_k"]), ".* lacks"),
    ):
        model = loaded(MODEL)
        add_lora(model, other)
        with pytest.raises(ConfigError, match=message):
            restore_lora(model, directory)
