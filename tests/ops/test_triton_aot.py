"""The Triton kernels compiled ahead of time, which needs no GPU: what ptxas made of them.

The ops are called on the CPU and their launches compile for an architecture instead, so that the
kernels are those that users get, specialized as a launch specializes them.
`python tests/ops/test_triton_aot.py` checks all of them and prints the table of registers, stack
and vector widths.
"""

import itertools
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flowkern.ops._common.arguments import Noise  # noqa: E402
from flowkern.ops._common.rows_triton import LONG  # noqa: E402
from flowkern.ops.matching_loss import triton_impl as matching  # noqa: E402
from flowkern.ops.matching_loss.inputs import MatchingInputs  # noqa: E402
from flowkern.ops.policy_loss import triton_impl as policy  # noqa: E402
from flowkern.ops.policy_loss.inputs import PolicyInputs  # noqa: E402
from flowkern.ops.sde_step import triton_impl as step  # noqa: E402

SIZE, VIDEO = 65_536, 2_096_640  # multiples of 16: sizes of one side of LONG make the same kernels
assert SIZE <= LONG < VIDEO
ARCHS = (80, 90, 100, 120)
F, H = torch.float32, torch.bfloat16
DTYPES = ((F, F), (H, H), (F, H))  # of the states, of the velocity
FIGURES = ("registers", "stack", "spills", "shared", "loads128", "stores128")
# At least 800 threads an SM, each with all its loads in flight. Where noise is drawn in a loop over
# siblings 512, and ptxas may put a few scalars aside (16 bytes of stack at most); the ptxas of
# Triton 3.6 does so elsewhere, too.
MOST_REGISTERS, MOST_OF_DRAWN_SIBLINGS = 80, 128
DRAWN_SIBLINGS = ("policy, all", "awm, siblings, drawn", "nft, all")
GROWN = (
    "draw, noise in kernel", "draw, noise given", "replay", "policy", "policy, kl", "awm",
    "awm, drawn", "nft, on policy", "add noise", "add noise, given",
)  # fmt: skip
DRAWN = (*DRAWN_SIBLINGS, "draw, noise in kernel", "policy, guided, kl, drawn", "awm, drawn")
DRAWN += ("add noise",)


class Calls:
    """One call per kernel and case: (latents read, latents written), by launch. Two velocity rows,
    three samples where they are siblings.
    """

    def __init__(self, state, velocity, size):
        self.x, self.v, self.size = state, velocity, size

    def latent(self, dtype, rows=2):
        return torch.empty(rows, self.size, dtype=dtype)

    def draw(self, given=False):
        x, v, size = self.x, self.v, (self.x, self.v)
        source = Noise(self.latent(x)) if given else key(2)
        step.draw(
            self.latent(x), self.latent(v), torch.empty(2, 9), None, 1.0, (), source,
            self.latent(x), torch.empty(2), None,
        )  # fmt: skip
        return [((*size, x) if given else size, (x,))]

    def ode_guided_order_3(self):
        x, v = self.x, self.v
        step.draw(
            self.latent(x), self.latent(v), torch.empty(9), self.latent(v), 4.5,
            (self.latent(x), self.latent(x)), Noise(), self.latent(x), None, self.latent(x),
        )  # fmt: skip
        return [((x, v, v, x, x), (x, x))]

    def replay(self):
        x, v = self.x, self.v
        inputs = (self.latent(x), self.latent(v), self.latent(x), torch.empty(2, 9), None, 1.0)
        step.replay(*inputs)
        step.replay_backward(torch.empty(2), *inputs)
        return [((x, v, x), ()), ((x, v, x), (v,))]

    def policy(self, siblings=False, drawn=None, old=True, ref=False, uncond=False, guard=False):
        x, v = F if drawn else self.x, self.v
        batch = 3 if siblings else 2
        row = torch.zeros(batch, dtype=torch.int64) if siblings else None
        sources = {"given": (self.latent(F, batch), None, None, None), "key": seeded(batch)}
        x_next = None if drawn else self.latent(x, batch)
        old, ref, uncond = (self.latent(v) if there else None for there in (old, ref, uncond))
        inputs = PolicyInputs(
            self.latent(v), self.latent(x), x_next, torch.empty(batch, 9), torch.empty(batch), row,
            old, None, *sources.get(drawn, (None,) * 4), uncond, 1.0, ref, 0.1, None, 1e-4, 1e-4,
            "guard" if guard else "sde", "mean",
        )  # fmt: skip
        out = policy.forward(inputs)
        kept = old if drawn or guard else None
        policy.backward(torch.empty(()), out[-1], inputs._replace(old_velocity=kept))
        read = (v,) * (1 + (ref is not None) + (uncond is not None))
        stored = () if drawn == "key" else (F,) if drawn else (x,)
        forward = read + ((v, x, *stored) if old is not None else ())
        if old is None and ref is None:
            forward = ()
        backward = read + (x, *stored) + (v,) * (kept is not None)
        if guard:  # has a gradient without the velocity
            backward = backward[1:]
        return [(forward, ()), (backward, (v,))]

    def matching(self, nft=False, siblings=False, given=False, old=True, anchors=False):
        x, v = self.x, self.v
        batch = 3 if siblings else 2
        row = torch.zeros(batch, dtype=torch.int64) if siblings else None
        source = (self.latent(F, batch), None, None, None) if given else seeded(batch)
        old, ref, ema = (self.latent(v) if there else None for there in (old, anchors, anchors))
        inputs = MatchingInputs(
            self.latent(v), self.latent(x, batch), torch.empty(batch), torch.empty(batch), row,
            *source, "nft" if nft else "awm", "ghuber", old, ref, ema, 0.1, 0.1, 1.0, 1.0, "mean",
        )  # fmt: skip
        out = matching.forward(inputs)
        kept = old if nft else None
        matching.backward(torch.empty(()), out[-1], inputs._replace(old_velocity=kept))
        read = (v, x) + (F,) * given + (v, v) * anchors
        was_read = (v,) * (old is not None)
        return [(read + was_read, ()), (read + was_read * nft, (v,))]

    def add_noise(self, given=False):
        x = self.x
        matching.add_noise(
            self.latent(x), torch.empty(2), Noise(self.latent(x)) if given else key(2)
        )
        return [((x, x) if given else (x,), (x,))]


def key(batch):
    return Noise(None, 3, torch.zeros(batch, dtype=torch.int64))


def seeded(batch):
    """noise, seed, sample_id, step of a loss."""
    return None, 3, torch.zeros(batch, dtype=torch.int64), 0


CASES = {  # name: (verb, options)
    "draw, noise in kernel": (Calls.draw, {}),
    "draw, noise given": (Calls.draw, {"given": True}),
    "ode, guided, order 3": (Calls.ode_guided_order_3, {}),
    "replay": (Calls.replay, {}),
    "policy": (Calls.policy, {}),
    "policy, kl": (Calls.policy, {"ref": True, "uncond": True}),
    "policy, siblings": (Calls.policy, {"siblings": True}),
    "policy, on policy": (Calls.policy, {"old": False}),
    "policy, on policy, kl": (Calls.policy, {"old": False, "ref": True}),
    "policy, guard, noise given": (Calls.policy, {"guard": True, "drawn": "given"}),
    "policy, guided, kl, drawn": (
        Calls.policy,
        {"ref": True, "uncond": True, "drawn": "key"},
    ),
    "policy, all": (
        Calls.policy,
        {"siblings": True, "ref": True, "uncond": True, "drawn": "key"},
    ),
    "awm": (Calls.matching, {"given": True}),
    "awm, drawn": (Calls.matching, {}),
    "awm, siblings, drawn": (Calls.matching, {"siblings": True}),
    "nft, on policy": (Calls.matching, {"nft": True, "old": False, "given": True}),
    "nft, all": (Calls.matching, {"nft": True, "siblings": True, "anchors": True}),
    "add noise": (Calls.add_noise, {}),
    "add noise, given": (Calls.add_noise, {"given": True}),
}


class Target:
    """In place of Triton's driver: a device of one architecture, and its number."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch, take=lambda compile: compile(), least=0):
    """Launches compile for `arch`, or do what `take` does, run nothing and end up in the list. Of
    blocks below `least` none compiles.
    """
    launches, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compile = lambda: run(self, *arguments, grid=grid, warmup=True, **options)  # noqa: E731
        kernel = take(compile) if options["BLOCK"] >= least else None
        launches.append((kernel, options["BLOCK"], options["num_warps"]))

    JITFunction.run = compile_only
    driver.set_active(Target(arch))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(None)  # the next user finds its own


class Compiled(NamedTuple):
    name: str
    kernel: object
    block: int
    warps: int
    read: tuple  # latents, by dtype
    written: tuple


def compiled(name, dtypes, size, arch):
    """Every launch of a case; of long samples those that take a larger tile, as others compile to
    the same kernels as with shorter ones.
    """
    verb, options = CASES[name]
    with compiling(arch, least=2048 if size == VIDEO else 0) as kernels:
        expected = verb(Calls(*dtypes, size), **options)
    for (kernel, *tile), latents in zip(kernels, expected, strict=True):
        if kernel is None:
            continue
        backward = " backward" * ("backward" in kernel.metadata.name)
        yield Compiled(name + backward, kernel, *tile, *latents)


def cuobjdump(kernel):
    """What it uses, and its instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", "-sass", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip


def report(kernel):
    """FIGURES: bytes of stack and shared memory, instructions that spill, 128-bit accesses."""
    dumped = cuobjdump(kernel)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", dumped)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128\b", dumped)) for op in ("LDG", "STG"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", dumped))
    shared = kernel.metadata.shared
    return dict(
        zip(FIGURES, (registers, stack + local, spills, shared, loads, stores), strict=True)
    )


def taken(arch):
    """What the suite compiles, as a kernel takes more than a second: for 90 each case, of which the
    others share a half; each in one of the dtypes. And those that take a larger tile, once. This
    file, run by itself, looks at everything for every architecture.
    """
    others = [other for other in ARCHS if other != 90]
    share = slice(None) if arch == 90 else slice(2 * others.index(arch), None, 2 * len(others))
    for turn, case in list(enumerate(CASES))[share]:
        yield from compiled(case, DTYPES[(turn + ARCHS.index(arch)) % 3], SIZE, arch)
    for case in GROWN[1::2] if arch == 90 else GROWN[::2][share]:
        yield from compiled(case, (H, H), VIDEO, arch)


def check(made):
    """No spills, every latent in 128-bit accesses, room for many programs; returns the figures."""
    name, kernel, block, warps, read, written = made
    found = report(kernel)
    per_thread = block // (32 * warps)
    wide = name.removesuffix(" backward") in DRAWN_SIBLINGS
    wide |= (name, block) == ("awm, drawn", 2048)  # measured: 5 % faster than half of it
    aside = 16 if wide or triton.__version__.startswith("3.6.") else 0
    assert found["stack"] <= aside and (aside or not found["spills"]), (name, found)
    loads = sum(per_thread * t.itemsize // 16 for t in read)
    if block > 1024:  # an even number of sums, which the last program reads in pairs
        assert found["loads128"] >= loads, (name, found)
    else:
        assert found["loads128"] == loads, (name, found)
    assert found["stores128"] == sum(per_thread * t.itemsize // 16 for t in written), name
    if triton.__version__.startswith("3.6."):  # its ptxas hoists the loads of the last program
        wide |= "siblings" in name
    most = MOST_OF_DRAWN_SIBLINGS if wide else MOST_REGISTERS
    assert found["registers"] <= most, (name, found)
    return found


@pytest.mark.long(40)
@pytest.mark.parametrize("arch", [90, *(arch for arch in ARCHS if arch != 90)])
def test_no_spills_and_every_latent_in_128_bit_accesses(arch):
    for made in taken(arch):
        check(made)


@pytest.mark.parametrize("case", CASES)
def test_long_samples_in_16_bits_take_larger_tiles(case):
    """Where programs arrive and have registers left; nothing else does."""
    verb, options = CASES[case]
    for dtypes, size in itertools.product(DTYPES, (SIZE, VIDEO)):
        with compiling(90, take=lambda compile: None) as launches:
            verb(Calls(*dtypes, size), **options)
        first, *others = (block for _, block, _ in launches)
        assert first == (2048 if case in GROWN and (dtypes, size) == ((H, H), VIDEO) else 1024)
        assert set(others) <= {1024}


def test_arithmetic_is_ieee_without_contraction():
    """What the bits of the noise, of the mean and of a replay rest on. Fused multiply-adds are
    those that the noise asks for, and those of exp and of division in float64.
    """
    for name, kernel, *_ in taken(90):
        ptx = kernel.asm["ptx"]
        arithmetic = set(
            re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|ex2|lg2)\S*f\d\d\b", ptx)
        )
        assert all(re.fullmatch(r"(mul|add|sub|div|sqrt|fma)\.rn\.f\d\d", a) for a in arithmetic)
        draws = name.removesuffix(" backward") in DRAWN
        assert ("sqrt.rn.f32" in arithmetic) == draws, name
        assert draws or "fma.rn.f32" not in arithmetic, name
        if "policy, on policy" != name:  # which has no latents
            assert arithmetic >= {"mul.rn.f32", "add.rn.f32"}, name


def test_atomics_are_integers_and_few():
    """One per program where a draw or replay has a log-probability; in a loss one for the chunks of
    a row, one for the samples of a group and one for the groups; sums of floats are ordered.
    """
    for name, kernel, *_ in taken(90):
        losses = name.startswith(("policy", "awm", "nft"))
        expected = 3 if losses else name.startswith(("draw", "replay"))
        if "backward" in name:
            expected = 0
        found = re.findall(r"\b(?:atom|red)\.\S+", kernel.asm["ptx"])
        assert found == ["atom.global.gpu.acq_rel.add.u32"] * expected, name


def test_a_sample_of_one_element():
    """A launch makes constants of sizes and strides that are 1."""
    for case in ("draw, noise given", "ode, guided, order 3", "replay", "policy, siblings", "awm"):
        assert all(kernel.asm["cubin"] for _, kernel, *_ in compiled(case, DTYPES[2], 1, 90))


def table():
    cells = "{:36}{:12}{:>6}{:>7}{:>7}" + "{:>11}" * len(FIGURES)
    yield cells.format("kernel", "x_t, v", "block", "warps", "arch", *FIGURES)
    for dtypes in DTYPES:
        short = ", ".join(str(t).removeprefix("torch.").replace("float", "f") for t in dtypes)
        for arch, case in itertools.product(ARCHS, CASES):
            sizes = (SIZE, VIDEO) if case in GROWN and dtypes == (H, H) else (SIZE,)
            for made in itertools.chain(*(compiled(case, dtypes, size, arch) for size in sizes)):
                kernel = made.name, short, made.block, made.warps, f"sm_{arch}"
                yield cells.format(*kernel, *check(made).values())


if __name__ == "__main__":
    print(f"triton {triton.__version__}; 128-bit accesses per thread")
    for line in table():
        print(line, flush=True)
