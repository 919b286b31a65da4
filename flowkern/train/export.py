"""What a run learned as others load it: an adapter or weights for diffusers and peft, or the whole
pipeline with them in it, each with a card.

Only files are copied, but where weights are merged. The configuration in a checkpoint is read as
plain values: it may come from anyone, and nothing that it names is imported.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flowkern.checks import ConfigError
from flowkern.models import Model, hub, load_model
from flowkern.models.directory import INDEX, cannot_be_loaded, components, read_index
from flowkern.rl.algorithms import PLANNERS
from flowkern.train import tree as trees
from flowkern.train.card import write_card
from flowkern.train.checkpoint import MANIFEST, chosen, step_of, taking
from flowkern.train.config import ModelConfig, Sampling, load_sampling
from flowkern.train.durable import PARTIAL
from flowkern.train.errors import RunError, describe
from flowkern.train.loading import OURS
from flowkern.train.trained import attach_trained

STATE = ("state.pt", "config.yaml", "prompts.json", MANIFEST, "ema")
"""Of a checkpoint, what a run goes on with; the rest is what was learned."""


def export(
    place: Path, output: Path | None = None, merged: bool = False, name: str | None = None
) -> Path:
    """Write what a checkpoint learned, of a run its latest, into a new folder; returns that.

    The running mean of the weights, where the run validated it. output: None: export-N beside the
    checkpoint of step N. merged: into a copy of the pipeline that was trained. name: its id on the
    hub, for the card.
    Raises ConfigError for no checkpoint, an output that is there, or a pipeline that is not.
    """
    checkpoint = chosen(place)
    if output is None:
        output = checkpoint.parent / f"export-{checkpoint.name.rpartition('-')[2]}"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {str(output)!r} is there; remove it, or name another")
    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(checkpoint, partial, merged, name)
        if output.is_dir():
            output.rmdir()
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{output} cannot be written: {_why(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _why(error: Exception) -> str:
    """Of what copies or writes: a folder's copy raises a list of (from, to, why)."""
    found = error.args[0] if isinstance(error, shutil.Error) else None
    if isinstance(found, list) and found:
        return re.sub(r"^\[Errno \d+\] ([^:]+): .*$", r"\1", str(found[0][-1]))
    return getattr(error, "strerror", None) or describe(error)


def fill(checkpoint: Path, directory: Path, merged: bool, name: str | None) -> None:
    """A folder with all that an export has."""
    tree = trees.read_file(checkpoint / "config.yaml")
    learned = checkpoint / "ema" if (checkpoint / "ema").is_dir() else checkpoint
    if merged:
        if (tree.get("algorithm") or {}).get("name") in PLANNERS:
            raise ConfigError("--merged: is for pipelines; peft merges a language model's adapter")
        merge(load_sampling(checkpoint / "config.yaml"), learned, directory)
    else:
        for path in sorted(learned.iterdir()):
            if path.name not in STATE:
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, directory / path.name)
    shutil.copyfile(checkpoint / "config.yaml", directory / "config.yaml")
    write_card(checkpoint.parent, tree, directory, step_of(checkpoint.resolve()), name)


# ---- merged ----


def merge(config: Sampling, learned: Path, directory: Path) -> None:
    """A copy of the pipeline whose network has what was learned: added in float32, and each weight
    stored in the dtype that it has there."""
    model = _base(config)
    with taking(learned, "checkpoint"):
        attach_trained(model, config.lora, learned)
    network = model.network
    if config.lora is not None:
        network = network.merge_and_unload(safe_merge=True)
    base = Path(model.directory)
    if model.revision is not None:
        base = hub.directory_of(model.base, model.revision)  # with its text encoders
    for name in components(read_index(base)):
        if name not in model.parts:
            unread = shutil.ignore_patterns(*hub.UNREAD)
            shutil.copytree(base / name, directory / name, ignore=unread)
    shutil.copyfile(base / INDEX, directory / INDEX)
    for name in model.parts:
        part, stored = getattr(model.pipeline, name), _dtypes(base / name)
        for key, weight in part.named_parameters():
            weight.data = weight.data.to(stored.get(key, weight.dtype))
        part.save_pretrained(directory / name)


def _base(config: Sampling) -> Model:
    """The pipeline that was trained, its network in float32 on the host."""
    options = config.model
    try:
        return load_model(
            options.path,
            dtype=torch.float32,
            text_encoders=False,
            **options.model_dump(exclude=OURS),
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        message = cannot_be_loaded(options.path, error, list(ModelConfig.model_fields))
        raise ConfigError(f"model.{message}") from error


def _dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Of the weights of a network, by name, as they are stored."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not any(file.match(pattern) for pattern in hub.UNREAD):
            with safe_open(file, "pt") as stored:
                for key in stored.keys():
                    found[key] = DTYPES.get(stored.get_slice(key).get_dtype(), torch.float32)
    return found


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---- the hub ----


def require_login(name: str, key: str) -> None:
    """Raise ConfigError for what is no id, and where nobody is logged in."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ConfigError(f"{key}: {describe(error)}") from None
    if "/" not in name:
        raise ConfigError(f"{key}: got {name!r}, expected OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{key}: HF_HUB_OFFLINE is set, so that nothing can be pushed")
    if get_token() is None:
        raise ConfigError(f"{key}: nobody is logged in here: hf auth login, or HF_TOKEN")


def push(directory: Path, name: str, private: bool = False, api: Any = None) -> str:
    """Upload a folder to a model of the hub, OWNER/NAME, which is made where it is not there;
    returns its address. Raises RunError, of one line, where that fails.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="flowkern export")
    except Exception as error:  # the hub's, its HTTP client's, the file system's
        raise RunError(
            f"{str(directory)!r} is written, and cannot be pushed to {name!r}: "
            f"{describe(error):.300}"
        ) from error
    return str(made)
