"""The Triton kernels compiled ahead of time, which needs no GPU: what ptxas made of them.

The ops are called on the CPU and their launches compile for an architecture instead, so that the
kernels are those that users get, specialized as a launch specializes them.
`python tests/ops/test_triton_aot.py` checks all of them and prints the table of registers, stack
and vector widths.
"""

import itertools
import math
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from calls import BY_NAME, KEEPING, LATENTS, Problem, take  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import flowkern as fk  # noqa: E402
from flowkern.ops._common import dispatch  # noqa: E402
from flowkern.ops._common.rows_triton import LONG  # noqa: E402

# Before `compiling` interprets.
from flowkern.ops.token_loss import chunks, triton_impl  # noqa: E402, F401
from flowkern.schedules import KINDS  # noqa: E402
from flowkern.schedules import triton_impl as edges_triton  # noqa: E402

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
BETWEEN = {
    "sde_step, guided, history", "sde_step, mean", "sde_step, rounded", "sde_log_prob, mean",
    "ode_step", "sde_log_prob, guided", "policy_loss, drawn again",
    "policy_loss, guard, KL", "policy_loss, on policy, guard", "policy_loss, recorded",
    "policy_loss, weights, one edge", "policy_loss, guided", "policy_loss, guard, drawn again",
    "matching_loss, nft, on policy, KL", "matching_loss, anchors",
    "matching_loss, siblings, anchors", "matching_loss, uniform, anchor of no weight",
    "matching_loss, t", "matching_loss, on policy", "matching_loss, nft",
}  # fmt: skip
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
CALLS = take(
    ("takes seconds, and is between others that are compiled", lambda c: str(c) in BETWEEN),
    ("has no latent to read", lambda c: c.verb == "philox_normal"),
    ("has tiles of tokens: below", lambda c: c.op == "guidance"),
)


def is_grown(call, dtypes):
    """Whether long samples take larger tiles: where programs arrive and have registers left."""
    if call.has("row") or call.verb == "ode_step":
        return False
    if call.verb in ("policy_loss", "matching_loss") and dtypes[1] != H:
        return False
    if call.verb == "matching_loss" and call.has("seed"):
        anchors = ("old_velocity", "velocity_ref", "velocity_ema")
        return sum(call.has(name) for name in anchors) <= 1
    return call.verb != "policy_loss" or call.has("old_velocity", "x_next")


SPILLED = "matching_loss"
"""Of float32, forward: ptxas keeps 7 registers of 72 on a stack of 16 bytes, for sm_120 alone."""
GROWN = [call for call in CALLS if is_grown(call, (H, H))]


class Unwritten(Problem):
    """Memory alone, whose values nobody reads."""

    def _latent(self, name):
        x = torch.empty(self._shape_of(name), dtype=self._dtype_of(name))
        return [x, x] if name == "history" else x


def unread(call, is_kept):
    """The latents that a launch has no need of, forward and backward.

    is_kept: the backward pass has the residual, and reads what anchors ask for.
    """
    if is_kept:
        anchors = {name for name in ("velocity_ref", "velocity_ema") if call.has(name)}
        reads = anchors | ({"velocity", "velocity_uncond"} if anchors else set())
        return (), set(LATENTS) - reads
    if call.verb == "matching_loss" and call.given.get("objective") != "nft":
        return (), {"old_velocity"}
    if call.verb != "policy_loss":
        return (), ()
    is_guard = call.given.get("ratio") == "guard"  # has a gradient without the velocity
    backward = {"velocity"} if is_guard else {"old_velocity"} if call.has("x_next") else ()
    if call.has("old_velocity"):
        return (), backward
    # The ratio is 1 without a look.
    return {"x_t", "x_next"} | (set() if call.has("velocity_ref") else {"velocity"}), backward


def latents(p):
    """(dtypes read, dtypes written) by each launch."""
    call = p.call
    dtypes = {n: [x.dtype for x in p[n]] if n == "history" else [p[n].dtype] for n in p.latents}
    is_kept = any(str(call) == str(other) for other in KEEPING) and p.of_velocity == F
    unused = unread(call, is_kept)
    reads = [[t for n in dtypes if n not in names for t in dtypes[n]] for names in unused]
    mean = [F] * call.has("return_mean")
    if call.learned and mean:  # backward reads it, its gradient, and x_next
        return [(reads[0], mean), ([*dtypes["x_next"], F, F], dtypes[call.learned])]
    if call.learned:
        kept = [F] * is_kept
        return [(reads[0], kept), (kept + reads[1], dtypes[call.learned])]
    return [(reads[0], [p.state] * (2 if call.given.get("return_x0") else 1) + mean)]


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

    interpreting, dispatch.interpreting = dispatch.interpreting, lambda: True  # it serves the CPU
    JITFunction.run = compile_only
    driver.set_active(Target(arch))
    dispatch.choose.cache_clear()
    try:
        yield launches
    finally:
        JITFunction.run, dispatch.interpreting = run, interpreting
        driver.set_active(None)  # the next user finds its own
        dispatch.choose.cache_clear()


class Compiled(NamedTuple):
    call: object
    is_backward: bool
    kernel: object
    block: int
    warps: int
    read: tuple  # latents, by dtype
    written: tuple


def compiled(call, dtypes, size, arch):
    """Every launch of a call; of long samples those that take a larger tile, as others compile to
    the same kernels as with shorter ones.
    """
    p = Unwritten(call, 2, size, *dtypes)
    with compiling(arch, least=2048 if size == VIDEO else 0) as kernels:
        p.run("triton")
    launched = zip(kernels, latents(p), strict=True)
    for turn, ((kernel, *tile), expected) in enumerate(launched):
        if kernel is not None:
            yield Compiled(call, turn == 1, kernel, *tile, *expected)


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


def options(call):
    """Arguments that are given, and settings, each of its verb."""
    shown = lambda v: v if isinstance(v, str | float | None) else "given"  # noqa: E731
    return {(call.verb, name, shown(value)) for name, value in call.given.items()}


def covering(calls):
    """Few calls that have every option of all: always that one which has most that others lack."""
    wanted, found = set().union(*map(options, calls)), []
    while wanted:
        found.append(max(calls, key=lambda call: len(options(call) & wanted)))
        wanted -= options(found[-1])
    return [call for call in calls if call in found]


def taken(arch):
    """What the suite compiles, as a kernel takes a second: for 90 calls that have every option, for
    the others one each of the rest; each in one of the dtypes. And of those that take a larger tile
    three for 90, one for each other. With FLOWKERN_EVERY_CELL=1, or by itself, this file looks at
    everything.
    """
    if EVERY:
        for dtypes, call, size in itertools.product(DTYPES, CALLS, (SIZE, VIDEO)):
            if size == SIZE or is_grown(call, dtypes):
                yield from compiled(call, dtypes, size, arch)
        return
    chosen, grown = covering(CALLS), GROWN[1::3]
    if arch != 90:  # losses; a draw, and losses
        turn = [other for other in ARCHS if other != 90].index(arch)
        rest = [call for call in CALLS if call not in chosen]
        chosen, grown = [rest[turn]], [GROWN[3 * turn]]
    if arch == 120:
        yield from compiled(next(c for c in CALLS if str(c) == SPILLED), (F, F), SIZE, arch)
    for turn, case in enumerate(chosen):
        yield from compiled(case, DTYPES[(turn + ARCHS.index(arch)) % 3], SIZE, arch)
    for turn, case in enumerate(grown):
        wished = DTYPES[turn % 3]
        dtypes = wished if is_grown(case, wished) else (H, H)
        yield from compiled(case, dtypes, VIDEO, arch)


def check(made):
    """No spills, every latent in 128-bit accesses, room for many programs; returns the figures."""
    call, is_backward, kernel, block, warps, read, written = made
    name, found = f"{call}{' backward' * is_backward}", report(kernel)
    per_thread = block // (32 * warps)
    wide = call.has("seed", "row")  # noise is drawn in a loop over siblings
    # Measured: 5 % faster than half of it.
    wide |= not is_backward and (str(call), block) == ("matching_loss", 2048)
    is_forward_120 = kernel.metadata.target.arch == 120 and not is_backward
    wide |= is_forward_120 and str(call) == SPILLED and {*read} == {F}
    aside = 16 if wide or triton.__version__.startswith("3.6.") else 0
    # LLVM leaves a slot that it came to need no more, and ptxas counts it.
    stack = found["stack"] if found["spills"] or re.search(LOCAL, kernel.asm["ptx"]) else 0
    assert stack <= aside and (aside or not found["spills"]), (name, found)
    loads = sum(per_thread * t.itemsize // 16 for t in read)
    if block > 1024:  # an even number of sums, which the last program reads in pairs
        assert found["loads128"] >= loads, (name, found)
    else:
        assert found["loads128"] == loads, (name, found)
    assert found["stores128"] == sum(per_thread * t.itemsize // 16 for t in written), name
    if triton.__version__.startswith("3.6."):  # its ptxas hoists the loads of the last program
        wide |= call.has("row")
    most = MOST_OF_DRAWN_SIBLINGS if wide else MOST_REGISTERS
    assert found["registers"] <= most, (name, found)
    return found


LOCAL = r"\b(ld|st)\.local\b|cvta\.local|\bcall\b"  # what can touch a thread's stack


def check_arithmetic(made):
    """IEEE, without contraction: what the bits of the noise, of the mean and of a replay rest on.
    Fused multiply-adds are those that the noise asks for, and those of exp and of division in
    float64.
    """
    call, is_backward, kernel, *_ = made
    ptx = kernel.asm["ptx"]
    name = r"\b((?:fma|mad|mul|add|sub|div|sqrt|rcp|ex2|lg2)\S*f\d\d)(?:x2)?\b"  # some have pairs
    arithmetic = set(re.findall(name, ptx))
    # An operand of 16 bits is widened, which is exact.
    allowed = re.compile(r"(mul|add|sub|div|sqrt|fma)\.rn\.f\d\d(\.b?f16)?")
    if "another power" in str(call):  # libdevice's log of a float64 begins a division with it
        arithmetic -= {"rcp.approx.ftz.f64"}
    assert not [a for a in arithmetic if not allowed.fullmatch(a)], str(call)
    is_kept = kernel.metadata.name == "_backward_kept_kernel"  # what forward has left is scaled
    draws = call.has("seed") and not is_kept
    assert ("sqrt.rn.f32" in arithmetic) == draws, str(call)
    assert draws or "fma.rn.f32" not in arithmetic, str(call)
    if is_backward or str(call) != "policy_loss, on policy":  # which has no latents
        adds = set() if is_kept else {"add.rn.f32"}
        assert arithmetic >= {"mul.rn.f32"} | adds, str(call)


def check_atomics(made):
    """Integers, and few: one per program where a draw or replay has a log-probability; in a loss
    one for the chunks of a row, one for the samples of a group and, where losses are summed, one
    for the groups; sums of floats are ordered.
    """
    call, is_backward, kernel, *_ = made
    expected = {"sde_step": 1, "sde_log_prob": 1, "policy_loss": 3, "matching_loss": 3}
    count = expected.get(call.verb, 0) - (call.given.get("reduction") == "none")
    count *= not is_backward
    found = re.findall(r"\b(?:atom|red)\.\S+", kernel.asm["ptx"])
    assert found == ["atom.global.gpu.acq_rel.add.u32"] * count, str(call)


@pytest.mark.long(20)
@pytest.mark.parametrize("arch", [90, *(arch for arch in ARCHS if arch != 90)])
def test_what_is_made_of_kernels(arch):
    for made in taken(arch):
        check(made)
        check_arithmetic(made)
        check_atomics(made)


def test_what_is_compiled_has_every_option():
    few = covering(CALLS)
    assert set().union(*map(options, few)) == set().union(*map(options, CALLS))
    assert {call.verb for call in few} == {call.verb for call in CALLS}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_long_samples_take_larger_tiles(call):
    """Where programs arrive and have registers left; nothing else does."""
    for dtypes, size in itertools.product(DTYPES, (SIZE, VIDEO)):
        with compiling(90, take=lambda compile: None) as launches:
            Unwritten(call, 2, size, *dtypes).run("triton")
        first, *others = (block for _, block, _ in launches)
        assert first == (2048 if is_grown(call, dtypes) and size == VIDEO else 1024)
        assert set(others) <= {1024}


def test_a_sample_of_one_element():
    """A launch makes constants of sizes and strides that are 1."""
    for name in ("sde_step, guided, history", "sde_log_prob"):
        assert all(made.kernel.asm["cubin"] for made in compiled(BY_NAME[name], DTYPES[2], 1, 90))
    for name in ("policy_loss, siblings", "matching_loss, noise given"):
        assert all(made.kernel.asm["cubin"] for made in compiled(BY_NAME[name], DTYPES[2], 1, 90))


def guidance(arch, dtype, patch=(2, 2), size=(16, 64, 64)):
    """Of Qwen-Image's latents: forward, and backward for both halves."""
    halves = [torch.empty(2, *size, dtype=dtype).requires_grad_() for _ in range(2)]
    with compiling(arch) as launches:
        out = fk.rescaled_guidance(*halves, 4.0, patch, "triton")
        torch.autograd.grad(out, halves, out.detach())
    return [kernel for kernel, _, _ in launches]


@pytest.mark.long(5)
@pytest.mark.parametrize("arch, dtype", [(90, F), (90, H), (80, H), (100, F), (120, H)])
def test_tokens_are_kept_in_registers(arch, dtype):
    """Read once, two columns of a token at a time, and IEEE arithmetic: what its bits rest on."""
    pair = {F: "v2.b32", H: "b32"}[dtype]
    for kernel, given, written in zip(guidance(arch, dtype), (0, 1), (1, 2), strict=True):
        found, ptx = report(kernel), kernel.asm["ptx"]
        assert not found["stack"] and not found["spills"], found
        assert found["registers"] <= 96, found  # a tile of up to three latents
        loads, stores = (re.findall(rf"\b{op}\.global\.(\S+)", ptx) for op in ("ld", "st"))
        out = "v2.b32" if written == 1 else pair  # a velocity of float32, gradients as their halves
        assert Counter(loads) == Counter({pair: 2 * 8}) + Counter({"v2.b32": 8 * given})
        assert Counter(stores) == {out: 8 * written}
        assert "sqrt.rn.f32" in ptx and "sqrt.approx" not in ptx and "div.full" not in ptx
        assert "fma.rn.f32" not in ptx and "atom" not in ptx


VERBS = ("policy", "log_prob", "gradient")


def token_rows(arch, dtype, verbs=VERBS, **options):
    """(verb, kernel, elements of a thread) of the token loss's launches, for rows of whole vectors:
    the policy loss with its gradient, log-probabilities, and their gradient.
    """
    turns = iter(VERBS)
    take = lambda compile: compile() if next(turns) in verbs else None  # noqa: E731
    hidden, weight = torch.empty(2, 64, dtype=dtype), torch.empty(8208, 64, dtype=dtype)
    ids, x = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    as_on_a_gpu = patch.object(chunks, "gemm_dtype", lambda device, dtype: dtype)
    with compiling(arch, take) as launches, as_on_a_gpu:
        hidden.requires_grad_()
        fk.linear_policy_loss(hidden, weight, ids, x, x, x, **options, backend="triton")
        fk.linear_log_prob(hidden, weight, ids, backend="triton").sum().backward()
    for verb, (kernel, block, warps) in zip(VERBS, launches, strict=True):
        if kernel is not None:
            yield verb, kernel, block // (32 * warps)


TOKEN_OPTIONS = {
    "ref_log_prob": torch.ones(2), "kl_coef": 0.1, "entropy_coef": 0.1,
    "sample_log_prob": torch.ones(2), "is_cap": 2.0, "dual_clip": 3.0,
}  # fmt: skip


# All for 90 in 16 bits; the most in float32, and one for each of the others.
ROWS = [(90, H, VERBS), (90, F, VERBS[:1])]
ROWS += [(arch, H, (verb,)) for arch, verb in zip((80, 100, 120), VERBS[::-1], strict=True)]
if EVERY:
    ROWS = [(*kind, VERBS) for kind in itertools.product(ARCHS, (F, H))]


@pytest.mark.long(5)
@pytest.mark.parametrize("arch, dtype, verbs", ROWS)
def test_token_rows_are_read_in_vectors_and_kept_in_registers(arch, dtype, verbs):
    """Once for what they say and once to be overwritten, whole tiles and the last one."""
    passes = {"policy": (2, 1), "log_prob": (1, 0), "gradient": (1, 1)}
    for verb, kernel, per_thread in token_rows(arch, dtype, verbs, **TOKEN_OPTIONS):
        found, vectors = report(kernel), 2 * per_thread * dtype.itemsize // 16
        reads, writes = passes[verb]
        assert not found["stack"] and not found["spills"], (verb, found)
        assert found["loads128"] >= reads * vectors, (verb, found)
        assert found["stores128"] == writes * vectors, (verb, found)
        assert found["registers"] <= MOST_REGISTERS, (verb, found)


ALL_GIVEN = torch.empty(8), torch.empty(8), torch.empty(8), torch.empty(1, dtype=H)
EDGES = [(90, "flow_sde", ALL_GIVEN), (80, "cps", (*ALL_GIVEN[:2], 0.7, None))]
if EVERY:
    EDGES = list(itertools.product(ARCHS, KINDS, (ALL_GIVEN, (*ALL_GIVEN[:2], 0.7, None))))


@pytest.mark.parametrize("arch, kind, given", EDGES)
def test_edges_are_computed_in_float64(arch, kind, given):
    """Division and roots are IEEE, and constants whole: 1e-5, log sqrt(2 pi), pi / 2."""
    with compiling(arch) as launches:
        edges_triton.rows(kind, 8, *given)
    ((kernel, *_),) = launches
    found, ptx = report(kernel), kernel.asm["ptx"]
    # Of cps: where libdevice's sine reduces an angle beyond 1e5, which none is.
    assert found["stack"] == (40 if kind == "cps" else 0), found
    assert found["registers"] <= MOST_REGISTERS, found
    assert not re.search(r"\.f32 *\{? *%\w+, *%\w+, *%\w+", ptx), "arithmetic in float32"
    for constant in (1e-5, math.pi / 2 if kind == "cps" else 0.5 * math.log(2 * math.pi)):
        assert struct.pack(">d", constant).hex().upper() in ptx.replace("0dBFED", "0d3FED"), (
            constant
        )
    assert ("sqrt.rn.f64" in ptx) == (kind != "cps") and "sqrt.approx" not in ptx


def table():
    cells = "{:46}{:12}{:>6}{:>7}{:>7}" + "{:>11}" * len(FIGURES)
    yield cells.format("kernel", "x_t, v", "block", "warps", "arch", *FIGURES)
    for dtypes in DTYPES:
        short = ", ".join(str(t).removeprefix("torch.").replace("float", "f") for t in dtypes)
        for arch, call in itertools.product(ARCHS, CALLS):
            sizes = (SIZE, VIDEO) if is_grown(call, dtypes) else (SIZE,)
            for made in itertools.chain(*(compiled(call, dtypes, size, arch) for size in sizes)):
                kernel = (
                    f"{call}{' backward' * made.is_backward}",
                    short,
                    made.block,
                    made.warps,
                    f"sm_{arch}",
                )
                yield cells.format(*kernel, *check(made).values())
    for dtype, arch in itertools.product((F, H), ARCHS):
        short = str(dtype).removeprefix("torch.").replace("float", "f")
        for way, kernel in zip(("", " backward"), guidance(arch, dtype), strict=True):
            figures = report(kernel).values()
            yield cells.format(f"rescaled_guidance{way}", short, "", "", f"sm_{arch}", *figures)
        for verb, kernel, _ in token_rows(arch, dtype, **TOKEN_OPTIONS):
            figures = report(kernel).values()
            yield cells.format(f"token_loss, {verb}", short, "", "", f"sm_{arch}", *figures)


if __name__ == "__main__":
    print(f"triton {triton.__version__}; 128-bit accesses per thread")
    for line in table():
        print(line, flush=True)
