"""Who runs an iteration in train_step.py, and what one of them says of it.

The plain loop is that of the released script (plain_loops.py): as many samples a call as it has,
with guidance both halves through the network and back, figures waited for after each batch. All
begin each iteration with the same weights and noise.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from counting import KINDS
from large_model import Architecture
from plain_loops import LOOPS
from settings import IS_REHEARSAL, Setting
from torch import Tensor

from flowkern import philox_normal
from flowkern.models import compiled, quantize
from flowkern.rollout import prompt_ids
from flowkern.train.blocks import asked_twice, asking
from flowkern.train.config import LoraConfig, from_dict
from flowkern.train.loop import Loop
from flowkern.train.lora import add_lora


@dataclass(frozen=True)
class Way:
    says: str
    is_plain: bool = False
    is_compiled: bool = False
    base: str | None = None
    """The frozen weights' quantization."""


WAYS = {
    "a": Way("plain PyTorch, as released", is_plain=True),
    "b": Way("plain PyTorch, blocks compiled", is_plain=True, is_compiled=True),
    "c": Way("flowkern"),
    "d": Way("flowkern, compiled", is_compiled=True),
    "e": Way("flowkern, compiled, float8 base", is_compiled=True, base="float8"),
}


def brightness(images, prompts, metadata) -> Tensor:
    """The reward: what random weights can be told apart by."""
    return 100 * images.float().flatten(1).mean(1)


def plain_loop(kind: type) -> type:
    """A plain loop with its phases timed: what is neither reward nor update is the rollout."""

    class Timed(kind):
        def step(self) -> None:
            self.noise, self.images = self.given, []
            self.seconds, self.phase = {"reward": 0.0, "train": 0.0}, "rollout"
            super().step()

        def reward(self, latents, prompt):
            self.images.append(latents)
            return self._timed("reward", super().reward, latents, prompt)

        def update(self, moves) -> None:
            self._timed("train", super().update, moves)

        def _timed(self, phase: str, call, *arguments):
            before, self.phase, begin = self.phase, phase, now(self.device)
            result = call(*arguments)
            self.seconds[phase] += now(self.device) - begin
            self.phase = before
            return result

    return Timed


class Contender:
    """One way, with a network of its own."""

    def __init__(self, way: Way, setting: Setting, architecture: Architecture | None = None):
        self.way, self.setting, self.device = way, setting, torch.device(setting.device)
        if IS_REHEARSAL:  # a compiler that makes no code; products that a CPU's torch does not have
            compiled.BACKEND, quantize.has_products = "eager", lambda device: True
        self.folder = tempfile.TemporaryDirectory()
        dtype = {"bf16": torch.bfloat16, "no": torch.float32}[setting.mixed_precision]
        model = (architecture or setting.architecture).build(self.device, dtype)
        more = {} if way.is_plain else {"compile": way.is_compiled, "quantization": way.base}
        rows = 2 if way.is_plain else setting.batch  # the plain loop does not look at it
        config = setting.config(self.folder.name, rows, **more)
        self.trainer = Loop(from_dict(config), model)
        self.model, self.batch = model, setting.batch
        if way.is_plain and way.is_compiled:
            torch._dynamo.config.recompile_limit = compiled.RECOMPILES
            for block in model.repeated():
                block.compile(dynamic=False, backend=compiled.BACKEND)
        self.start = [p.detach().clone() for p in self.trainer.parameters]
        self.plain = plain_loop(LOOPS[setting.algorithm])(self.trainer, self.batch)
        self.plain.given, self.plain.phase = self._noise, "rollout"
        self.rows, self.batches, self.found = Counter(), 0, {}
        plan = self.trainer.recipe.plan(model.sigmas, setting.iteration, self.trainer.config.seed)
        self.images = len(plan.leaves)
        self._listen()

    def _listen(self) -> None:
        """To rows by kind, and to what a rollout and an update leave."""
        trainer, velocity = self.trainer, self.model.velocity
        sample, update = trainer.task.sample, trainer.update
        self.phase = "rollout"

        def counted(x_t, *given, **more):
            phase = self.plain.phase if self.way.is_plain else self.phase
            kind = KINDS[0]
            if phase == "train":
                kind = KINDS[1 if torch.is_grad_enabled() else 2]
            self.rows[kind] += len(x_t)
            self.batches += 1
            return velocity(x_t, *given, **more)

        def sampled(*given):
            blocks, self.phase = sample(*given), "rollout"
            walk = blocks.walk

            def walked(*given):
                rollout = walk(*given)
                self.found["latents"] = rollout.latents.flatten(0, 1)
                return rollout

            blocks.walk = walked
            return blocks

        def updated(*given):
            self.found["gradient"] = torch.cat([p.grad.flatten() for p in trainer.parameters])
            return update(*given)

        batches = trainer.task.batches

        def learned(*given):
            self.phase = "train"
            return batches(*given)

        self.model.velocity, trainer.task.batches = counted, learned
        trainer.task.sample, trainer.update = sampled, updated

    def _noise(self, slot, members, step, stream):
        """What flowkern draws for these samples."""
        trainer = self.trainer
        ids = prompt_ids(trainer.iteration, trainer.task.slots)[slot] + torch.tensor(members)
        shape = (len(members), *self.model.latent_shape)
        return philox_normal(shape, trainer.config.seed, ids.to(self.device), step, stream)

    def rollout(self, is_first: bool = False) -> dict[str, Any]:
        """One iteration; halves the batch until it fits."""
        while True:
            try:
                row = self._rollout()
                if is_first and not self.way.is_plain:
                    off, _ = asked_twice(self.model, self.batch, self.device)
                    row["without_gradient_less_with"] = off  # 0: the first ratio is 1
                return row
            except torch.cuda.OutOfMemoryError as error:
                if self.batch <= (1 if self.way.is_plain else self.halves):
                    raise
                print(f"out of memory with batches of {self.batch}: {error}", flush=True)
            self.trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self.batch //= 2
            self._set_batch()

    @property
    def halves(self) -> int:
        """Rows of a sample in one call, at least."""
        return 1 if self.trainer.task.guidance is None else 2

    def _set_batch(self) -> None:
        task = self.trainer.task
        train = task.config.train.model_copy(update={"max_batch": self.batch})
        task.config = task.config.model_copy(update={"train": train})
        self.plain.batch_size = self.batch
        if self.model.compiled is not None:
            self.model.compiled.rows = self.batch

    def _rollout(self) -> dict[str, Any]:
        trainer = self.trainer
        trainer.global_step = trainer.iteration = self.setting.iteration
        with torch.no_grad():
            torch._foreach_copy_(trainer.parameters, self.start)
        # Not known to be the weights, as in the middle of a run: all that is asked of them is.
        copies = dict.fromkeys(trainer.recipe.copies, self.start)
        trainer.copies.load_state_dict({"copies": copies, "current": []})
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.rows.clear()
        self.batches, self.plain.gradient, self.plain.phase = 0, None, "rollout"
        begin, used, record = now(self.device), time.process_time(), {}
        if self.way.is_plain:
            self.plain.step()
            phases = dict(self.plain.seconds)
            # G2RPO's trunk, before the others, is for the log alone.
            self.found["latents"] = torch.cat(self.plain.images)[-self.images :]
            self.found["gradient"] = self.plain.gradient
            record["ratio_mean"] = fmean(self.plain.ratios) if self.plain.ratios else None
        else:
            (record,) = trainer.step()
            phases = {n: record[f"timing_s/{n}"] for n in ("rollout", "reward", "train")}
        seconds, used = now(self.device) - begin, time.process_time() - used
        phases.setdefault("rollout", seconds - sum(phases.values()))
        images = self.images
        is_cuda = self.device.type == "cuda"
        return {
            "seconds": seconds, "processor_s": used, "phases": phases, "images": images,
            "images_per_s": images / seconds, "rows": dict(self.rows),
            "network_batches": self.batches, "max_batch": self.batch,
            "ratio_mean": record.get("ratio_mean"),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
        }  # fmt: skip

    def keep(self, path: Path) -> None:
        """Its images' latents and its gradient."""
        torch.save({name: value.detach().cpu() for name, value in self.found.items()}, path)


PARTS = ("sampling", "learning", "reference")
"""Of what a compiled network is asked for, each another graph unless sampling runs the others'."""


def compiled_for(way: Way, setting: Setting, parts=PARTS, sorts: int = 2) -> Contender:
    """A network of a few blocks, compiled: as long as it is kept, that serves the whole one."""
    few = Contender(way, setting, setting.architecture.smaller(sorts))
    sampling, learning = few.plain.rows if way.is_plain else (setting.batch, setting.batch)
    for part in parts:
        ask = asking(few.model, sampling if part == "sampling" else learning, few.device)
        if part == "learning":
            ask().float().square().sum().backward()
            few.trainer.optimizer.zero_grad()
        elif part == "sampling" or way.is_plain:  # flowkern's reference is a copy of weights
            left_out = few.model.network.disable_adapter() if part == "reference" else nullcontext()
            with torch.no_grad(), left_out:
                ask()
    if setting.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return few


def ahead(way: Way, setting: Setting) -> list[dict[str, Any]]:
    """What other processes compile meanwhile, into the cache that all share: arguments each."""
    if not way.is_compiled or not setting.has_few:
        return []
    if way.is_plain:
        return [{"parts": ("learning",)}, {"parts": ("reference",)}]
    return [{"sorts": 1}] if len(setting.architecture.few) > 1 else []


def operations(architecture: Architecture) -> dict[str, float]:
    """TFLOP of a row without a gradient and with one: the transformer's products and attention,
    counted by torch's flop counter; backward as LoRA on a frozen base needs it, and nothing that is
    computed again."""
    from flowkern.train.dry_run import dry_run_of_blocks

    model = architecture.build(torch.device("meta"), torch.bfloat16)
    add_lora(model, LoraConfig(rank=32, alpha=64))
    for parameter in model.network.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with torch.device("meta"):
        x, sigma = torch.empty(1, *model.latent_shape), torch.empty(1)
        parts = {n: torch.empty(1, *shape) for n, shape in architecture.text.items()}
    given = (each.bfloat16() for each in (x, *parts.values()))
    x, parts = next(given), dict(zip(parts, given, strict=True))

    def ask() -> None:
        out = model.call(model.network, x, sigma, parts)
        if out.requires_grad:
            out.float().sum().backward()

    network, blocks = model.network, model.repeated()
    calls = torch.no_grad()(ask), ask
    found = [dry_run_of_blocks(network, blocks, call).operations / 1e12 for call in calls]
    return dict(zip(("forward", "both"), found, strict=True))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
