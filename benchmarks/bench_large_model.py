"""Whole iterations of Flow-GRPO on a model of real size: flowkern, and the plain loop on the same
images.

    python benchmarks/bench_large_model.py [--images 8] [--rollouts 2] [--tiny] [--json PATH]

Stable Diffusion 3.5 medium with random weights (large_model.py), 10 steps, guidance 4.5, KL, LoRA
of rank 32, bfloat16, 512 pixels. The plain loop is that of the released scripts (plain_loops.py):
both halves of guidance go through the network in training, too, and both learn. Both ways start
from the same weights and noise each time. The first rollout of each is a warm-up; in it the empty
prompt's half of the plain loop does not learn, as it does not in flowkern, so that the gradients
can be compared. The file is written after each rollout. Out of memory: the batch is halved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, describe_machine, results_folder
from plain_loops import FlowGRPO

BATCH = 16  # network calls of one batch, at most
WAYS = ("flowkern", "plain PyTorch")


def brightness(images, prompts, metadata) -> torch.Tensor:
    """The reward: what random weights can be told apart by."""
    return 100 * images.float().mean(dim=(1, 2, 3))


class Plain(FlowGRPO):
    """The plain loop with its phases timed: what is neither reward nor update is the rollout."""

    def __init__(self, trainer, batch_size: int, noise):
        super().__init__(trainer, batch_size)
        self.given, self.images, self.seconds = noise, [], {}

    def step(self) -> None:
        self.noise, self.images = self.given, []
        self.seconds = {"reward": 0.0, "train": 0.0}
        super().step()

    def reward(self, latents, prompt):
        self.images.append(latents)
        return self._timed("reward", super().reward, latents, prompt)

    def update(self, moves) -> None:
        self._timed("train", super().update, moves)

    def _timed(self, phase: str, call, *arguments):
        begin = now(self.device)
        result = call(*arguments)
        self.seconds[phase] += now(self.device) - begin
        return result


class Bench:
    def __init__(self, options: argparse.Namespace, device: torch.device):
        from large_model import MEDIUM, TINY, build

        from flowkern.train.loop import Loop

        self.device, self.folder = device, tempfile.TemporaryDirectory()
        architecture = TINY if options.tiny else MEDIUM
        model = build(architecture, device, torch.bfloat16)
        self.parameters = sum(p.numel() for p in model.network.parameters())
        config = _config(options.images, architecture, self.folder.name)
        self.trainer, self.batches = Loop(config, model), 0
        self.trainer.task.model.network.register_forward_pre_hook(self._count)
        self.start = [p.detach().clone() for p in self.trainer.parameters]
        self.plain = Plain(self.trainer, BATCH // 2, self._noise)
        self.batch, self.found = BATCH, {}
        sample = self.trainer.task.sample
        self.trainer.task.sample = lambda *given: self._keep(sample(*given))
        update = self.trainer.update
        self.trainer.update = lambda *given: self._keep_gradient(update, *given)

    def _count(self, *_) -> None:
        self.batches += 1

    def _keep(self, blocks):
        walk = blocks.walk

        def kept(source):
            rollout = walk(source)
            self.found["flowkern", "latents"] = rollout.latents.flatten(0, 1)
            return rollout

        blocks.walk = kept
        return blocks

    def _keep_gradient(self, update, *given):
        self.found["flowkern", "gradient"] = self._gradient()
        return update(*given)

    def _gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.trainer.parameters])

    def _noise(self, slot, members, step, stream):
        """What flowkern draws for these samples."""
        from flowkern import philox_normal
        from flowkern.rollout import prompt_ids

        trainer = self.trainer
        ids = prompt_ids(trainer.iteration, trainer.task.slots)[slot] + torch.tensor(members)
        shape = (len(members), *trainer.task.model.latent_shape)
        return philox_normal(shape, trainer.config.seed, ids.to(self.device), step, stream)

    def rollout(self, way: str) -> dict:
        """One iteration; halves the batch until it fits."""
        while True:
            try:
                return self._rollout(way)
            except torch.cuda.OutOfMemoryError as error:
                if self.batch <= 2:
                    raise
                print(f"{way}: out of memory with {self.batch} calls a batch: {error}", flush=True)
            self.trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self.batch //= 2
            self._set_batch()

    def _set_batch(self) -> None:
        task = self.trainer.task
        task.config = task.config.model_copy(
            update={"train": task.config.train.model_copy(update={"max_batch": self.batch})}
        )
        self.plain.batch_size = max(1, self.batch // 2)

    def _rollout(self, way: str) -> dict:
        trainer, model = self.trainer, self.trainer.task.model
        trainer.global_step = trainer.iteration = 0
        with torch.no_grad():
            torch._foreach_copy_(trainer.parameters, self.start)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.batches, calls, self.plain.gradient = 0, model.calls, None
        begin = now(self.device)
        if way == "flowkern":
            (record,) = trainer.step()
            phases = {n: record[f"timing_s/{n}"] for n in ("rollout", "reward", "train")}
        else:
            self.plain.step()
            phases = dict(self.plain.seconds)
            self.found[way, "latents"] = torch.cat(self.plain.images)
            self.found[way, "gradient"] = self.plain.gradient
        seconds = now(self.device) - begin
        phases.setdefault("rollout", seconds - sum(phases.values()))
        images = trainer.recipe.group_size * trainer.recipe.prompts_per_rollout
        return {
            "way": way, "seconds": seconds, "phases": phases, "images": images,
            "images_per_s": images / seconds, "network_calls": model.calls - calls,
            "network_batches": self.batches, "max_batch": self.batch,
            "peak_memory_gb": _peak_memory(self.device),
        }  # fmt: skip

    def differences(self) -> dict[str, float]:
        """Of the two ways' images and first gradients, relative to flowkern's norm."""
        out = {}
        for name in ("latents", "gradient"):
            ours, theirs = (self.found[way, name].double() for way in WAYS)
            out[name] = float((theirs - ours).norm() / ours.norm())
        return out


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def _config(images: int, architecture, folder: str):
    from flowkern.train.config import from_dict

    pixels = architecture.pixels
    prompts = ROOT / "assets/digits-prompts/train.jsonl"
    algorithm = {"name": "flow_grpo", "group_size": images, "prompts_per_rollout": 1}
    algorithm["num_inference_steps"] = architecture.steps
    return from_dict({
        "output_dir": folder,
        "model": {"path": "in memory", "height": pixels, "width": pixels},
        "data": {"train_prompts": str(prompts)},
        "reward": {"bench_large_model:brightness": {"weight": 1.0}},
        "algorithm": algorithm | {"updates_per_rollout": 1, "kl_coef": 0.004},
        "lora": {"rank": 32, "alpha": 64},
        "train": {"steps": 100, "max_batch": BATCH, "mixed_precision": "bf16"},
    })  # fmt: skip


def main() -> int:
    options = _arguments()
    device = torch.device(options.device)
    begin, machine = time.perf_counter(), describe_machine(device)
    bench = Bench(options, device)
    result = {
        "machine": machine, "command": " ".join(sys.argv), "parameters": bench.parameters,
        "weights": "random", "rollouts": [],
    }  # fmt: skip
    print(f"{bench.parameters / 1e9:.3f} B parameters, ready after "
          f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
    path = options.json or results_folder(device, machine) / "large_model.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(options.rollouts + 1):
        for way in WAYS:
            bench.plain.both_halves_learn = number > 0
            row = {"rollout": number, "is_warm_up": number == 0} | bench.rollout(way)
            result["rollouts"].append(row)
            if number == 0 and way == WAYS[-1]:
                result["relative_difference"] = bench.differences()
            path.write_text(json.dumps(result | _ratio(result["rollouts"]), indent=1) + "\n")
            phases = ", ".join(f"{name} {s:.2f}" for name, s in row["phases"].items())
            print(f"{way}: {row['seconds']:.2f} s ({phases}), {row['images_per_s']:.2f} images/s, "
                  f"{row['network_calls']} network calls in {row['network_batches']} batches, "
                  f"peak {row['peak_memory_gb']} GB", flush=True)  # fmt: skip
    print(json.dumps(result["relative_difference"] | _ratio(result["rollouts"])))
    return 0


def _ratio(rollouts: list[dict]) -> dict[str, float]:
    """How many times the plain loop's seconds are flowkern's, once both have run warm."""
    warm = [[r["seconds"] for r in rollouts if r["way"] == way and r["rollout"]] for way in WAYS]
    if not all(warm):
        return {}
    ours, theirs = (sum(times) / len(times) for times in warm)
    return {"flowkern_is_faster_by": theirs / ours}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=8, help="of the one prompt of a rollout")
    parser.add_argument("--rollouts", type=int, default=2, help="timed ones, after a warm-up")
    parser.add_argument("--tiny", action="store_true", help="two blocks of four heads, 64 pixels")
    parser.add_argument("--json", type=Path, help="where the results go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
