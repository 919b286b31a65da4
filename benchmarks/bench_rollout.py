"""One training iteration of the digits demo, several ways: what batching buys, and what it buys
not to compute the same network call twice.

    python benchmarks/bench_rollout.py [--only NAME,...] [--quick] [--json PATH]

The calls of the released loop for one sample at a time, the same calls with a group's samples in
one batch, and flowkern; in the middle of the run that configs/digits/<name>.yaml describes, with
fewer prompts. Gate: on the same noise all reach the same first gradient, and each takes the network
calls that it should.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, Case, Contender, describe_machine, results_folder, run_case

PROMPTS = {"flow_grpo": 8, "mixgrpo": 8, "mixgrpo_flash": 8, "tempflow_grpo": 4, "g2rpo": 4}
# Two prompts in one update, and of the 25 steps that two of them have so many that their window,
# after two moves, lies in the middle.
QUICK = ("algorithm.prompts_per_rollout=2", "algorithm.updates_per_rollout=1", "train.steps=20")
QUICK_STEPS = {"mixgrpo": 16, "mixgrpo_flash": 16}
SAMPLE, GROUP, PROMPT = (
    f"plain PyTorch, one {unit} at a time" for unit in ("sample", "group", "prompt")
)
AS_RELEASED = {"flow_grpo": GROUP, "tempflow_grpo": GROUP}  # the others: one sample at a time


class Way:
    """An iteration, again and again from the same step of the run; the first on given noise."""

    def __init__(self, loop, trainer, calls: tuple[int, int], sites: float):
        self.loop, self.trainer, self.calls = loop, trainer, calls
        self.start = trainer.global_step, trainer.iteration
        # In calls forward; backward counts two.
        self.work = sum(calls) + 2 * trainer.recipe.prompts_per_rollout * sites

    def __call__(self) -> tuple[torch.Tensor]:
        self.trainer.global_step, self.trainer.iteration = self.start
        self.loop.step()
        if self.loop.calls != self.calls:
            raise RuntimeError(f"{self.loop.calls} network calls, expected {self.calls}")
        return (self.loop.gradient,)


class Engine:
    """`Loop.step` with what the plain loops have: the first gradient and the network calls."""

    def __init__(self, trainer):
        self.trainer, self.gradient, self.trainer_update = trainer, None, trainer.update
        trainer.update = self._update

    def step(self) -> None:
        records = self.trainer.step()
        self.calls = records[0]["nfe/sample"], sum(record["nfe/train"] for record in records)

    def _update(self, *given) -> dict[str, float]:
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in self.trainer.parameters])
        return self.trainer_update(*given)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Empty where the trainer's dependencies are missing: the kernels need torch alone."""
    return [_case(name, quick) for name in PROMPTS] if is_ready() else []


def is_ready() -> bool:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        import flowkern.train.loop  # noqa: F401
    except ImportError:
        return False
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    return True


def _case(name: str, quick: bool) -> Case:
    folder = tempfile.TemporaryDirectory()
    few = QUICK if quick else ()
    if quick and name in QUICK_STEPS:
        few += (f"algorithm.num_inference_steps={QUICK_STEPS[name]}",)
    trainer = _trainer(name, folder.name, *few)
    recipe, iteration = trainer.recipe, trainer.iteration
    size, trunks = recipe.group_size, getattr(recipe, "num_seeds", 1)
    ours, theirs = (
        recipe.plan(trainer.task.model.sigmas, iteration).cost(),
        recipe.released(iteration),
    )

    def plain(batch_size: int) -> Way:
        return _plain(_trainer(name, folder.name, *few), name, batch_size, theirs)

    def engine(trainer) -> Way:
        from flowkern.rl.cost import network_calls

        sampled, trained = network_calls(recipe, ours, iteration)
        return Way(Engine(trainer), trainer, (round(sampled), round(sum(trained))), ours.train)

    group = plain(size)
    (truth,) = group()
    ways = {"flowkern": engine(trainer), GROUP: group}
    if not quick:
        # Batched as the group is: what is left of the gain is what is not computed twice.
        small = engine(_trainer(name, folder.name, f"train.max_batch={size}"))
        ways |= {"flowkern, batches of a group": small, SAMPLE: plain(1)}
    if not quick and trunks > 1:
        ways[PROMPT] = plain(size * trunks)
    contenders = []
    for label, way in ways.items():
        note = f"{way.calls[0]} + {way.calls[1]} network calls"
        note += ", batched as released" if label == AS_RELEASED.get(name, SAMPLE) else ""
        made = (truth,) if way is group else None
        contenders.append(Contender(label, way, note, made=made))

    def check(gradient: torch.Tensor, folder=folder) -> float:  # keeps it as long as the case
        return float((gradient - truth).norm() / truth.norm())

    shape = (round(ours.images * recipe.prompts_per_rollout), *trainer.task.model.latent_shape)
    rounds = 1 if quick else 3
    return Case("training_step", name, shape, "float32", contenders, check, 1e-3, rounds=rounds)


def _trainer(name: str, folder: str, *more: str):
    """A trainer in the middle of the demo's run."""
    from accelerate import PartialState

    from flowkern.train.config import load_config
    from flowkern.train.loading import load_pipeline
    from flowkern.train.loop import Loop

    overrides = [f"model.path={ROOT / 'assets/digits-sd3'}", f"output_dir={folder}"]
    overrides += ["reward={digits_classifier: {}}"]
    overrides += [f"algorithm.prompts_per_rollout={PROMPTS[name]}"]
    for split in ("train", "test"):
        overrides.append(f"data.{split}_prompts={ROOT / f'assets/digits-prompts/{split}.jsonl'}")
    path = ROOT / "configs" / "digits" / f"{name}.yaml"
    config = load_config(path, [*overrides, *more])
    # A model that is handed over keeps its encoders: iterations go on past the run's last.
    trainer = Loop(config, load_pipeline(config, PartialState().device))
    updates = trainer.recipe.updates_per_rollout
    trainer.iteration = trainer.config.train.steps // 2 // updates
    trainer.global_step = trainer.iteration * updates
    return trainer


def _plain(trainer, name: str, batch_size: int, cost) -> Way:
    from plain_loops import LOOPS

    from flowkern import philox_normal
    from flowkern.rollout import prompt_ids

    ids = prompt_ids(trainer.iteration, trainer.task.slots)

    def noise(slot, members, step, stream):
        shape = (len(members), *trainer.task.model.latent_shape)
        sample_id = (ids[slot] + torch.tensor(members)).to(trainer.device)
        return philox_normal(shape, trainer.config.seed, sample_id, step, stream)

    prompts = trainer.recipe.prompts_per_rollout
    calls = (prompts * cost.sample, prompts * trainer.task.objective.calls() * cost.train)
    return Way(LOOPS[name](trainer, batch_size, noise), trainer, (*map(round, calls),), cost.train)


# ---- alone ----


def main() -> int:
    options = _arguments()
    if not is_ready():
        print("needs the trainer's libraries (pip install '.[train]')", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    result = {"machine": machine, "command": " ".join(sys.argv), "rows": []}
    name = f"rollout{'-quick' if options.quick else ''}.json"
    path = options.json or results_folder(device, machine) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    print(f"flowkern {machine['flowkern']} at {machine['commit']} on {where}")
    print(
        f"{'':38}{'p20':>8} {'p50':>8} {'p80':>8}  s {'flowkern is':>12} {'with calls':>12}"
        f"  network calls\n{'':38}{'':26}   {'faster by':>12} {'fewer by':>12}"
        "  sampling + training"
    )
    begin, is_good = time.perf_counter(), True
    for algorithm in options.only:
        case = _case(algorithm, options.quick)
        measured = run_case(case, device, 0.0, {})
        for row, contender in zip(measured, case.contenders, strict=True):
            row |= {"network_calls": contender.run.calls, "forward_equivalents": contender.run.work}
        _print_case(case, measured)
        result["rows"] += measured
        result["seconds"] = time.perf_counter() - begin
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is cut short counts
        is_good &= not any("failed" in row for row in measured)
    print(f"\n{result['seconds']:.0f} s; wrote {path}")
    return 0 if is_good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[*PROMPTS], help="NAME,..."
    )
    parser.add_argument(
        "--quick", action="store_true", help="two prompts, not one sample at a time; 1 round"
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in PROMPTS]
    if unknown:
        parser.error(f"--only: got {unknown[0]!r}, expected some of {', '.join(PROMPTS)}")
    return options


def _print_case(case: Case, rows: list[dict]) -> None:
    print(f"{case.name}  {' x '.join(map(str, case.shape))}")
    least, fastest = rows[0]["forward_equivalents"], rows[0].get("ms_p50", math.nan)
    for row in rows:
        if "failed" in row:
            print(f"  {row['backend']:36}{row['failed']}")
            continue
        seconds = " ".join(f"{row[p] / 1000:8.3f}" for p in ("ms_p20", "ms_p50", "ms_p80"))
        saved = row["forward_equivalents"] / least
        factors = f"{row['ms_p50'] / fastest:10.1f} x {saved:10.2f} x"
        sampled, trained = row["network_calls"]
        print(f"  {row['backend']:36}{seconds}    {factors}  {sampled} + {trained}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
