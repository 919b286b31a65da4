"""The Triton kernels compiled ahead of time, which needs no GPU: what ptxas made of them.

`python tests/ops/test_triton_aot.py` prints the table of registers, stack and vector widths.
"""

import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flowkern.ops.sde_step import triton_impl as step  # noqa: E402

IMAGE, VIDEO = 65_536, 2_096_640
ARCHS = (80, 90, 100, 120)
DTYPES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"))  # of the states, of the velocity
BYTES = {"*fp32": 4, "*bf16": 2}
FIGURES = ("registers", "stack", "spills", "shared", "loads128", "stores128")


def cases(state, velocity):
    """(name, kernel, arguments, latents read, latents written).

    The arguments as a launch specializes them: ":16" divisible by 16, as all pointers are; None and
    integers constant.
    """
    x, v = (f"*{state}", "i32:16"), (f"*{velocity}", "i32:16")
    rows = {"guidance_scale": "fp32", "rows_ptr": "*fp32", "row_stride": "i32"}
    key = {"step_ptr": None, "step_value": "i32", "key_low": "i32", "key_high": "i32", "STREAM": 1}
    absent = dict.fromkeys(("result", "x0", "uncond", "noise", "sample_id_ptr"))
    common = {"x_next": x, "x_t": x, "velocity": v, "size": "i32:16", "history": ()}
    common = absent | common | rows | key
    scored = common | {"result": ("*fp32", "*fp32", "*i32")}
    guided = common | {"uncond": v, "history": (x, x), "x0": x}
    sloped = common | {"grad_velocity": v, "grad_ptr": "*fp32"}
    draw, replay = step._sde_draw_kernel, step._sde_replay_kernel
    yield "draw, noise in kernel", draw, scored | {"sample_id_ptr": "*i64"}, (x, v), (x,)
    yield "draw, noise given", draw, scored | {"noise": x}, (x, v, x), (x,)
    yield "ode, guided, order 3", draw, guided, (x, v, v, x, x), (x, x)
    yield "replay", replay, scored, (x, v, x), ()
    yield "replay backward", step._sde_replay_backward_kernel, sloped, (x, v, x), (v,)


def compiled(kernel, arguments, block, warps, arch):
    constants, attributes = {}, {}

    def describe(value, path):
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i)) for i, v in enumerate(value))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value[0] == "*" or value.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix(":16")

    arguments = arguments | {"BLOCK": block}
    signature = {n: describe(arguments[n], (i,)) for i, n in enumerate(kernel.arg_names)}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def cuobjdump(kernel, *flags):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, *flags, file.name], check=True, capture_output=True, text=True
        ).stdout


def report(kernel):
    """FIGURES: bytes of stack and shared memory, instructions that spill, 128-bit accesses."""
    usage = cuobjdump(kernel, "--dump-resource-usage")
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    sass = cuobjdump(kernel, "-sass")
    loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128\b", sass)) for op in ("LDG", "STG"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    shared = kernel.metadata.shared
    return dict(
        zip(FIGURES, (registers, stack + local, spills, shared, loads, stores), strict=True)
    )


# Each architecture, each dtype, each tile, though not each with each: a kernel takes half a second.
@pytest.mark.parametrize(
    "arch, dtypes, size",
    [(90, dtypes, IMAGE) for dtypes in DTYPES]
    + [(80, dtypes, IMAGE) for dtypes in DTYPES[:2]]
    + [(90, DTYPES[2], VIDEO), (100, DTYPES[0], IMAGE), (120, DTYPES[0], IMAGE)],
)
def test_no_spills_and_every_latent_in_128_bit_accesses(arch, dtypes, size):
    block, warps = step.tile(size)
    per_thread = {t: block // (32 * warps) * b // 16 for t, b in BYTES.items()}
    for name, kernel, arguments, read, written in cases(*dtypes):
        found = report(compiled(kernel, arguments, block, warps, arch))
        assert found["spills"] == found["stack"] == 0, (name, found)
        assert found["loads128"] == sum(per_thread[t] for t, _ in read), (name, found)
        assert found["stores128"] == sum(per_thread[t] for t, _ in written), (name, found)
        # At least 800 threads an SM, each with all its loads in flight.
        assert found["registers"] <= 80, (name, found)


def test_arithmetic_is_ieee_without_contraction():
    """What the bits of the noise, of the mean and of a replay rest on."""
    for name, kernel, arguments, *_ in cases("fp32", "bf16"):
        ptx = compiled(kernel, arguments, *step.tile(IMAGE), 90).asm["ptx"]
        arithmetic = set(
            re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|ex2|lg2)\S*f\d\d\b", ptx)
        )
        assert arithmetic >= {"mul.rn.f32", "add.rn.f32"}, name
        assert all(re.fullmatch(r"(mul|add|sub|div|sqrt)\.rn\.f\d\d", a) for a in arithmetic), name
        assert ("sqrt.rn.f32" in arithmetic) == (name == "draw, noise in kernel")


def test_one_atomic_per_program_and_none_without_log_prob():
    for name, kernel, arguments, *_ in cases("fp32", "bf16"):
        ptx = compiled(kernel, arguments, *step.tile(IMAGE), 90).asm["ptx"]
        scores = name.startswith("draw") or name == "replay"
        expected = ["atom.global.gpu.acq_rel.add.u32"] * scores
        assert re.findall(r"\b(?:atom|red)\.\S+", ptx) == expected, name


def test_a_sample_of_one_element():
    """A launch makes constants of sizes and strides that are 1."""

    def ones(value):
        if isinstance(value, tuple):
            return tuple(map(ones, value))
        return 1 if value == "i32:16" else value

    for name, kernel, arguments, *_ in cases("fp32", "bf16"):
        arguments = {n: ones(value) for n, value in arguments.items()}
        assert arguments["size"] == 1 and arguments["x_t"] == ("*fp32", 1), name
        assert compiled(kernel, arguments, *step.tile(1), 90).asm["cubin"]


def table():
    cells = "{:24}{:14}{:>6}{:>7}{:>7}" + "{:>11}" * len(FIGURES)
    yield cells.format("kernel", "x_t, velocity", "block", "warps", "arch", *FIGURES)
    for size, dtypes in itertools.product((IMAGE, VIDEO), DTYPES):
        for name, kernel, arguments, *_ in cases(*dtypes):
            for arch in ARCHS:
                found = report(compiled(kernel, arguments, *step.tile(size), arch))
                place = (name, ", ".join(dtypes), *step.tile(size), f"sm_{arch}")
                yield cells.format(*place, *found.values())


if __name__ == "__main__":
    print(f"triton {triton.__version__}; 128-bit accesses per thread")
    for line in table():
        print(line, flush=True)
