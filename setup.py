"""Builds the native kernels.

FLOWKERN_BUILD = auto (build what the machine can; the default) | cpu | cuda | none.
auto builds CUDA kernels where there is nvcc: of a source distribution always, of a checkout with a
device beside it; cuda builds them, and the CPU's, in any case.
FLOWKERN_CUDA_ARCHS = "90" or "80,90": compute capabilities, instead of all supported.
No torch is needed to build: tensors are read through DLPack, so one build serves every torch.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.extension import Extension

# make sanitize: what leaves an array, or is undefined, ends the process. One instruction set, which
# is this processor's: its code has every access to memory that a narrower one's has.
SANITIZE = (
    ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1", "-w"]
    if os.environ.get("FLOWKERN_SANITIZE") == "1"
    else []
)
COMMON = [
    "-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-maybe-uninitialized",  # as GCC 12 says of its own header of AVX-512
    # Rounding is part of the contract: no contraction, no fast-math. The rest lets loops vectorize.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-semantic-interposition",
    *SANITIZE,
]  # fmt: skip
X86_INSTANCES = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def found(pattern: str) -> list[str]:
    """Sources as they are compiled: by paths from here."""
    here = Path(__file__).resolve().parent
    return sorted(str(path.relative_to(here)) for path in here.glob(pattern) if path.is_file())


SOURCES = runpy.run_path(str(Path(__file__).with_name("flowkern") / "ops/_common/sources.py"))


def depends(module: str) -> list[str]:
    here = Path(__file__).resolve().parent
    return [str(path.relative_to(here)) for path in SOURCES["of_module"](module, here / "csrc")]


def built_from(module: str) -> str:
    """What the module says it is of; a checkout that is newer than its build finds out."""
    csrc = Path(__file__).resolve().parent / "csrc"
    return f'-DFK_SOURCES="{SOURCES["digest"](module, csrc)}"'


KERNELS = found("csrc/*/*_cpu.cpp")
CUDA_KERNELS = found("csrc/*/*_cuda.cu")
# No contraction here either; division and square root are IEEE by default.
CUDA_COMMON = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = ("80", "90", "100", "120")  # and PTX of the last, for what comes after


def wanted() -> str:
    choice = os.environ.get("FLOWKERN_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FLOWKERN_BUILD: expected auto, cpu, cuda or none, got {choice!r}")
    return choice


def nvcc() -> str | None:
    """The compiler, on the PATH or where toolkits are installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def cuda_runtime(compiler: str) -> str:
    """The static runtime of nvcc's toolkit: the module then imports without a driver."""
    report = subprocess.run(
        [compiler, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = next((line[7:].strip() for line in report.splitlines() if line[:7] == "#$ TOP="), "")
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = Path(top or Path(compiler).resolve().parents[1], folder, "libcudart_static.a")
        if library.exists():
            return str(library)
    raise RuntimeError(f"{compiler}: no libcudart_static.a in its toolkit ({top or 'unknown'})")


def cuda_archs() -> list[str]:
    """nvcc's flags for the architectures wanted: machine code for each, PTX of the last."""
    archs = os.environ.get("FLOWKERN_CUDA_ARCHS", ",".join(CUDA_ARCHS))
    names = archs.replace(";", ",").replace(" ", ",").replace(".", "").split(",")
    names = [name for name in names if name]
    if not names or not all(name.rstrip("abcdef").isdigit() for name in names):
        sys.exit(f'FLOWKERN_CUDA_ARCHS: expected compute capabilities like "80,90", got {archs!r}')
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*code, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class BuildKernels(build_ext):
    """Compiles the kernels, for the CPU once per instruction set, and links each into a module."""

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name == "flowkern._cuda"
        try:
            (self._compile_cuda if is_cuda else self._compile_cpu)(ext)
            super().build_extension(ext)
        except Exception as error:
            if wanted() != "auto":
                raise
            kind, others = ("CUDA", "CPU, Triton") if is_cuda else ("CPU", "Triton")
            compiler, name = ("nvcc", "cuda") if is_cuda else ("a C++ compiler", "cpu")
            print(
                f"flowkern: the native {kind} kernels were not built ({error}).\n"
                f"flowkern: the package works without them, on its {others} and reference "
                f"backends; with {compiler}, install again to build them "
                f"(FLOWKERN_BUILD={name} shows the full error).",
                file=sys.stderr,
            )

    def _compile_cpu(self, ext: Extension) -> None:
        instances = X86_INSTANCES if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        if SANITIZE:
            instances = {"baseline": ["-march=native"]}
        ext.extra_compile_args = [
            *COMMON,
            *(["-DFK_X86_INSTANCES"] if len(instances) > 1 else []),
            built_from("_cpu"),
        ]

        def compile(isa: str) -> list[str]:
            return self.compiler.compile(
                KERNELS,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FK_ISA", isa)],
                extra_postargs=[*COMMON, *instances[isa]],
                depends=ext.depends,
            )

        with ThreadPoolExecutor() as pool:
            for objects in pool.map(compile, instances):
                ext.extra_objects += objects

    def _compile_cuda(self, ext: Extension) -> None:
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("nvcc was not found on the PATH or in CUDA_HOME")
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)

        def compile(source: str) -> str:
            target = str(folder / Path(source).with_suffix(".o").name)
            flags = [*CUDA_COMMON, *cuda_archs(), "--threads", "2"]
            done = subprocess.run(
                [compiler, *flags, "-c", source, "-o", target], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
            return target

        with ThreadPoolExecutor(len(CUDA_KERNELS)) as pool:
            ext.extra_objects += pool.map(compile, CUDA_KERNELS)
        ext.extra_objects.append(cuda_runtime(compiler))


class BuildPackage(build_py):
    """Adds what `flowkern demo` trains on; a checkout installed as editable has it at its root."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "flowkern", "demo_data")
            shutil.rmtree(target, ignore_errors=True)
            for folder in ("assets", "configs"):
                shutil.copytree(folder, target / folder)


def wants_cuda() -> bool:
    if wanted() == "auto":
        # A source distribution is installed where it will run, or into an image for such a place;
        # a checkout is built again and again, and on machines that only look at the code.
        is_handed_on = Path(__file__).with_name("PKG-INFO").is_file()
        device = os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")
        return bool(nvcc() and (is_handed_on or device))
    return wanted() == "cuda"


def extensions() -> list[Extension]:
    if wanted() == "none":
        return []
    try:
        import pybind11
    except ImportError:
        if wanted() != "auto":
            sys.exit(f"FLOWKERN_BUILD={wanted()}: needs pybind11; pip install pybind11")
        print("flowkern: pybind11 is missing; the native kernels are not built", file=sys.stderr)
        return []
    shared = {
        "include_dirs": [pybind11.get_include()],
        "language": "c++",
        "optional": wanted() == "auto",
    }
    cpu = Extension(
        "flowkern._cpu",
        ["csrc/cpu_module.cpp"],
        depends=depends("_cpu"),
        extra_link_args=["-fopenmp", *SANITIZE],
        **shared,
    )
    cuda = Extension(
        "flowkern._cuda",
        ["csrc/cuda_module.cpp"],
        depends=depends("_cuda"),
        extra_compile_args=[
            *["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            built_from("_cuda"),
        ],
        extra_link_args=["-ldl", "-lrt", "-lpthread"],
        **shared,
    )
    return [cpu, cuda] if wants_cuda() else [cpu]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage})
