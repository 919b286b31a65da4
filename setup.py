"""Builds the native kernels.

FLOWKERN_BUILD = auto (build what the machine can; the default) | cpu | cuda | none.
No torch is needed to build: the kernels take raw pointers, so one build serves every torch.
"""

import os
import platform
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

COMMON = [
    "-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra",
    # Rounding is part of the contract: no contraction, no fast-math. The rest lets loops vectorize.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-semantic-interposition",
]  # fmt: skip
X86_INSTANCES = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
KERNELS = ["csrc/sde_step/sde_step_cpu.cpp"]


def wanted() -> str:
    choice = os.environ.get("FLOWKERN_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FLOWKERN_BUILD: expected auto, cpu, cuda or none, got {choice!r}")
    if choice == "cuda":
        sys.exit(
            "FLOWKERN_BUILD=cuda: this version has no native CUDA kernels; "
            "on CUDA devices the Triton ones serve. Use auto."
        )
    return choice


class BuildKernels(build_ext):
    """Compiles every kernel source once per instruction set and links all into one module."""

    def build_extension(self, ext: Extension) -> None:
        try:
            instances = (
                X86_INSTANCES if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
            )
            ext.extra_compile_args = [
                *COMMON,
                *(["-DFK_X86_INSTANCES"] if len(instances) > 1 else []),
            ]
            for isa, flags in instances.items():
                ext.extra_objects += self.compiler.compile(
                    KERNELS,
                    output_dir=os.path.join(self.build_temp, isa),
                    macros=[("FK_ISA", isa)],
                    extra_postargs=[*COMMON, *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except Exception as error:
            if wanted() != "auto":
                raise
            print(
                f"flowkern: the native CPU kernels were not built ({error}).\n"
                "flowkern: the package works without them, on the reference and Triton backends; "
                "with a C++ compiler, install again to build them "
                "(FLOWKERN_BUILD=cpu shows the full error).",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    if wanted() == "none":
        return []
    try:
        import pybind11
    except ImportError:
        if wanted() == "cpu":
            sys.exit("FLOWKERN_BUILD=cpu: needs pybind11; pip install pybind11")
        print(
            "flowkern: pybind11 is missing; the native CPU kernels are not built", file=sys.stderr
        )
        return []
    headers = [
        os.path.join(root, f)
        for root, _, files in os.walk("csrc")
        for f in files
        if f.endswith(".h")
    ]
    return [
        Extension(
            "flowkern._cpu",
            ["csrc/cpu_module.cpp"],
            include_dirs=[pybind11.get_include()],
            depends=[*headers, *KERNELS],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=wanted() == "auto",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
