"""The card of an export: what it is, of which model, by which command, and how to load it. What is
not known is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowkern import __version__
from flowkern.checks import counted
from flowkern.lookup import is_hub_id, load
from flowkern.models import MODELS, hub
from flowkern.models.directory import INDEX, read_index
from flowkern.models.pipeline import FILE
from flowkern.rl.algorithms import PLANNERS
from flowkern.train import durable, tracking
from flowkern.train.record import SAMPLES, Run, base_name, numbers
from flowkern.train.report import TEMPLATES

LICENSE = ("license", "license_name", "license_link")
CURVE, GRID = "reward_curve.png", "samples.png"
CALLED = ("height", "width", "num_frames", "max_sequence_length")  # of the model's options
FIELDS = ("reinforcement-learning", "distillation")  # of algorithms without and with a teacher
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def write_card(
    run_dir: Path, config: Mapping[str, Any], directory: Path, step: int, name: str | None
) -> None:
    """README.md of a filled folder, with the pictures that it shows. config: the checkpoint's.
    name: its id on the hub, where it is to have one."""
    run = _until(run_dir, config, step)
    base, family = str(run.option("model.path")), _family(run)
    algorithm = str(run.option("algorithm.name"))
    is_taught = run.option("algorithm.teacher") is not None
    is_planner, is_adapter = algorithm in PLANNERS, (directory / "adapter_config.json").is_file()
    link = f"[{base}](https://huggingface.co/{base})"
    license = _license(base, run.option("model.revision"))
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="transformers" if is_planner else "diffusers",
        pipeline_tag="text-generation" if is_planner else _pipeline_tag(family),
        tags=["flowkern", FIELDS[is_taught], *(["lora"] if is_adapter else [])],
        **license,
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    text = environment.get_template("card.md.jinja").render(
        card_data=data.to_yaml(),
        here=name or "THIS_FOLDER",
        base=base if is_hub_id(base) else f"path/to/{base_name(base)}",
        base_shown=link if is_hub_id(base) else base_name(base),
        base_name=base_name(base),
        option=run.option,
        algorithm=algorithm,
        how="from a teacher" if is_taught else "by reinforcement",
        is_planner=is_planner,
        is_adapter=is_adapter,
        is_merged=(directory / INDEX).is_file(),
        files=sorted(path.name for path in directory.glob(f"{Path(FILE).stem}*.safetensors")),
        first_file=FILE,
        parts=sorted(path.parent.name for path in directory.glob("*/config.json")),
        step=step,
        rewards=_rewards(run),
        arguments=_arguments(run, family),
        is_video=None if family is None else _pipeline_tag(family) == "text-to-video",
        dtype=DTYPES.get(str(run.option("train.mixed_precision")), "torch.float32"),
        command=_command(run),
        license=license.get("license_name") or license.get("license"),
        curve=CURVE if _draw_curve(run, directory) else None,
        grid=GRID if _copy_grid(run, directory) else None,
        version=__version__,
    )
    (directory / "README.md").write_text(f"{ModelCard(text)}\n", "utf-8")


def _until(run_dir: Path, config: Mapping[str, Any], step: int) -> Run:
    """A run up to a step; a checkpoint alone is a run without records."""
    paths = (run_dir / name for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl"))
    records = ([r for r in durable.read_lines(path) if r["step"] <= step] for path in paths)
    return Run(run_dir, config, *records, {})


def _family(run: Run) -> Any:
    """The adapter of the pipeline, where its index is here; None: it is not."""
    path = str(run.option("model.path"))
    try:
        if is_hub_id(path):
            file = hub.file_of(path, run.option("model.revision"))
            path = str(file.parent)
        name = read_index(path)["_class_name"]
    except (OSError, ValueError):
        return None
    return load(name, MODELS) if name in MODELS else None


def _pipeline_tag(family: Any) -> str | None:
    if family is None:
        return None
    return "text-to-video" if hasattr(family, "frame_step") else "text-to-image"


def _arguments(run: Run, family: Any) -> str:
    """Of the pipeline's call: as validation drew."""
    keys = {name: f"model.{name}" for name in CALLED}
    keys["num_inference_steps"] = "validation.num_inference_steps"
    if family is not None and family.guidance.kind == "cfg":  # others call it otherwise
        keys["guidance_scale"] = "validation.guidance_scale"
    given = {name: run.option(key) for name, key in keys.items()}
    shown = [f"{name}={value}" for name, value in given.items() if type(value) in (int, float)]
    return ", ".join(['"a prompt"', *shown])


def _license(base: str, revision: str | None) -> dict[str, str]:
    """As the base model's own card has it; nothing where it has none."""
    try:
        if is_hub_id(base):
            file = hub.file_of(base, revision, "README.md")
        else:
            file = Path(base) / "README.md"
        said = ModelCard.load(file).data.to_dict() if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return {key: said[key] for key in LICENSE if isinstance(said.get(key), str)}


def _rewards(run: Run) -> list[dict[str, Any]]:
    """Each with its weight, and its means over held-out prompts at the beginning and now, or over
    training rollouts where none were held out."""
    found = []
    for name, weight in run.weights.items():
        drawn = numbers(run.validation, f"reward/{name}") or numbers(run.metrics, f"reward/{name}")
        first, last = (drawn[0][1], drawn[-1][1]) if drawn else (None, None)
        shown = " ".join(name.replace("|", "\\|").split())  # in a cell of a table
        found.append({"name": shown, "weight": weight, "first": first, "last": last})
    return found


def _command(run: Run) -> str | None:
    """Of the process that trained last."""
    found = [event.get("environment") for event in run.events]
    commands = [one["command"] for one in found if isinstance(one, Mapping) and "command" in one]
    return str(commands[-1]) if commands else None


def _draw_curve(run: Run, directory: Path) -> bool:
    weights = {name for name, weight in run.weights.items() if weight}
    tracking.save_curves(directory / CURVE, run.metrics, run.validation, weights)
    return (directory / CURVE).is_file()


def _copy_grid(run: Run, directory: Path) -> bool:
    """The last that was drawn before the checkpoint."""
    steps = [int(path.stem[5:]) for path in (run.path / SAMPLES).glob("step-*.png")
             if path.stem[5:].isdigit()]  # fmt: skip
    steps = [step for step in steps if not run.metrics or step <= run.step]
    if steps:
        shutil.copyfile(run.path / SAMPLES / f"step-{max(steps)}.png", directory / GRID)
    return bool(steps)
