"""What flowkern finds here: versions, devices, backends, optional packages. For a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from flowkern import __version__

PACKAGES = {
    "kernels": ("torch", "triton", "numpy"),
    "train": ("accelerate", "diffusers", "matplotlib", "peft", "pillow", "pydantic", "pyyaml",
              "rich", "safetensors", "tqdm", "transformers"),
    "agent": ("bm25s", "httpx2", "jinja2", "openai"),
    "rewards": ("rapidocr", "onnxruntime", "starlette", "uvicorn"),
    "others": ("av", "datasets", "pyarrow", "math-verify", "mcp", "sandlock", "wasmtime",
               "bitsandbytes", "flash-attn", "kernels", "torchao", "tensorboard", "wandb",
               "xformers"),
}  # fmt: skip


def environment() -> dict[str, Any]:
    """In plain values; None stands for a package that is not installed, and for a backend that
    can serve."""
    import torch

    from flowkern.ops._common import native
    from flowkern.ops._common.dispatch import backends

    devices = {"cpu": f"{torch.get_num_threads()} threads, {platform.machine()}"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{about.name}, {about.total_memory / 1e9:.0f} GB, sm_{about.major}{about.minor}"
        )
    return {
        "flowkern": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "instruction_set": native.cpu().isa() if native.cpu() else None,
        "backends": {name.partition(":")[0]: backends(name) for name in devices},
        "hub_cache": _hub_cache(),
        "packages": {extra: {n: _version(n) for n in names} for extra, names in PACKAGES.items()},
    }


def in_lines(found: dict[str, Any]) -> list[str]:
    """In lines, for people."""
    rows = {
        "flowkern": f"{found['flowkern']}, python {found['python']}",
        "system": f"{found['system']}, torch's CUDA: {found['cuda'] or 'none'}",
    }
    rows |= {name: about for name, about in found["devices"].items()}
    for device, reasons in found["backends"].items():
        able = {"native": f"native ({found['instruction_set']})"} if device == "cpu" else {}
        rows[f"{device} backends"] = "; ".join(
            able.get(name, name) if reason is None else f"no {name}: {reason}"
            for name, reason in reasons.items()
        )
    cache = found["hub_cache"]
    rows["hub cache"] = f"{cache['path']}, {cache['models']} models" + (
        ", not asked beyond it (HF_HUB_OFFLINE)" if cache["is_offline"] else ""
    )
    for extra, packages in found["packages"].items():
        there = [f"{name} {version}" for name, version in packages.items() if version]
        lacking = [name for name, version in packages.items() if not version]
        rows[extra] = ", ".join(there) + f"{'; ' * bool(there)}not installed: " * bool(lacking)
        rows[extra] += ", ".join(lacking)
    return [f"{name:<14}{text}" for name, text in rows.items()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub_cache() -> dict[str, Any]:
    """Where huggingface_hub, which need not be installed, keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    path = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    count = len(list(path.glob("models--*")))
    return {"path": str(path), "models": count, "is_offline": is_offline}
