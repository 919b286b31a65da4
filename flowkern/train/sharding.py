"""Several processes that each keep a part of a network's weights: torch's `fully_shard`.

Under LoRA the frozen weights are split, and the adapters are on every process what they are on one:
their copies, files and optimizer know of no other process, and their gradients are joined once per
optimizer step. Where all weights are trained, each is split, with its gradient, its moments and its
copies. A unit is one of the network's repeated blocks: what a pass needs of it is gathered when it
is asked, so every process has to ask as often, in the same order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowkern.checks import ConfigError
from flowkern.models import Model
from flowkern.models.stages import Stages
from flowkern.split import is_split, part_of
from flowkern.train.config import Config
from flowkern.train.distributed import Replicas
from flowkern.train.errors import RunError

KEY = "train.sharding"
PLUGINS = "FSDP", "DEEPSPEED", "MEGATRON_LM"
"""Of accelerate, which split networks in their own ways; on a CPU it leaves them out silently."""
FITS = 0.5
"""Of a device's free memory, what all weights may take of it while samples are drawn."""


def shard(model: Model, config: Config, accelerator: Accelerator) -> None:
    """Split the weights of a network that has its adapter and is compiled, as configured; block by
    block they leave the host, where `load_pipeline` has them."""
    kind = config.train.sharding
    if kind is None:
        return
    mesh = _mesh(kind, accelerator)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    network, policy = model.network, MixedPrecisionPolicy()
    if config.lora is None and config.train.mixed_precision == "bf16":
        # What comes in is not cast: levels of noise would be rounded.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    kept = set() if config.lora is None else {p for p in network.parameters() if p.requires_grad}
    for p in kept:
        p.data = p.data.to(accelerator.device)
    # The root, too: between two calls every process then has its parts alone, and one of them may
    # read them (in saving) without the others.
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": kept}
    options["reshard_after_forward"] = True
    # Blocks and networks that give a view, as FLUX.1's do. To change one in place would leave out
    # what is gathered for its backward pass; none of the families' networks does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for block in (*model.repeated(), network):
        fully_shard(block, **options)
    for module in network.modules():
        if isinstance(module, Stages):
            module.asks_both = True


def require(config: Config, accelerator: Accelerator) -> None:
    """Raises ConfigError where weights cannot be split as configured, before there are any."""
    kind = config.train.sharding
    for plugin in PLUGINS:
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise ConfigError(
                f"{KEY}: got {kind or 'null'}, and accelerate's configuration asks for {plugin}; "
                "expected its distributed_type to be MULTI_GPU: how weights are split is said here"
            )
    require_processes(config, accelerator.num_processes)
    require_split(config)


def require_processes(config: Config, world: int) -> None:
    """Raises ConfigError where so many processes cannot share weights as configured."""
    kind = config.train.sharding
    if kind is None:
        return
    if world == 1:
        raise ConfigError(
            f"{KEY}: got {kind} on one process; expected several (torchrun, accelerate launch), or "
            "null"
        )
    node = of_this_node(world)
    if kind == "hsdp" and (not 1 < node < world or world % node):
        raise ConfigError(
            f"{KEY}: got hsdp, which splits inside of nodes that have as many processes each, at "
            f"least 2, but there are {world} with {node} on this node (LOCAL_WORLD_SIZE); expected "
            "fsdp2"
        )


def require_split(config: Config) -> None:
    """Raises ConfigError where weights are split, and another option does not go with it."""
    kind = config.train.sharding
    if kind is None:
        return
    if getattr(config.model, "quantization", None) == "float8":  # in buffers
        raise ConfigError(
            f"{KEY}: got {kind}, but model.quantization is float8, whose weights are not split; "
            "expected int8, nf4 or null"
        )
    for option in ("offload_ema", "optimizer"):
        value = getattr(config.train, option)
        if config.lora is None and value in (True, "adamw_8bit"):
            raise ConfigError(
                f"{KEY}: got {kind}, but train.{option} is {value} and lora null: it takes whole "
                "weights; expected one of the two"
            )
    if config.lora is None and config.train.mixed_precision == "fp16":
        raise ConfigError(
            f"{KEY}: got {kind}, but train.mixed_precision is fp16 and lora null; all weights are "
            "split in no or bf16"
        )


def of_this_node(world: int) -> int:
    """How many of the processes, as launchers say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _mesh(kind: str, accelerator: Accelerator) -> Any:
    """The processes in a row, or (hsdp) as nodes by the processes of each."""
    from torch.distributed.device_mesh import init_device_mesh

    device = accelerator.device.type
    world = accelerator.num_processes
    node = of_this_node(world)
    if kind == "fsdp2":
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world // node, node), mesh_dim_names=("replicate", "shard"))


def saves_alone(config: Config) -> bool:
    """Has the main process all that a checkpoint holds?"""
    return config.train.sharding is None or config.lora is not None


def spread(config: Config, accelerator: Accelerator, modules: Mapping[str, nn.Module]) -> Replicas:
    """How the processes share what is trained. Raises ConfigError where it is not as configured."""
    if config.train.sharding is None:
        return Replicas(accelerator)
    return Sharded(config, accelerator, modules)


class Sharded(Replicas):
    """Modules that are split, in place of `Replicas`."""

    def __init__(
        self, config: Config, accelerator: Accelerator, modules: Mapping[str, nn.Module]
    ) -> None:
        """Raises ConfigError where they are not split as configured."""
        super().__init__(accelerator)
        from torch.distributed.fsdp import FSDPModule

        self._kind, self._option = config.train.sharding, config.train.rollout_unshard
        self._roots = list(modules.values())
        self._units = [u for m in self._roots for u in m.modules() if isinstance(u, FSDPModule)]
        parameters = [(n, p) for m in self._roots for n, p in m.named_parameters()]
        self.saves_alone = saves_alone(config)
        is_narrow = config.lora is None and config.train.mixed_precision == "bf16"
        self._width = 2 if is_narrow else None
        for name, p in parameters:
            if is_split(p) != (not self.saves_alone or not p.requires_grad):
                raise ConfigError(
                    f"{KEY}: got {self._kind}, but {name} is {'' if is_split(p) else 'not '}split: "
                    "this task is trained on whole weights; expected null"
                )
        if len(self._units) <= len(self._roots):
            raise ConfigError(f"{KEY}: got {self._kind}, but no block of the network is split")
        self._unshards: bool | None = None
        if self.saves_alone:  # each has made its own
            for _, p in parameters:
                if p.requires_grad:
                    torch.distributed.broadcast(p.data, src=0)

    @property
    def facts(self) -> list[str]:
        kept = ", whole while samples are drawn" if self.unshards else ""
        return [f"sharding: {self._kind} over {self.accelerator.num_processes} processes{kept}"]

    @property
    def unshards(self) -> bool:
        """Are all weights gathered once for a rollout? Decided when first asked, by all: "auto" is
        where they take at most half of what every CUDA device has free, and never on a CPU, whose
        processes share one memory."""
        if self._unshards is None:
            self._unshards = self._option is True
            device = self.accelerator.device
            if self._option == "auto" and device.type == "cuda":
                free = torch.cuda.mem_get_info(device)[0]
                free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                is_short = torch.tensor([float(self._bytes() > FITS * free)], device=device)
                self._unshards = not self.accelerator.reduce(is_short, "sum").item()
        return self._unshards

    def _bytes(self) -> int:
        """Of all weights that are split, as they are gathered."""
        split = [p for m in self._roots for p in m.parameters() if is_split(p)]
        return sum(p.numel() * (self._width or p.element_size()) for p in split)

    def wrap(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Themselves, computing in the configured precision."""
        prepare = self.accelerator.prepare_model
        return {name: prepare(module, evaluation_mode=True) for name, module in modules.items()}

    @contextmanager
    def joining(self, is_last: bool) -> Iterator[None]:
        """A part of a gradient is joined as it is made, or whole ones would be kept; across nodes
        it is with the last, and under LoRA in `join`."""
        for module in self._roots:
            module.set_requires_all_reduce(is_last)
        yield

    def join(self, parameters: Sequence[Tensor]) -> None:
        """The means of the adapters' gradients, in one message."""
        if not self.saves_alone:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        flat = self.accelerator.reduce(flat, "mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def agree(self, calls: int) -> None:
        """Before so many passes; raises RunError where another process would make more or less:
        they would wait for each other without end."""
        device = self.accelerator.device
        counts = self.accelerator.gather(torch.tensor([calls], device=device)).tolist()
        for rank, count in enumerate(counts):
            if count != counts[0]:
                raise RunError(
                    f"process {rank}: would make {count} passes, and process 0 {counts[0]}: with "
                    f"{KEY}={self._kind} all make as many"
                )

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Around passes between which no weight moves: all of them are gathered once, where that is
        asked for."""
        if not self.unshards:
            yield
            return
        for module in self._roots:
            module.set_reshard_after_forward(False)
        try:
            yield
        finally:
            for module in self._roots:
                module.set_reshard_after_forward(True)
            self._reshard()

    def moved(self) -> None:
        """What was gathered of weights that have changed is gathered anew."""
        if not self.saves_alone:  # adapters are not gathered
            self._reshard()

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def parts(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """An optimizer's state of whole tensors, split as its parameters are."""
        moments = {
            index: {
                name: part_of(v, parameters[index]) if v.shape == parameters[index].shape else v
                for name, v in each.items()
            }
            for index, each in state["state"].items()
        }
        return state | {"state": moments}
