"""Pipelines read from their files once a process, of which each test has a copy of its own."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

FILE = "diffusion_pytorch_model.safetensors"
TOKENIZERS = ("tokenizer",)
TEXT = (*TOKENIZERS, "text_encoder")
FROZEN = (*TEXT, "vae")
"""Parts that no training changes."""


class LoadedOnce:
    """`load_model`, of directories that nobody changes."""

    def __init__(self) -> None:
        self.made = {}

    def __call__(self, path: str | Path, shared: tuple[str, ...] = TEXT, **options):
        """shared: parts that the copy has in common with others; with text encoders, what they have
        encoded too.
        """
        from flowkern.models import load_model
        from flowkern.models.encoded import InMemory
        from flowkern.models.text import REMEMBERED

        key = str(path), repr(sorted(options.items()))
        if key not in self.made:
            self.made[key] = load_model(path, **options)
        model = self.made[key]
        kept = [p for name, p in model.pipeline.components.items() if name.startswith(shared)]
        memo = {id(part): part for part in kept}
        rows = model._encoded if "text_encoder" in shared else InMemory(REMEMBERED)
        return copy.deepcopy(model, memo | {id(model._encoded): rows})


def shortened(source: Path, target: Path) -> Path:
    """A directory with the demo's pipeline but for the inner blocks of its network: what tests of
    the loop are about does not know of them, and they are a third of a run.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    source, target = source / "transformer", target / "transformer"
    config = json.loads((source / "config.json").read_text())
    begin, last = "transformer_blocks.0.", f"transformer_blocks.{config['num_layers'] - 1}."
    weights = {
        name.replace(last, "transformer_blocks.1."): weight
        for name, weight in load_file(source / FILE).items()
        if not name.startswith("transformer_blocks.") or name.startswith((begin, last))
    }
    (target / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    save_file(weights, target / FILE, {"format": "pt"})
    return target.parent


def read_once(setattr, path: Path, loaded: LoadedOnce) -> None:
    """Runs of the model at `path` take `loaded`'s, but for those that do without text encoders; and
    where pipelines cannot be loaded, there are none.
    """
    if not all(find_spec(name) for name in ("diffusers", "transformers")):
        return
    from flowkern.train import loading

    load = loading.load_model

    def model(given, text_encoders=True, **options):
        if given == str(path) and text_encoders:
            return loaded(given, FROZEN, **options)
        return load(given, text_encoders=text_encoders, **options)

    setattr(loading, "load_model", model)
