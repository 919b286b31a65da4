"""Which commit of a hub's model a run has: found once, kept in its configuration, and the same
after a resume, whatever its branch has become.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from flowkern.checks import ConfigError
from flowkern.lookup import is_hub_id
from flowkern.train import tree as trees
from flowkern.train.config import Config
from flowkern.train.distributed import on_main


def pinned(config: Config, accelerator: Accelerator) -> Config:
    """The configuration with the commit as model.revision, the same on all processes.

    Raises ConfigError, naming the key, where the hub has no such model.
    """
    if not is_hub_id(config.model.path):
        return config
    commit = on_main(accelerator, lambda: _commit(config))
    model = config.model.model_copy(update={"revision": commit})
    return config.model_copy(update={"model": model})


def _commit(config: Config) -> str:
    from flowkern.models.hub import commit_of

    try:
        revision = config.model.revision or _begun_with(config)
        return commit_of(config.model.path, revision, config.model.index)
    except OSError as error:
        raise ConfigError(f"model.{error}") from error


def _begun_with(config: Config) -> str | None:
    """The commit of the run that is resumed; None where there is none, or none that can be read:
    that is refused later.
    """
    name = config.train.resume_from_checkpoint
    if name is None:
        return None
    directory = config.output_dir if name == "latest" else name
    try:
        model = trees.read_file(Path(directory) / "config.yaml")["model"]
        return str(model["revision"]) if model["path"] == config.model.path else None
    except (ConfigError, LookupError, TypeError):
        return None
