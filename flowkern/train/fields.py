"""From a mapping to a checked dataclass: types and ranges as its fields state them, and for every
unknown key the one that was probably meant.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NewType, Union

from flowkern.checks import ConfigError, shown
from flowkern.lookup import nearest
from flowkern.rl.algorithms import PolicyRecipe, Recipe, recipe

Place = NewType("Place", str)
"""A file or a directory: absolute once it is read, so that a run's own configuration serves from
anywhere."""

# What other trainers call these.
ALIASES = {
    "lr": "train.learning_rate",
    "wd": "train.adam_weight_decay",
    "weight_decay": "train.adam_weight_decay",
    "bs": "train.max_batch",
    "batch_size": "train.max_batch",
    "train_batch_size": "train.max_batch",
    "epochs": "train.steps",
    "num_epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "grad_clip": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "warmup_steps": "train.lr_warmup_steps",
    "ema": "train.ema_decay",
    "dtype": "train.mixed_precision",
    "precision": "train.mixed_precision",
    "resume": "train.resume_from_checkpoint",
    "save_steps": "train.checkpointing_steps",
    "save_freq": "train.checkpointing_steps",
    "eval_steps": "validation.steps",
    "eval_freq": "validation.steps",
    "algo": "algorithm.name",
    "beta": "algorithm.kl_coef",
    "kl": "algorithm.kl_coef",
    "kl_beta": "algorithm.kl_coef",
    "kl_coeff": "algorithm.kl_coef",
    "eta": "algorithm.noise_level",
    "clip": "algorithm.clip_range",
    "clip_eps": "algorithm.clip_range",
    "epsilon": "algorithm.clip_range",
    "cfg": "algorithm.guidance_scale",
    "cfg_scale": "algorithm.guidance_scale",
    "guidance": "algorithm.guidance_scale",
    "num_generations": "algorithm.group_size",
    "num_image_per_prompt": "algorithm.group_size",
    "num_steps": "algorithm.num_inference_steps",
    "sampling_steps": "algorithm.num_inference_steps",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "model_path": "model.path",
    "pretrained_model": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "resolution": "model.height",
    "prompts": "data.train_prompts",
    "dataset": "data.train_prompts",
    "reward_fn": "reward.weights",
    "output": "output_dir",
    "save_dir": "output_dir",
    "run_dir": "output_dir",
}


def build(kind: type, tree: Any, path: str = "", root: type | None = None) -> Any:
    """The dataclass `kind` of a mapping, its fields checked as their annotations say.

    path: the full key of the mapping, with a dot. root: of all keys; None: `kind` itself.
    Raises ConfigError naming the full key.
    """
    root = root or kind
    if not isinstance(tree, Mapping):
        name = path.removesuffix(".") or "config"
        raise ConfigError(f"{name}: got {shown(tree)}, expected a mapping of keys")
    try:
        hints, values = typing.get_type_hints(kind), {}
    except Exception as error:  # of a recipe of one's own
        raise ConfigError(f"{path}{type(error).__name__}: {error}") from error
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"{path}{key}: unknown key{_meant(str(key), path, fields, root)}")
        values[key] = _value(hints[key], value, f"{path}{key}", root)
    for name, item in fields.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{path}{name}: missing, and has no default")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path}{error}") from None
    except Exception as error:  # of a recipe of one's own
        raise ConfigError(f"{path}{type(error).__name__}: {error}") from error


def _value(hint: Any, value: Any, key: str, root: type) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Recipe:
        return _recipe(value, key, root)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.", root)
    if origin in (types.UnionType, Union):  # X | None
        return None if value is None else _value(arguments[0], value, key, root)
    if origin is Literal and value is False and "no" in arguments:
        value = "no"  # YAML reads a bare no as false
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{key}[{i}]", root) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        name_hint, item_hint = arguments
        return {
            _value(name_hint, name, key, root): _value(item_hint, item, f"{key}.{name}", root)
            for name, item in value.items()
        }
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint is Place and _is_text(value):
        return os.path.abspath(os.path.expanduser(value))
    if hint is Any or _is_fine(hint, value):
        return value
    wanted = {
        int: "an integer", float: "a finite number", str: "a string", bool: "a bool",
        Place: "a path", list: "a list", dict: "a mapping",
        Literal: "one of " + ", ".join(map(str, arguments)),
    }  # fmt: skip
    expected = wanted.get(origin or hint, str(hint))
    raise ConfigError(f"{key}: got {shown(value)}, expected {expected}")


def _is_fine(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:  # 1 is not True
        return any(value == a and type(value) is type(a) for a in typing.get_args(hint))
    if hint is str:
        return _is_text(value)
    return hint is not float and type(value) is (origin or hint)


def _is_text(value: Any) -> bool:
    """A string that names something, and that a file can hold."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _number(value: Any) -> float | None:
    """A finite float, or None. YAML reads 1e-4 as a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _recipe(tree: Any, key: str, root: type) -> Recipe:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
        raise ConfigError(f"{key}.name: missing in {shown(tree)}, expected an algorithm's name")
    options = {name: value for name, value in tree.items() if name != "name"}
    return build(recipe(tree["name"]), options, f"{key}.", root)


def _meant(key: str, path: str, known: Mapping[str, Any], root: type) -> str:
    """What to say of an unknown key: the full one that was probably meant, or those there are."""
    name = key.replace("-", "_").lower()
    close, far = nearest(name, known, cutoff=0.75), nearest(name, known, cutoff=0.5)
    elsewhere = next((full for full in _keys(root) if full.rpartition(".")[2] == name), None)
    found = (close and path + close) or ALIASES.get(name) or elsewhere or (far and path + far)
    is_another = found and found != path + key  # the very key may be one of other algorithms
    return f"; did you mean {found!r}?" if is_another else f"; known are {', '.join(known)}"


def _keys(kind: type, path: str = "") -> Iterator[str]:
    """All full keys; of algorithms those that most have."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = PolicyRecipe if hint is Recipe else hint
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{path}{name}.")
        elif typing.get_origin(hint) is not typing.ClassVar:
            yield path + name
