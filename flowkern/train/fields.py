"""From a mapping to a checked section: pydantic decodes, strictly, and what it refuses is said in a
line: the full key, what came, what was wanted, and for an unknown key the one that was probably
meant.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from flowkern.checks import ConfigError, Held, shown
from flowkern.lookup import is_hub_id, nearest
from flowkern.rl.algorithms import recipe
from flowkern.rl.recipe import AnyRecipe, PolicyRecipe
from flowkern.rl.turns import TurnRecipe


def wanted(what: str) -> PydanticCustomError:
    """To be raised by a field's validator: says what came, too."""
    return PydanticCustomError("wanted", what)


def _text(value: str) -> str:
    """A string that names something, and that a file can hold."""
    if not value.strip() or "\0" in value:
        raise wanted("a string that is not blank, without a NUL")
    return value


def _phrase(value: str) -> str:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise wanted("text, without a NUL or half of a surrogate pair")
    return value


def _place(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise wanted("a path")
    return os.path.abspath(os.path.expanduser(value))


def _origin(value: Any) -> str:
    place = _place(value)
    return value if is_hub_id(value) else place


def _collection(value: Any) -> str:
    place = _place(value)
    is_id = is_hub_id(value) and not os.path.exists(place) and not is_file(value)
    return value if is_id else place


SUFFIXES = {".txt", ".jsonl", ".ndjson", ".json", ".csv", ".parquet"}
"""Of a file of prompts: what ends so is one, there or not."""


def is_file(path: str) -> bool:
    """Is it one of prompts, and not a directory or a data set?"""
    is_data_set = os.path.isdir(path) or is_hub_id(path)
    return os.path.splitext(path)[1].lower() in SUFFIXES or not is_data_set


Text = Annotated[str, AfterValidator(_text)]
Phrase = Annotated[str, AfterValidator(_phrase)]
"""What a text encoder takes: also nothing."""
Place = Annotated[str, BeforeValidator(_place)]
"""A file or a directory: absolute once it is read, so that a run's own configuration serves from
anywhere."""
Origin = Annotated[str, BeforeValidator(_origin)]
"""A directory as a `Place`, or the id of a model on the hub, OWNER/NAME, as it is."""


Collection = Annotated[str, BeforeValidator(_collection)]
"""A file or a directory as a `Place`, or the id of a data set on the hub, OWNER/NAME, as it is."""


class Section(BaseModel):
    """A mapping of the configuration: no other keys than its fields, no value of another type, and
    none outside of the range that a field states."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: Any) -> Any:
        is_closed = cls.model_config["extra"] == "forbid" and isinstance(tree, Mapping)
        for key in tree if is_closed else ():
            if key not in cls.model_fields:
                # Half of a surrogate pair is no text to pydantic's core.
                name = str(key).encode("utf-8", "backslashreplace").decode()
                known = {"key": name, "known": list(cls.model_fields)}
                raise PydanticCustomError("unknown", "unknown key", known)
        return tree

    @field_validator("*", mode="before")
    @classmethod
    def _is_chosen(cls, value: Any, info: ValidationInfo) -> Any:
        """Of a few integers: true equals 1, and 2.0 equals 2, for pydantic."""
        hint = cls.model_fields[info.field_name].annotation
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if all(type(one) is int for one in choices) and choices and type(value) is not int:
            wanted = {"wanted": ", ".join(map(str, choices))}
            raise PydanticCustomError("wanted", "one of {wanted}", wanted)
        return value

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, field in type(self).model_fields.items():
            for note in field.metadata:
                if isinstance(note, Held):
                    note.check(name, getattr(self, name))
        return self


def _recipe(tree: Any) -> AnyRecipe:
    if isinstance(tree, AnyRecipe):
        return tree
    if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
        raise ConfigError(f"algorithm.name: missing in {shown(tree)}, expected algorithm.name=NAME")
    kind, options = recipe(tree["name"]), {n: v for n, v in tree.items() if n != "name"}
    try:
        found = _options_of(kind).model_validate(options)
        return kind(**{name: getattr(found, name) for name in found.model_fields_set})
    except ValueError:
        raise
    except Exception as error:  # of a recipe of one's own
        raise ConfigError(f"algorithm.{type(error).__name__}: {error}") from error


def _options_of(kind: type[AnyRecipe]) -> type[Section]:
    """The fields of a recipe as a section."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {}
    for item in dataclasses.fields(kind):
        is_required = item.default is item.default_factory is dataclasses.MISSING
        if item.init:
            fields[item.name] = (hints[item.name], ... if is_required else None)
    return create_model(kind.__name__, __base__=Section, **fields)


Algorithm = Annotated[AnyRecipe, PlainValidator(_recipe)]
TurnAlgorithm = Annotated[TurnRecipe, PlainValidator(_recipe)]
MOST = {AnyRecipe: PolicyRecipe, TurnRecipe: TurnRecipe}
"""Which options are said to be those of an algorithm, where none is named."""

WANTED = {
    "int_type": "an integer",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "string_unicode": "a string",
    "invalid_key": "a string",
    "bool_type": "a bool",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
}
"""In our words, what an error of pydantic's wanted."""

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
    "use_8bit_adam": "train.optimizer",
    "fsdp": "train.sharding",
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
    "mix": "algorithm.multi_objective_aggregation",
    "multi_reward_mix": "algorithm.multi_objective_aggregation",
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
    "attn_implementation": "model.attention_backend",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "prompts": "data.train_prompts",
    "dataset": "data.train_prompts",
    "reward_fn": "reward",
    "output": "output_dir",
    "save_dir": "output_dir",
    "run_dir": "output_dir",
}


SectionT = TypeVar("SectionT", bound=BaseModel)


def build(kind: type[SectionT], tree: Any) -> SectionT:
    """The section `kind` of a mapping. Raises ConfigError naming the full key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # An unknown key first: where one is misspelt, another is missing.
        errors = sorted(error.errors(), key=lambda found: found["type"] != "unknown")
        alike = [found for found in errors if _place_of(found) == _place_of(errors[0])]
        raise ConfigError(_line(errors[0], kind, alike)) from None


BRANCH = re.compile(r"list\[|literal\[|function-|float$")
"""What pydantic puts into a place for each type that a field may be of."""


def _place_of(error: ErrorDetails) -> list[int | str]:
    """Of what came, or of the mapping where it is a key."""
    loc, kind = error["loc"], error["type"]
    if kind == "invalid_key" or loc[-1:] == ("[key]",):
        loc = loc[:-1] if kind == "invalid_key" else loc[:-2]
    if kind == "bool_type" and loc[-1:] == ("bool",):
        loc = loc[:-1]
    return [part for part in loc if isinstance(part, int) or not BRANCH.match(part)]


def _wanted(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return f"one of {expected}" if ", " in expected else expected
    return error["msg"] if error["type"] == "wanted" else WANTED.get(error["type"], error["msg"])


def _line(error: ErrorDetails, root: type[BaseModel], alike: Sequence[ErrorDetails]) -> str:
    """alike: itself, and what else was wanted in its place, where a field is of several types."""
    kind, context, parts = error["type"], error.get("ctx", {}), _place_of(error)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[1:]
    path = key and f"{key}."
    if kind == "unknown":
        name = context["key"]
        return f"{path}{name}: unknown key{_meant(name, path, context['known'], root)}"
    if kind == "missing":
        return f"{key}: missing, and has no default"
    if kind == "value_error":  # of a section as a whole: says which field
        return f"{'' if isinstance(context['error'], ConfigError) else path}{context['error']}"
    wanted = [*map(_wanted, alike), *(["null"] if _may_be_null(root, parts) else [])]
    expected = " or ".join(dict.fromkeys(wanted))
    came = "null" if error["input"] is None else shown(error["input"])
    return f"{key or 'config'}: got {came}, expected {expected}"


def _may_be_null(root: type[BaseModel], parts: Sequence[int | str]) -> bool:
    """May the field at a place be? Of an algorithm's, whose class is not known here, it is not
    said."""
    kinds: tuple[Any, ...] = (root,)
    for part in parts:
        types = [each for each in kinds if isinstance(each, type)]
        sections = [each for each in types if issubclass(each, BaseModel)]
        field = next((x.model_fields[part] for x in sections if part in x.model_fields), None)
        if field is None:
            return False
        kinds = (field.annotation, *typing.get_args(field.annotation))
    return type(None) in kinds


def _meant(key: str, path: str, known: Iterable[str], root: type[BaseModel]) -> str:
    """What to say of an unknown key: the full one that was probably meant, or those there are."""
    name = key.replace("-", "_").lower()
    close, far = nearest(name, known, cutoff=0.75), nearest(name, known, cutoff=0.5)
    elsewhere = next((full for full in _keys(root) if full.rpartition(".")[2] == name), None)
    found = (close and path + close) or ALIASES.get(name) or elsewhere or (far and path + far)
    is_another = found and found != path + key  # the very key may be one of other algorithms
    return f"; did you mean {found!r}?" if is_another else f"; known are {', '.join(known)}"


def _keys(root: type[BaseModel], path: str = "") -> Iterator[str]:
    """All full keys; of algorithms those that most have."""
    for name, field in root.model_fields.items():
        kind = MOST.get(field.annotation)
        inner = _options_of(kind) if kind else field.annotation
        # A section that may be null is one of a union.
        parts = [each for each in (inner, *typing.get_args(inner)) if isinstance(each, type)]
        sections = [each for each in parts if issubclass(each, Section)]
        for section in sections:
            yield from _keys(section, f"{path}{name}.")
        if not sections:
            yield path + name
