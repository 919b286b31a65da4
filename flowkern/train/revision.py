"""Which commits of a hub's model and data set a run has: found once, kept in its configuration, and
the same after a resume, whatever their branches have become.
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
        revision = config.model.revision or _begun_with(config, "model", "path")
        return commit_of(config.model.path, revision, config.model.index)
    except OSError as error:
        raise ConfigError(f"model.{error}") from error


def with_data_pinned(config: Config, accelerator: Accelerator) -> Config:
    """The configuration with the commit of its data set as data.revision, the same on all
    processes; as it is where there is none, or two of them, or the hub does not say.
    """
    data = config.data
    names = {str(path) for path in (data.train_prompts, data.test_prompts) if is_hub_id(path)}
    if len(names) != 1:
        return config
    (name,) = names

    def commit() -> str | None:
        from flowkern.models.hub import data_commit_of

        revision = data.revision or _begun_with(config, "data", "train_prompts", "test_prompts")
        return data_commit_of(name, revision) or revision

    found = data.model_copy(update={"revision": on_main(accelerator, commit)})
    return config.model_copy(update={"data": found})


def _begun_with(config: Config, section: str, *places: str) -> str | None:
    """The commit of the run that is resumed; None where there is none, or none that can be read:
    that is refused later.
    """
    name = config.train.resume_from_checkpoint
    if name is None:
        return None
    directory = config.output_dir if name == "latest" else name
    try:
        kept, now = (
            trees.read_file(Path(directory) / "config.yaml")[section],
            getattr(config, section),
        )
        is_same = all(kept[place] == getattr(now, place) for place in places)
        return str(kept["revision"]) if is_same and kept["revision"] is not None else None
    except (ConfigError, LookupError, TypeError):
        return None
