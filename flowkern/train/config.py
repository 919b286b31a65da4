"""Configuration: nested dataclasses from YAML and dotted overrides, checked field by field.

Options that Hugging Face's training scripts also have carry the same names.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from flowkern.rl.algorithms import name_of, recipe, require

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ATTENTION += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """A local diffusers pipeline directory."""
    height: int | None = None
    """Image height in pixels; None: the pipeline's own."""
    width: int | None = None
    """Image width in pixels; None: the pipeline's own."""
    max_sequence_length: int | None = None
    """T5 tokens of a prompt; None: as the pipeline has it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        require(self, "above 0", "height", "width")
        require(self, "at least 0", "max_sequence_length")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train_prompts: str
    """Prompts to train on: .txt lines, or rows of "prompt" and metadata for the rewards as .jsonl,
    .json or .csv."""
    test_prompts: str | None = None
    """Held-out prompts, in the same formats; None: no validation."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    weights: dict[str, float]
    """What is optimized: the weighted sum of these rewards, by name or as "module:attribute"."""
    report: list[str] = field(default_factory=list)
    """Rewards that are only reported: judges of what the optimized ones miss."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: got none, expected at least one reward")
        if not any(self.weights.values()):
            raise ValueError("weights: got 0 for every reward, expected one that counts")
        for name, weight in self.weights.items():
            if abs(weight) > 1e100:  # times a score it would be no number
                raise ValueError(f"weights.{name}: got {weight}, expected at most 1e100 in size")
        twice = sorted(set(self.weights) & set(self.report))
        if twice:
            raise ValueError(f"report: {twice[0]!r} is in reward.weights already")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 32
    """Of the low-rank update of each target."""
    alpha: int = 64
    """The update is scaled by alpha / rank."""
    target_modules: list[str] = field(default_factory=lambda: list(ATTENTION))
    """Linear layers that are adapted, by the end of their name."""

    def __post_init__(self) -> None:
        require(self, "above 0", "rank", "alpha")
        if not self.target_modules:
            raise ValueError("target_modules: got none, expected at least one name")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer steps."""
    max_batch: int = 16
    """Rows of one network call at most, in sampling and in training, on each process."""
    learning_rate: float = 3e-4
    """Of AdamW, at its highest."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """The learning rate over train.steps, as diffusers' scripts name it."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which it rises linearly first; not with "constant"."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squares."""
    adam_weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    ema_decay: float | None = None
    """Validate, and store in checkpoint-N/ema, a running mean of the weights with at most this
    decay, taken once per optimizer step; None: the weights themselves."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """The network's dtype; LoRA weights, latents and the loss stay in float32."""
    checkpointing_steps: int = 100
    """Optimizer steps between checkpoints; one is always written at the end."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints to keep, the latest; None: all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or "latest" of output_dir."""
    overwrite_output_dir: bool = False
    """Start anew in an output_dir that holds a run, and delete that run."""
    report_to: str | None = None
    """A tracker of accelerate beside metrics.jsonl: "tensorboard", "wandb", ..."""

    def __post_init__(self) -> None:
        require(self, "above 0", "steps", "max_batch", "learning_rate", "adam_epsilon")
        require(self, "above 0", "max_grad_norm", "checkpointing_steps", "checkpoints_total_limit")
        require(self, "at least 0", "adam_weight_decay", "lr_warmup_steps")
        require(self, "from 0 to below 1", "adam_beta1", "adam_beta2", "ema_decay")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"lr_warmup_steps: got {self.lr_warmup_steps}, which train.lr_scheduler=constant "
                "ignores; expected train.lr_scheduler=constant_with_warmup"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    steps: int = 100
    """Optimizer steps between validations; one is always made at the start and at the end."""
    num_prompts: int = 20
    """How many of data.test_prompts, the first, one image each."""
    num_images: int = 20
    """How many of these are shown in samples/step-N.png."""
    num_inference_steps: int = 40
    """Steps of the deterministic sampler."""
    guidance_scale: float = 4.5
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        require(self, "above 0", "steps", "num_prompts", "num_images", "num_inference_steps")
        require(self, "at least 0", "guidance_scale")


@dataclass(frozen=True, kw_only=True)
class Config:
    output_dir: str
    """The run directory: metrics, samples, checkpoints."""
    seed: int = 0
    """Of prompts, noise and initial weights."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """The prompts."""
    reward: RewardConfig
    """What the images are scored with."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Which weights move."""
    train: TrainConfig
    """The optimizer and the files."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out prompts, scored and drawn."""
    algorithm: Any
    """The recipe: `name`, or "module:Class" of your own, and what differs from its defaults."""

    def __post_init__(self) -> None:
        recipe, updates = self.algorithm, self.algorithm.updates_per_rollout
        for key, value in (
            ("train.steps", self.train.steps),
            ("algorithm.prompts_per_rollout", recipe.prompts_per_rollout),
        ):
            if value % updates:
                raise ValueError(
                    f"{key}: got {value}, expected a multiple of algorithm.updates_per_rollout, "
                    f"{updates}"
                )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2**63 - 1")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with ``key.path=value`` overrides.

    Raises ConfigError naming the key: unknown (with the nearest known name), missing, of the wrong
    type or out of range.
    """
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, expected a mapping of keys")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise ConfigError(f"override: got {override!r}, expected key.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: got {text!r}, not YAML: {error}") from None
        _set(tree, key, value)
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration of nested mappings, checked as `load_config` says."""
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested mappings that `from_dict` takes: every field, the defaults included."""
    tree = dataclasses.asdict(config)
    return tree | {"algorithm": {"name": name_of(config.algorithm), **tree["algorithm"]}}


def _set(tree: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(parents[: depth + 1])}: is a value, and has no {last!r}")
    tree[last] = value


def _build(kind: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'config'}: got {tree!r}, expected a mapping of keys")
    hints, values = typing.get_type_hints(kind), {}
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"{path}{key}: unknown key{_nearest(str(key), fields)}")
        values[key] = _value(hints[key], value, f"{path}{key}")
    for name, item in fields.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{path}{name}: missing, and has no default")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path}{error}") from None


def _value(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if key == "algorithm":
        return _algorithm(value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if origin in (types.UnionType, Union):  # X | None
        return None if value is None else _value(arguments[0], value, key)
    if origin is Literal and value is False and "no" in arguments:
        value = "no"  # YAML reads a bare no as false
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {name: _value(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float:
        number = _number(value)
        if number is not None:
            return number
    if origin is Literal:
        is_fine = value in arguments
    else:
        is_fine = hint is not float and type(value) is (origin or hint)
    if not is_fine:
        expected = {int: "an integer", float: "a finite number", str: "a string", bool: "a bool"}
        wanted = "one of " + ", ".join(map(str, arguments)) if origin is Literal else None
        wanted = wanted or expected.get(hint) or {list: "a list", dict: "a mapping"}[origin]
        raise ConfigError(f"{key}: got {value!r}, expected {wanted}")
    return value


def _number(value: Any) -> float | None:
    """A finite float, or None. YAML reads 1e-4 as a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _algorithm(tree: Any) -> Any:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
        raise ConfigError(f"algorithm.name: missing in {tree!r}, expected an algorithm's name")
    options = {key: value for key, value in tree.items() if key != "name"}
    try:
        kind = recipe(tree["name"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return _build(kind, options, "algorithm.")


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
