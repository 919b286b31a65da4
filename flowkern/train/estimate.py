"""What a run takes, before there is a card or a file of weights: memory by part, and seconds.

The run's own adapter, layers, plan and objective, with modules that have shapes and no values
(`models.on_meta`); its calls are dry runs (`dry_run`). Of several processes one, which have alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowkern.checks import ConfigError
from flowkern.models import Conditioning, Model
from flowkern.models.compiled import repeated
from flowkern.models.on_meta import on_meta
from flowkern.models.pipeline import DECODE_PIXELS
from flowkern.rl.cost import network_calls
from flowkern.rl.objectives import Objective
from flowkern.rl.plans import cost_of, plans_of
from flowkern.rollout import Layout, Rollout, Source
from flowkern.rollout.blocks import is_large
from flowkern.train.attention import require_attention
from flowkern.train.blocks import require_quantization
from flowkern.train.cards import COMPILED, DECODING, LAUNCH, OF_BANDWIDTH, OF_PEAK, Card
from flowkern.train.config import Config
from flowkern.train.copies import REFERENCE
from flowkern.train.distributed import share
from flowkern.train.dry_run import HAS_EXACT_RMS, Taken, dry_run, dry_run_of_blocks
from flowkern.train.loading import DTYPES, OURS, VAE_DTYPES
from flowkern.train.parts import held, unshards
from flowkern.train.sharding import (
    KEY,
    require_processes,
    require_split,
)
from flowkern.train.trained import set_trained

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes, seconds of an iteration."""

    facts: Mapping[str, Any]
    memory: Mapping[str, int]
    """By part."""
    phases: Mapping[str, int]
    """At most, in each phase of a run."""
    host: Mapping[str, int]
    """Memory of the host, by part."""
    rows: Mapping[str, float]
    """Of the network in an iteration, by kind."""
    seconds: Mapping[str, float] | None
    """By phase; None: no card was named."""
    tflop: float
    """Of an iteration: products and attention."""
    assumptions: tuple[str, ...]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def estimate(config: Config, card: Card | None = None, processes: int = 1) -> Estimate:
    """Of a configuration whose model's configurations are here, or published and known; of each of
    so many processes. With train.sharding hsdp those of a node are LOCAL_WORLD_SIZE.

    Raises ConfigError, naming the key, for what a training would refuse, and for a model of which
    neither is known.
    """
    if config.algorithm.task != "flow":
        raise ConfigError(
            f"algorithm.name: its task is {config.algorithm.task!r}; --estimate knows "
            "flow-matching models only"
        )
    require_attention(config.model, is_here=False)
    require_quantization(config, None)
    if processes == 1 and config.train.sharding is not None:
        raise ConfigError(f"{KEY}: got {config.train.sharding}; expected --processes N beside it")
    require_processes(config, processes)
    require_split(config)
    return _Run(config, processes).estimate(card)


class _Run:
    """A run whose model has no values."""

    def __init__(self, config: Config, processes: int = 1) -> None:
        self.config, self.recipe, self.processes = config, config.algorithm, processes
        asked = DTYPES[config.train.mixed_precision]
        network = torch.float32 if config.lora is None else asked
        vae = VAE_DTYPES[config.model.vae_dtype]
        self.autocast = None if asked == torch.float32 else asked
        options = config.model.model_dump(exclude=OURS)
        try:
            self.model: Model = on_meta(
                config.model.path, {"default": asked, "network": network, "vae": vae}, **options
            )
            self.blocks = repeated(self.model.network, self.model.blocks)
            self.parameters = sum(p.numel() for p in self.model.network.parameters())
            self.trained = set_trained(self.model, config.lora)
            if config.lora is None and config.train.sharding is not None:
                nn.Module.to(self.model.network, asked)  # as their parts are gathered
            self.blank = {name: part.to(asked) if part.is_floating_point() else part
                          for name, part in self.model.blank().items()}  # fmt: skip
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"model.{' '.join(str(error).split())}") from error
        plans = plans_of(self.recipe, self.model.sigmas, 1, config.seed)
        self.cost, self.layout = cost_of(plans), Layout(plans[0])
        self.weights = [p for p in self.model.network.parameters() if p.requires_grad]
        self.objective: Objective = self.recipe.objective_at(0)
        self.held = held(config, self.model.network, self.blocks, processes)
        self.elements = torch.Size(self.model.latent_shape).numel()
        share(self.recipe.prompts_per_rollout, 0, processes, self.recipe.updates_per_rollout)

    # ---- rows ----

    @property
    def prompts(self) -> int:
        """Of a rollout, this process's."""
        return self.recipe.prompts_per_rollout // self.processes

    @property
    def block(self) -> int:
        """Prompts whose latents are on the device together."""
        return min(self.prompts, self.config.train.prompts_per_block or self.prompts)

    def rows(self) -> dict[str, float]:
        """Of an iteration after the first, by kind."""
        cost = self.cost
        sampling, updates = network_calls(self.recipe, cost, 1)
        learning = self.prompts * cost.train * self.objective.together
        return {
            "sampling": sampling / self.processes,
            "learning": learning,
            "not learning": max(0, sum(updates) / self.processes - learning),
            "images": self.prompts * cost.images,
        }

    def batches(self) -> dict[str, int]:
        """Rows of a call, at most."""
        most, halves = self.config.train.max_batch, 1 if self.recipe.guidance(0) is None else 2
        widest = max(len(wave.sigma) for wave in self.layout.waves)
        sampling = min(most // halves, widest * self.block) * halves
        together = self.objective.together
        if most < max(halves, together):
            raise ConfigError(f"train.max_batch: got {most}, expected at least 2")
        own = self.layout.sites * (self.prompts // self.recipe.updates_per_rollout)
        calls = -(-own // (most // together))  # of nearly equal size
        return {"sampling": max(halves, sampling), "learning": -(-own // calls) * together}

    # ---- calls ----

    @property
    def keeps_scores(self) -> bool:
        """Are the N x N scores of attention kept?"""
        return self.config.model.attention_backend == "_native_math"

    def call(self, rows: int, learns: bool, is_checkpointed: bool) -> Taken:
        """A call of the network, with its backward pass where it learns."""
        model, shape = self.model, (rows, *self.model.latent_shape)
        parts = {name: part.expand(rows, *part.shape[1:]) for name, part in self.blank.items()}
        given = Conditioning(parts, model.stays)
        with torch.device("meta"):
            x_t, sigma = torch.empty(shape), torch.empty(rows)

        def ask() -> None:
            with torch.set_grad_enabled(learns):
                v = model.velocity(x_t, sigma, given, sigma_host=[1.0] * rows)
                if learns:
                    v.float().square().sum().backward()

        for weight in self.weights:  # as from the second call of an update on
            weight.grad = torch.empty_like(weight) if learns else None
        for module in model.network.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        if is_checkpointed:
            base = model.network if self.config.lora is None else model.network.get_base_model()
            base.enable_gradient_checkpointing()
        return dry_run_of_blocks(model.network, self.blocks, ask, self.autocast, self.keeps_scores)

    def decoding(self) -> Taken:
        """Of as many images as one call of the VAE takes, or one."""
        rows = 1 if self.config.model.vae_slicing else max(1, DECODE_PIXELS // self.model.pixels)
        rows = min(rows, self.config.train.max_batch, len(self.layout.plan.leaves) * self.block)
        latents = torch.empty(rows, *self.model.latent_shape, device="meta")
        taken = dry_run(partial(self.model.decode, latents))
        self.decoded = rows
        return taken

    # ---- memory ----

    @property
    def waits(self) -> bool:
        """Does what training needs of a rollout wait on the host?"""
        return self.config.train.prompts_per_block is not None or is_large(self.model.latent_shape)

    def states(self) -> tuple[int, int]:
        """What a rollout keeps of a block, and what its latents take while it is sampled."""
        source = Source(0, torch.empty(self.block, dtype=torch.int64, device="meta"),
                        self.model.latent_shape)  # fmt: skip
        recipe, plan = self.recipe, self.layout.plan
        keeps = recipe.updates_per_rollout > 1 or recipe.sampler is not None
        kept = Rollout.empty(self.layout, source, keeps, None)
        found = kept.states.nbytes + (0 if kept.velocity is None else kept.velocity.nbytes)
        if self.objective.keeps_uncond and recipe.sampler is None:
            width = (self.autocast or torch.float32).itemsize
            prompts = self.block / recipe.updates_per_rollout
            found += int(len(plan.origins) * prompts * self.elements * width)
        waves = [len(wave.nodes) for wave in self.layout.waves]
        moving = max(map(sum, zip(waves, [*waves[1:], 0], strict=True)))
        return found, (moving + len(plan.leaves)) * self.block * self.elements * 4

    def memory(self) -> dict[str, int]:
        """What is there as long as a run is, by part."""
        pipeline, (frozen, trained) = self.model.pipeline, (self.held.frozen, self.held.trained)
        encoders = [part for name, part in pipeline.components.items() if "encoder" in name]
        copies = len({*self.recipe.copies})
        train = self.config.train
        copies += train.ema_decay is not None and not train.offload_ema
        needs = self.config.lora is None or self.config.model.compile
        copies += needs and REFERENCE in self.objective.anchors
        row = sum(part.nbytes for part in self.blank.values())
        return {
            "network": frozen,
            "trained weights": trained,
            "gradients": trained,
            "optimizer": trained // 2 if train.optimizer == "adamw_8bit" else 2 * trained,
            "copies of trained weights": copies * trained,
            "vae": _size(pipeline.vae),
            "text encoders": sum(map(_size, encoders)),
            "prompts of a rollout": (self.prompts + 1) * row,
        }

    def phases(
        self, memory: dict[str, int], sampling: int, decode: int, learning: int, drawing: int
    ) -> dict[str, int]:
        kept, moving = self.states()
        always = sum(memory[part] for part in ("network", "trained weights", "vae"))
        always += memory["copies of trained weights"]
        after = always + memory["optimizer"] + memory["prompts of a rollout"]
        pixels = 3 * self.model.pixels * 4 * self.decoded
        return {
            "encoding prompts": always + memory["text encoders"],
            "sampling": after + kept + moving + sampling + (drawing or self.held.gathered),
            "decoding": after + kept + moving + pixels + decode + drawing,
            "training": after + (0 if self.waits else kept) + memory["gradients"] + learning
            + self.held.gathered + self.held.joined,
        }  # fmt: skip

    def draws_whole(self, card: Card | None, memory: dict[str, int]) -> bool:
        """Are weights that are split gathered once for a rollout? What is free: as it begins."""
        kept = "network", "trained weights", "copies of trained weights", "vae"
        in_use = sum(memory[part] for part in (*kept, "prompts of a rollout"))
        free = None if card is None else card.memory * 1e9 - in_use
        return unshards(self.config, self.held.whole, free)

    # ---- all of it ----

    def estimate(self, card: Card | None) -> Estimate:
        config, rows, batches = self.config, self.rows(), self.batches()
        is_checkpointed = config.model.gradient_checkpointing
        sampling = self.call(batches["sampling"], False, False)
        learning = {on: self.call(batches["learning"], True, on) for on in (False, True)}
        decode, memory = self.decoding(), self.memory()
        peak_of_decode = int(DECODING * decode.peak)
        learn = learning[is_checkpointed]
        is_whole = self.draws_whole(card, memory)
        drawing = self.held.whole if is_whole else 0
        phases = self.phases(memory, sampling.peak, peak_of_decode, learn.peak, drawing)
        memory |= {
            "gathered weights": drawing or self.held.gathered,
            "gradients that are joined": self.held.joined,
            "states of a rollout": sum(self.states()),
            "a call of sampling": sampling.peak,
            "a call of training": learning[False].peak,
            "the same, checkpointed": learning[True].peak,
            "decoding": peak_of_decode,
        }
        forward = (rows["sampling"] + rows["not learning"]) / batches["sampling"]
        tflop = forward * sampling.operations
        tflop += rows["learning"] / batches["learning"] * learn.operations
        taken = sampling, learn, decode
        seconds = None if card is None else self.seconds(card, rows, batches, taken)
        host = {"a prompt": sum(part.nbytes for part in self.blank.values())}
        if self.waits:
            host["states of a rollout"] = self.states()[0] * self.prompts // self.block
        if config.train.offload_ema:
            host["mean of the weights"] = self.held.trained
        if config.lora is None and config.train.sharding is not None:
            copies = memory["copies of trained weights"] // self.held.trained
            host["a checkpoint, of the first process"] = (12 + 4 * copies) * self.parameters
        facts = {
            "processes": self.processes,
            "sharding": config.train.sharding,
            "model": str(config.model.path),
            "size": self.model.describe()["size"],
            "parameters": self.parameters,
            "training": self.trained,
            "batches": batches,
            "all weights in place of LoRA": 16 * self.parameters,
        }
        return Estimate(
            facts, memory, phases, host, rows, seconds, tflop / 1e12,
            self.assumptions(card, is_whole),
        )  # fmt: skip

    def seconds(
        self, card: Card, rows: dict[str, float], batches: dict[str, int], taken: tuple
    ) -> dict[str, float]:
        sampling, learn, decode = taken
        is_wide, faster = self.autocast is None, COMPILED if self.config.model.compile else 1
        a_row = faster * card.seconds(sampling, is_wide) / batches["sampling"]
        both = faster * card.seconds(learn, is_wide) / batches["learning"]
        wide = self.config.model.vae_dtype == "fp32"
        steps = self.recipe.updates_per_rollout * 7 * self.held.trained / card.bandwidth / 1e12
        found = {
            "sampling": rows["sampling"] * a_row,
            "decoding": rows["images"] / self.decoded * DECODING * card.seconds(decode, wide),
            "training, without gradient": rows["not learning"] * a_row,
            "training, with gradient": rows["learning"] * both + steps,
        }
        return found | {"iteration": sum(found.values())}

    def assumptions(self, card: Card | None, is_whole: bool) -> tuple[str, ...]:
        said = [
            f"{'one' if self.processes == 1 else 'each'} process; memory as torch counts it: not "
            "the context (about .5 GB), nor what an allocator loses between blocks",
            f"attention keeps {'its' if self.keeps_scores else 'no'} N x N scores; where autocast "
            "is on, norms and powers are float32",
            f"nn.RMSNorm is one kernel, under autocast in {32 if HAS_EXACT_RMS else 16} bits, as "
            f"in torch {torch.__version__.partition('+')[0]} (from 2.12 on 32)",
            f"a VAE's convolutions take {DECODING:g} times what is counted, as measured on an H200",
            "prompts have their full length; rewards, their models and validation are not counted",
        ]
        if card is not None:
            said += [
                f"{card.peak:g} TFLOP/s and {card.bandwidth:g} TB/s by {card.source}; a kernel "
                f"reaches {OF_PEAK:.0%} of the one or {OF_BANDWIDTH:.0%} of the other, and takes "
                f"{LAUNCH * 1e6:.0f} us beside: chosen by calls measured on an H200",
                "every prompt teaches: calls whose advantages are all zero are not left out",
            ]
            if self.config.model.compile:
                said.append(f"compiled calls take {COMPILED:.0%} of eager ones, and as much memory")
            if self.config.model.quantization:
                said.append("quantized layers take as long as those that are not")
        if self.processes > 1:
            said.append("what processes send each other takes no time")
        if self.config.train.sharding is not None:
            whole = "once for a rollout" if is_whole else "block by block"
            if card is None and self.config.train.rollout_unshard == "auto":
                whole += " (train.rollout_unshard: auto needs a --card)"
            said.append(f"weights are split by {self.config.train.sharding}, gathered {whole}")
        return tuple(said)


def _size(part: nn.Module | list[Tensor] | None) -> int:
    """In bytes; a parameter that two layers share is one."""
    tensors = part.parameters() if isinstance(part, nn.Module) else part or []
    return sum(tensor.nbytes for tensor in tensors)
