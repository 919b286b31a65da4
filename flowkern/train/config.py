"""Configuration: nested sections from YAML and dotted overrides, checked field by field.

Options that Hugging Face's training scripts also have carry the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from flowkern.checks import ABOVE_0, BELOW_1, ConfigError, Range, count
from flowkern.lookup import load
from flowkern.rl.algorithms import name_of, recipe
from flowkern.train import tree as trees
from flowkern.train.fields import (
    Algorithm,
    Collection,
    Place,
    Section,
    Text,
    build,
    is_file,
)
from flowkern.train.model_config import ModelConfig
from flowkern.train.reward_config import Rewards
from flowkern.train.validation_config import ValidationConfig, require_judges

__all__ = ["Config", "ConfigError", "Sampling", "from_dict", "load_config", "to_dict"]

Steps = Annotated[int, count(10_000_000)]
# YAML reads a bare no as false.
Precision = Annotated[
    Literal["no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
]


class DataConfig(Section):
    train_prompts: Collection
    """Prompts to train on: lines of .txt, or each with metadata for the rewards as .jsonl, .json,
    .csv or .parquet; or a data set of the hub, OWNER/NAME, or a directory of one's files, as
    `datasets` reads them."""
    test_prompts: Collection | None = None
    """Held-out prompts, in the same formats; None: no validation."""
    prompt_column: Text | None = None
    """Which column, or key, has the prompt; None: "prompt", or "caption" where there is none."""
    metadata_columns: list[Text] | None = None
    """Which ones rewards are given as metadata; None: all others."""
    dataset_config_name: Text | None = None
    """Of a data set that has several; None: its default."""
    train_split: Text | None = None
    """Of a data set, as `datasets` writes it: train, train[:1000]; None: train."""
    test_split: Text | None = None
    """Of data.test_prompts; None: test."""
    revision: Text | None = None
    """Of a data set on the hub: a branch, a tag or a commit; None: its main branch, or on a resume
    what the run began with. A run's own configuration has the commit, where it has one data set."""
    source: Text | None = None
    """Where these files are published; said where one is not there."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        paths = {"train_split": [self.train_prompts], "test_split": [self.test_prompts]}
        both = [self.train_prompts, self.test_prompts]
        for name in ("train_split", "test_split", "dataset_config_name", "revision"):
            value, places = getattr(self, name), paths.get(name, both)
            if value is not None and all(place is None or is_file(place) for place in places):
                raise ValueError(f"{name}: got {value!r}, which a file of prompts has not")
        return self


class LoraConfig(Section):
    rank: Annotated[int, count(4096)] = 32
    """Of the low-rank update of each target."""
    alpha: Annotated[int, count(2**20)] = 64
    """The update is scaled by alpha / rank."""
    target_modules: list[Text] | Text | None = None
    """Linear layers that are adapted, by the ends of their names, or by one regular expression of
    whole names; None: those of the model's family."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target_modules == []:
            raise ValueError("target_modules: got none, expected at least one name")
        return self


class TrainConfig(Section):
    steps: Steps
    """Optimizer steps."""
    max_batch: Annotated[int, count(2**20)] = 16
    """Network calls that run as one batch, at most, in sampling and training, on each process."""
    prompts_per_block: Annotated[int | None, count(2**16)] = None
    """Prompts that are sampled and scored together, at most, on each process: the latents of no
    others are on the device, and what training needs of them waits on the host. None: all; a
    video's wait there, too."""
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    """torch's AdamW; the same in one kernel for all weights; or torchao's, for all weights (lora:
    null), whose moments take 2 bytes of each instead of 8."""
    learning_rate: Annotated[float, Range(0, above=True, most=1e6)] = 3e-4
    """Of AdamW, at its highest."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """The learning rate over train.steps, as diffusers' scripts name it."""
    lr_warmup_steps: Annotated[int, Range(0, most=10_000_000)] = 0
    """Optimizer steps over which it rises linearly first; not with "constant"."""
    adam_beta1: Annotated[float, BELOW_1] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, BELOW_1] = 0.999
    """Decay of AdamW's mean of squares."""
    adam_weight_decay: Annotated[float, Range(0, most=1e6)] = 1e-4
    """AdamW's decoupled weight decay."""
    adam_epsilon: Annotated[float, Range(1e-30)] = 1e-8
    """Added to AdamW's denominator; float32 has it, so that a gradient of 0 moves nothing."""
    max_grad_norm: Annotated[float, ABOVE_0] = 1.0
    """The gradient is scaled down to this norm."""
    ema_decay: Annotated[float | None, BELOW_1] = None
    """Validate, and store in checkpoint-N/ema, a running mean of the weights with at most this
    decay, taken once per optimizer step; None: the weights themselves."""
    offload_ema: bool = False
    """Keep that mean in the host's memory: 4 bytes of each trained weight are free on the device,
    and cross twice in an optimizer step. The numbers are the same."""
    mixed_precision: Precision = "no"
    """The network's dtype; weights that are trained, latents and the loss stay in float32."""
    sharding: Literal["fsdp2", "hsdp"] | None = None
    """Of several processes, what each has of the network: fsdp2: a part, under lora of the frozen
    weights; hsdp: a part of it within its node; None: all of it."""
    rollout_unshard: Literal["auto"] | bool = "auto"
    """Under train.sharding: gather all weights once while samples are drawn, not at every call;
    auto: where they take at most half of the device's free memory, and not on a CPU."""
    ratio_guard: Literal["stop", "warn"] | None = "stop"
    """Where a rollout of images has several updates that clip a ratio, the first is held against
    what sampling said: its ratio is 1, or a quarter of the clip range from it at most, or else the
    run stops, with what `flowkern doctor` says of it; warn: it says so once; None: nobody looks."""
    checkpointing_steps: Steps = 100
    """Optimizer steps between checkpoints; one is always written at the end."""
    checkpointing_minutes: Annotated[float | None, ABOVE_0] = None
    """Minutes since the last one after which another is written, at the end of an iteration; None:
    by steps alone."""
    checkpoints_total_limit: Annotated[int | None, ABOVE_0] = None
    """How many checkpoints to keep, the latest; None: all."""
    resume_from_checkpoint: Text | None = None
    """A checkpoint directory, or "latest" of output_dir."""
    overwrite_output_dir: bool = False
    """Start anew in an output_dir that holds a run, and delete that run."""
    max_failed_rewards: Annotated[float, Range(0, 1)] = 0.05
    """Of the images of the last ten rollouts, the share that may have no score, for reasons outside
    of the run; beyond it the run stops. A run's first rollouts count as the first of ten. It stops
    at once where a rollout has no score at all."""
    report_to: Text | None = None
    """A tracker of accelerate beside metrics.jsonl: "tensorboard", "wandb", ..."""
    push_to_hub: bool = False
    """At the end, write what `flowkern export` writes, of the checkpoint that best.json names where
    validation.metric is set, else of the latest, and upload it; takes a login."""
    hub_model_id: Text | None = None
    """Of the Hugging Face hub, OWNER/NAME: where to."""
    hub_private_repo: bool = False
    """Make that repository a private one, where it is not there yet."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"lr_warmup_steps: got {self.lr_warmup_steps}, which train.lr_scheduler=constant "
                "ignores; expected train.lr_scheduler=constant_with_warmup"
            )
        if self.offload_ema and self.ema_decay is None:
            raise ValueError("offload_ema: got true, but train.ema_decay is null: there is no mean")
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("hub_model_id: expected beside train.push_to_hub=true, and there only")
        if self.hub_private_repo and not self.push_to_hub:
            raise ValueError("hub_private_repo: got true, but train.push_to_hub is false")
        if self.rollout_unshard != "auto" and self.sharding is None:
            raise ValueError(
                f"rollout_unshard: got {str(self.rollout_unshard).lower()}, which "
                "train.sharding=null ignores; expected auto"
            )
        return self


class Config(Section):
    output_dir: Place
    """The run directory: metrics, samples, checkpoints."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Of prompts, noise and initial weights."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """The prompts."""
    reward: Rewards
    """What the images are scored with."""
    lora: LoraConfig | None = Field(default_factory=LoraConfig)
    """Which weights move; None: all of the network, kept and saved in float32 and computed with in
    train.mixed_precision. The reference of a KL is then a copy of them, and a learning rate is a
    tenth or less of an adapter's."""
    train: TrainConfig
    """The optimizer and the files."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Held-out prompts, scored and drawn."""
    algorithm: Algorithm
    """The recipe: `name`, or "module:Class" of your own, and what differs from its defaults."""

    @model_validator(mode="after")
    def _judges(self) -> Self:
        is_validated = self.data.test_prompts is not None
        require_judges(self.validation, is_validated, self.reward, self.algorithm.task)
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
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
        return self


class Sampling(Section):
    """What drawing images takes of a run. Neither recipe nor rewards: a checkpoint may come from
    anyone, and nothing that it names is imported."""

    model: ModelConfig
    """What was trained."""
    lora: LoraConfig | None = Field(default_factory=LoraConfig)
    """The adapter's shape; None: all weights were trained."""
    train: TrainConfig
    """The precision, and how many network calls are a batch."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """The sampler."""


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, or in several, merged from the first to the last, with
    ``key.path=value`` overrides.

    Raises ConfigError naming the key: unknown (with the nearest known name), missing, given twice,
    of the wrong type or out of range.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    return from_dict(trees.read(paths, overrides))


def load_sampling(path: str | Path) -> Sampling:
    """What `Sampling` has, of the configuration in a checkpoint; the rest is not looked at."""
    tree = trees.read_file(path)
    names = Sampling.model_fields.keys() & tree.keys()
    return build(Sampling, {name: tree[name] for name in names})


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration of nested mappings, checked as `load_config` says."""
    return build(sections(tree), tree)


CONFIGS = {"flow": Config, "planner": "flowkern.train.planner_config:PlannerConfig"}
"""By the task of a recipe, the sections of its configuration; of another task, those of images."""


def sections(tree: Mapping[str, Any]) -> type[Config]:
    """Of the algorithm that the configuration names; what is wrong with it is said later."""
    algorithm = tree.get("algorithm")
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    if not isinstance(name, str):
        return Config
    found = CONFIGS.get(recipe(name).task, Config)
    return load(found, {found: found}) if isinstance(found, str) else found


def to_dict(config: Config) -> dict[str, Any]:
    """Nested mappings that `from_dict` takes: every field, the defaults included."""
    recipe = {"name": name_of(config.algorithm), **dataclasses.asdict(config.algorithm)}
    return config.model_dump(exclude={"algorithm"}) | {"algorithm": recipe}
