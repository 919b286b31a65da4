"""Pipelines read from their files once a process, of which each test has a copy of its own."""

import copy
from pathlib import Path

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


def read_once(setattr, path: Path, loaded: LoadedOnce) -> None:
    """Runs of the model at `path` take `loaded`'s, but for those that do without text encoders."""
    from flowkern.train import loading

    load = loading.load_model

    def model(given, text_encoders=True, **options):
        if given == str(path) and text_encoders:
            return loaded(given, FROZEN, **options)
        return load(given, text_encoders=text_encoders, **options)

    setattr(loading, "load_model", model)
