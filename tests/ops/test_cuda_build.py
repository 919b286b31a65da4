"""The native CUDA kernels as nvcc builds them, which needs no GPU: registers, spills, the width of
accesses, the rounding, and a module that imports without a driver.

`python tests/ops/test_cuda_build.py` prints the table for every architecture.
"""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("pybind11")
import builds

ROOT = Path(__file__).parents[2]
with mock.patch("setuptools.setup"):  # for its flags: what is looked at is what is installed
    BUILD = runpy.run_path(str(ROOT / "setup.py"))
NVCC = BUILD["nvcc"]()
FIGURES = ("registers", "stack", "spills", "shared", "loads128", "stores128")

# Latents that a thread reads and writes in 128-bit accesses: in kernels for any calls, in those for
# plain ones, and written. An access takes a bfloat16 group, two a float32 one; so two where the
# dtype is known only at run time. Of kernels with a residual, which is float32, there are two.
#   the step: x_t, velocity, velocity_uncond, then noise (and history) | x_next | x_next
#   the losses load a given sample in two places, to be ahead of its sums; plain ones no uncond
LATENTS = {
    "sde_draw_kernel<0>": (4, 4, 2),  # x_next and x0 are stored
    "sde_draw_kernel<3>": (7, 7, 2),
    "sde_draw_mean_kernel<0>": (4, 4, 2),  # beside the mean, which is float32
    "sde_draw_mean_kernel<3>": (7, 7, 2),
    "sde_replay_mean_kernel": (4, 4, 0),
    "sde_mean_backward_kernel": (1, 1, 1),
    "sde_replay_kernel<0>": (4, 4, 0),
    "sde_replay_kernel<1>": (4, 4, 1),
    "sde_replay_backward_kernel": (4, 4, 1),
    "policy_forward_kernel<0,0>": (7, 5, 0),
    "policy_forward_kernel<1,0>": (6, 5, 0),
    "policy_forward_kernel<0,1>": (6, 5, 1),
    "policy_forward_kernel<1,1>": (6, 5, 1),
    "policy_backward_kernel<0>": (6, 5, 1),
    "policy_backward_kernel<1>": (6, 5, 1),
    "policy_backward_kept_kernel": (4, 3, 1),
    "matching_forward_kernel<0,0>": (8, 6, 0),
    "matching_forward_kernel<1,0>": (6, 5, 0),
    "matching_forward_kernel<0,1>": (6, 6, 1),
    "matching_forward_kernel<1,1>": (5, 5, 1),
    "matching_backward_kernel<0>": (6, 6, 1),
    "matching_backward_kernel<1>": (5, 5, 1),
    "matching_backward_kept_kernel": (4, 4, 1),
    "add_noise_kernel<0>": (2, 2, 1),
    "add_noise_kernel<1>": (1, 1, 1),
}
LIGHT = {"fill_philox_kernel", "sde_draw_kernel<0>", "sde_replay_kernel<0>"}
LIGHT |= {"sde_replay_backward_kernel", "policy_forward_kernel<0,0>"}
LIGHT |= {"policy_forward_kernel<0,1>", "policy_backward_kept_kernel"}
LIGHT |= {"matching_backward_kept_kernel", "sde_replay_kernel<1>"}
LIGHT |= {"sde_replay_backward_kept_kernel"}
# Latents of float32 whatever the call: read and written beside those above.
MEANS = {
    "sde_draw_mean_kernel<0>": (0, 1),
    "sde_draw_mean_kernel<3>": (0, 1),
    "sde_replay_mean_kernel": (0, 1),
    "sde_mean_backward_kernel": (2, 0),  # and its gradient
}
OF_RESIDUALS = {k for k in LATENTS if "kept" in k or k.endswith(",1>")} | {"sde_replay_kernel<1>"}
CALLS = {"any": 2, "float32": 2, "bfloat16": 1}  # the order of Calls; accesses of a latent


def accesses():
    """{kernel: (128-bit loads, stores)}."""
    table = {"fill_philox_kernel": (0, 2), "sde_replay_backward_kept_kernel": (2, 2)}
    for kernel, (reads, plain_reads, writes) in LATENTS.items():
        for calls, each in CALLS.items():
            if calls == "bfloat16" and kernel in OF_RESIDUALS:
                continue
            read = each * (reads if calls == "any" else plain_reads)
            means, written = MEANS.get(kernel, (0, 0))
            table[f"{kernel} {calls}"] = (read + 2 * means, each * writes + 2 * written)
    return table


ACCESSES = accesses()


def cuobjdump():
    """The toolkit's, or the one that Triton bundles."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ROOT
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


pytestmark = pytest.mark.skipif(
    not (NVCC and cuobjdump()), reason="needs nvcc, and cuobjdump of its toolkit or of Triton"
)


def compiled(arch):
    """Object files of all kernels, with PTX, and of the module. What launches them is g++'s, and
    not looked at: unoptimized, a source takes 16 s of a processor instead of 20.
    """
    code = f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
    flags = (*BUILD["CUDA_COMMON"], "-Xcompiler", "-O0", code)
    return builds.compiled(BUILD["CUDA_KERNELS"], NVCC, *flags)


def dump(path, flag):
    command = [cuobjdump(), flag, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_of(mangled):
    """name, or name<its other template arguments>; and the calls it is compiled for."""
    names = "|".join({re.split("[< ]", kernel)[0] for kernel in ACCESSES})
    pattern = rf"({names})(?:IL\w*?5CallsE?(\d)E((?:L[a-z]\d+E)*))?"
    name, calls, others = re.search(pattern, mangled).groups()
    name += f"<{','.join(re.findall('[0-9]+', others))}>" if others else ""
    return name if calls is None else f"{name} {list(CALLS)[int(calls)]}"


def by_kernel(text, marker):
    """{kernel: what follows its marker}."""
    parts = re.split(marker, text)[1:]
    return {kernel_of(name): body for name, body in zip(parts[::2], parts[1::2], strict=True)}


def report(objects):
    """{kernel: FIGURES}: bytes of stack and shared memory, instructions that spill."""
    table = {}
    for path in objects:
        usage = by_kernel(dump(path, "-res-usage"), r"Function (\S+):")
        sass = by_kernel(dump(path, "-sass"), r"Function : (\S+)")
        for kernel, code in sass.items():
            figures = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage[kernel]))
            loads, stores = (
                len(re.findall(rf"\b{op}\.E\S*\.128\b", code)) for op in ("LDG", "STG")
            )
            spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
            stack = int(figures["STACK"]) + int(figures["LOCAL"])
            shared = int(figures["SHARED"])
            values = (int(figures["REG"]), stack, spills, shared, loads, stores)
            table[kernel] = dict(zip(FIGURES, values, strict=True))
    return table


@pytest.fixture(scope="module")
def built():
    return compiled("90")


@pytest.fixture
def objects(built):
    return built[:-1]


def test_no_spills_and_latents_in_128_bit_accesses(objects):
    table = report(objects)
    assert table.keys() == ACCESSES.keys()
    for kernel, found in table.items():
        assert found["spills"] == found["stack"] == 0, (kernel, found)
        # At image size, 8 x 65,536, all 512 blocks of 128 threads run at once on 132 processors; of
        # the 256 threads of larger samples an SM holds two blocks at least, four of the lightest.
        name, _, calls = kernel.partition(" ")
        at_most = 128 if calls == "any" else 64 if name in LIGHT else 96
        assert found["registers"] <= at_most, (kernel, found)
        loads, stores = ACCESSES[kernel]
        assert found["loads128"] >= loads and found["stores128"] == stores, (kernel, found)


def test_arithmetic_is_ieee_without_contraction(objects):
    """Where no noise is made no multiply-add may be fused: in noise the source asks for each."""
    kernels = {}
    for path in objects:
        kernels |= by_kernel(dump(path, "-ptx"), r"\.entry (\S+)\(")
    assert kernels.keys() == ACCESSES.keys()
    makes_noise = {k for k in kernels if "<1" in k and "sde" not in k}
    makes_noise |= {k for k in kernels if k.startswith(("fill_philox", "sde_draw"))}
    for kernel, ptx in kernels.items():
        arithmetic = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|ex2|lg2)\S*f32\b", ptx))
        allowed = r"(mul|add|sub|div)\.rn\.f32" + (r"|fma\.rn\.f32" * (kernel in makes_noise))
        assert all(re.fullmatch(allowed, a) for a in arithmetic), (kernel, arithmetic)
        # A square root is what nvcc makes of sqrt.rn: an approximate inverse, then two corrections.
        roots = set(re.findall(r"\br?sqrt\.\S*f32\b", ptx))
        assert roots == ({"rsqrt.approx.ftz.f32"} if kernel in makes_noise else set()), kernel


def test_one_atomic_to_arrive_with_and_no_other(objects):
    for path in objects:
        for kernel, ptx in by_kernel(dump(path, "-ptx"), r"\.entry (\S+)\(").items():
            found = set(re.findall(r"\b(?:atom|red)\.\S+", ptx))
            adds_up = "forward" in kernel or kernel.startswith(("sde_draw", "sde_replay"))
            adds_up &= "backward" not in kernel
            assert found == ({"atom.acq_rel.gpu.global.add.s32"} if adds_up else set()), kernel


def test_the_module_imports_without_a_driver_and_a_launch_raises(built, tmp_path):
    library = tmp_path / "_cuda.so"
    command = ["g++", "-shared", *built, BUILD["cuda_runtime"](NVCC)]
    command += ["-ldl", "-lrt", "-lpthread", "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('_cuda', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.tiles_of(65536));"
        "reason = m.why_not(0); print(reason or 'a device');"
        "import torch; from flowkern.ops._common import native;"
        "native.connect(m, native.private.exchange, native._CPU, stream=lambda index: 0);"
        "reason and m.fill_philox(torch.empty(1, 8), 0, torch.zeros(1, dtype=torch.int64), 0, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True)
    assert done.stdout.startswith("64\n"), done.stderr
    if "a device" not in done.stdout:
        assert done.returncode == 1 and "RuntimeError: flowkern: cuCtxGetCurrent: " in done.stderr


def test_architectures_are_checked(monkeypatch):
    monkeypatch.setenv("FLOWKERN_CUDA_ARCHS", "8.0 90a")
    assert BUILD["cuda_archs"]() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("FLOWKERN_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="FLOWKERN_CUDA_ARCHS: expected"):
        BUILD["cuda_archs"]()


def main():
    cells = "{:38}{:>7}" + "{:>11}" * len(FIGURES)
    print(cells.format("kernel", "arch", *FIGURES))
    for arch in BUILD["CUDA_ARCHS"]:
        for kernel, found in report(compiled(arch)[:-1]).items():
            print(cells.format(kernel, f"sm_{arch}", *found.values()), flush=True)


if __name__ == "__main__":
    main()
