"""What test_sharding.py asks of two processes: split_program.py OUT CONFIGURATION ..."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as group
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from flowkern.lookup import load
from flowkern.models import MODELS, compiled
from flowkern.split import is_split, whole
from flowkern.train.blocks import set_blocks
from flowkern.train.config import LoraConfig, from_dict
from flowkern.train.copies import REFERENCE
from flowkern.train.distributed import finish
from flowkern.train.errors import RunError
from flowkern.train.loop import Loop
from flowkern.train.parts import held
from flowkern.train.sharding import Sharded, shard
from flowkern.train.trained import set_trained

RANK = int(os.environ["RANK"])


def weights_of(loop):
    return {n: whole(p).detach() for n, p in loop.weights.modules["network"].named_parameters()}


def velocity_of(loop, scale=1.0):
    """Of the network as training asks it, at noise levels `scale` times .9 and .5."""
    model = loop.task.model
    conditioning = model.encode(["the digit 3", "a handwritten seven"])
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.velocity(x_t, scale * torch.tensor([0.9, 0.5]), conditioning)


def trained(config, out):
    """Two optimizer steps; of all weights the second once more by a run that is resumed. Returns
    the first, and what it said before."""
    loop = Loop(config)
    first = velocity_of(loop)
    is_halved(loop)
    messages, reduce = [], group.all_reduce

    def counted(tensor, *arguments, **more):
        messages.append(tensor.numel())
        return reduce(tensor, *arguments, **more)

    group.all_reduce = counted
    loop.step()
    group.all_reduce = reduce
    if config.lora is not None:  # four backward passes, one message with all of their gradients
        assert [m for m in messages if m > 100] == [sum(p.numel() for p in loop.parameters)]
        loop.step()
    else:
        steps_twice(loop, out / "checkpoint")
    weights = weights_of(loop)
    if RANK == 0:
        save_file({name: value.contiguous() for name, value in weights.items()}, out / "two_steps")
    return loop, first


def is_halved(loop):
    """Blocks are units, and this process has half of what is split."""
    kinds = [type(unit).__name__ for unit in loop.processes._units]
    assert sum("TransformerBlock" in kind for kind in kinds) == 2 and len(kinds) == 3
    weights = list(loop.task.model.network.parameters())
    assert all(is_split(p) == (loop.config.lora is None or not p.requires_grad) for p in weights)
    split = [p for p in weights if is_split(p)]
    here, total = sum(p.to_local().numel() for p in split), sum(p.numel() for p in split)
    assert abs(here - total / 2) < 0.01 * total
    model = loop.task.model
    blocks = [unit for unit in loop.processes._units if unit is not model.network]
    estimated = held(loop.config, model.network, blocks, 2)
    tensors = [*weights, *model.network.buffers()]
    local = sum((p.to_local() if is_split(p) else p).nbytes for p in tensors)
    if RANK == 0:  # it has the larger halves
        assert local == estimated.frozen + estimated.trained
    assert loop.processes._bytes() == estimated.whole


def steps_twice(loop, directory):
    """As this run, and as one that is resumed."""
    if RANK == 0:
        directory.mkdir()
    loop.save(directory if RANK == 0 else None)
    group.barrier()
    loop.step()
    again = Loop(loop.config)
    again.load(directory)
    for moment in (
        v.to_local() for s in again.optimizer.state.values() for v in s.values() if v.dim()
    ):
        assert moment.untyped_storage().nbytes() == 4 * moment.numel()
    again.step()
    other = weights_of(again)
    assert all(torch.equal(value, other[name]) for name, value in weights_of(loop).items())


def copied(tree):
    """All weights on each process: an optimizer step's four backward passes send one gradient."""
    alone = tree | {"train": tree["train"] | {"sharding": None}}
    loop, sent = Loop(from_dict(alone)), []
    wrapped = loop.weights.trained["network"]
    assert not (wrapped.find_unused_parameters or wrapped.broadcast_buffers)
    assert wrapped.gradient_as_bucket_view

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    loop.step()
    assert sum(sent) == sum(p.numel() for p in loop.parameters), sent


def swaps(loop, first):
    """The network computes with a copy's weights, whatever was gathered before."""
    now = velocity_of(loop)
    for option in (False, True):
        loop.processes._unshards = option
        with loop.processes.drawing():
            assert torch.equal(velocity_of(loop), now)
            with loop.weights.using(REFERENCE):
                reference = velocity_of(loop)
            assert torch.equal(velocity_of(loop), now)
        assert (reference - now).abs().max() > 1e-4 and torch.equal(reference, first)


def gathers(loop):
    """Blocks are gathered at every call, or once for all of them."""
    name = "all_gather_single" if hasattr(group, "all_gather_single") else "all_gather_into_tensor"
    seen, gather = [], getattr(group, name)

    def counted(*arguments, **more):
        seen.append(0)
        return gather(*arguments, **more)

    setattr(group, name, counted)
    try:
        for option, expected in ((False, [3, 3, 3]), (True, [3, 0, 0])):
            loop.processes._unshards, counts = option, []
            with loop.processes.drawing():
                for _ in expected:
                    seen.clear()
                    velocity_of(loop)
                    counts.append(len(seen))
            assert counts == expected, (option, counts)
    finally:
        setattr(group, name, gather)


def refuses(loop):
    loop.processes.agree(3)
    try:
        loop.processes.agree(3 + RANK)
    except RunError as error:
        assert "process 1: would make 4 passes, and process 0 3" in str(error)
    else:
        raise AssertionError("it would wait for ever")


def rounds_no_level(tree):
    """Where the network computes in bfloat16."""
    AcceleratorState._reset_state()
    loop = Loop(from_dict(tree | {"train": tree["train"] | {"mixed_precision": "bf16"}}))
    assert isinstance(loop.processes, Sharded)
    one, other = velocity_of(loop), velocity_of(loop, 1.001)
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert loop.step()[0]["ratio_mean"] == 1
    assert {p.dtype for p in loop.parameters} == {torch.float32}
    if loop.config.lora is None:
        assert loop.processes._bytes() == 2 * sum(p.numel() for p in loop.parameters)
    AcceleratorState._reset_state()
    return weights_of(loop)


def alike(kind, config, accelerator, levels):
    """A tiny pipeline, checkpointed, says and learns the same whether or not its frozen weights are
    split; its rows are at these levels on this process."""
    sys.path.append(str(Path(__file__).parents[1] / "models"))
    import tiny

    lora, size = LoraConfig(rank=2, alpha=3), {"height": 32, "width": 64}
    config = config.model_copy(update={"lora": lora})
    models = []
    for is_parted in (False, True):
        model = load(MODELS[type(tiny.pipeline(kind)).__name__], {}, "model")(
            tiny.pipeline(kind), **size | ({"num_frames": 5} if kind == "wan_a14b" else {})
        )
        torch.manual_seed(0)
        model.network.enable_gradient_checkpointing()
        set_trained(model, lora)
        for p in model.network.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.1)
        set_blocks(model, config, accelerator.device)
        if is_parted:
            shard(model, config, accelerator)
            processes = Sharded(config, accelerator, {"network": model.network})
        models.append(model)
    torch.manual_seed(RANK)
    x_t, sigma = torch.randn(2, *models[0].latent_shape), torch.tensor(levels)
    found = []
    for model in models:
        given = x_t, sigma, model.encode(["a cat", "a dog"])
        with torch.no_grad():
            before = model.velocity(*given)
        found.append(model.velocity(*given))
        assert torch.equal(found[-1], before), kind
        found[-1].square().mean().backward()
    assert torch.equal(*found), kind
    here, there = ([p for p in m.network.parameters() if p.requires_grad] for m in models)
    processes.join(there)
    for one, other in zip(here, there, strict=True):
        group.all_reduce(one.grad)
        assert other.grad.any(), kind
        torch.testing.assert_close(other.grad, one.grad / 2, rtol=1e-5, atol=1e-9)


def that_give_views(config, accelerator):
    """FLUX.1's blocks, of which torch would warn."""
    warnings.filterwarnings("error", "FSDP2-wrapped module")
    alike("flux", config, accelerator, [0.9, 0.5])


def on_one_side(config, accelerator):
    """The two networks of Wan 2.2, each process's rows all at the levels of one of them."""
    alike("wan_a14b", config, accelerator, [[0.95, 0.9], [0.5, 0.2]][RANK])


def with_compiled_blocks(config, accelerator):
    compiled.BACKEND = "eager"
    model = config.model.model_copy(update={"compile": True})
    alike("sd3", config.model_copy(update={"model": model}), accelerator, [0.9, 0.5])


out, trees = Path(sys.argv[1]), json.loads(sys.argv[2])
configs = {kind: from_dict(tree) for kind, tree in trees.items()}
for kind in configs:
    (out / kind).mkdir(exist_ok=True)
loops = {kind: trained(config, out / kind) for kind, config in configs.items()}
swaps(*loops["full"])
for probe in (gathers, refuses):
    probe(loops["full"][0])
on_one_side(configs["lora"], loops["lora"][0].accelerator)
that_give_views(configs["lora"], loops["lora"][0].accelerator)
copied(trees["lora"])
if os.environ.get("FLOWKERN_EVERY_CELL") == "1":
    with_compiled_blocks(configs["lora"], loops["lora"][0].accelerator)
rounds_no_level(trees["full"])  # weights are gathered in it
if os.environ.get("FLOWKERN_EVERY_CELL") == "1":
    assert torch.bfloat16 in {p.dtype for p in rounds_no_level(trees["lora"]).values()}
    trees["full"]["train"]["optimizer"] = "adamw_fused"
    fused, plain = Loop(from_dict(trees["full"])), load_file(out / "full/two_steps")
    fused.step(), fused.step()
    assert all((plain[n] - p).abs().max() <= 5e-6 for n, p in weights_of(fused).items())
finish(Accelerator(cpu=True))  # the state of the others is reset
