"""What precision and adapters cost a network call: python scripts/gpu/network.py [--device cuda]

Milliseconds of 16 rows forward, and of 8 rows forward and backward, of the architecture of Stable
Diffusion 3.5 medium with random weights (benchmarks/large_model.py): bare, under autocast, with
LoRA in float32 (as one trains) or bfloat16. Goes to network.json in the folder that
FLOWKERN_RESULTS names, after each. GPU_REHEARSE=1: all of them, at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from large_model import MEDIUM, TINY, build  # noqa: E402

from flowkern.models import Conditioning  # noqa: E402
from flowkern.train.config import LoraConfig  # noqa: E402
from flowkern.train.lora import add_lora  # noqa: E402

IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
ROWS, LEARNING = (2, 1) if IS_REHEARSAL else (16, 8)
CALLS = 1 if IS_REHEARSAL else 4
# Name: the LoRA weights' dtype (None: no LoRA), and whether autocast is on. In this order, as an
# adapter stays once it is there.
VARIANTS = {
    "no LoRA, no autocast": (None, False),
    "no LoRA, autocast": (None, True),
    "LoRA fp32, autocast (as the trainer)": (torch.float32, True),
    "LoRA bf16, autocast": (torch.bfloat16, True),
    "LoRA bf16, no autocast": (torch.bfloat16, False),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    results = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu")
    results.mkdir(parents=True, exist_ok=True)
    architecture = TINY if IS_REHEARSAL else MEDIUM
    model = build(architecture, device, torch.bfloat16)
    shape = model.latent_shape
    tokens = sum(architecture.tokens), architecture.text_width
    pooled = architecture.transformer["pooled_projection_dim"]

    def velocity(rows: int):
        like = {"device": device, "dtype": torch.bfloat16}
        parts = {"tokens": (rows, *tokens), "pooled": (rows, pooled)}
        condition = Conditioning({k: torch.randn(size, **like) for k, size in parts.items()})
        x_t, sigma = torch.randn(rows, *shape, device=device), torch.rand(rows, device=device)
        return model.velocity(x_t, sigma, condition)

    found, has_lora = {}, False
    for name, (dtype, has_autocast) in VARIANTS.items():
        if dtype is not None and not has_lora:
            add_lora(model, LoraConfig(rank=32, alpha=64))
            has_lora = True
        for parameter in model.network.parameters() if has_lora else ():
            if parameter.requires_grad:
                parameter.grad, parameter.data = None, parameter.data.to(dtype)
        amp = torch.autocast(device.type, torch.bfloat16) if has_autocast else nullcontext()
        with torch.no_grad(), amp:
            found[name] = {f"forward_{ROWS}_ms": _timed(lambda: velocity(ROWS), device)}
        if has_lora:

            def learn(amp=amp):
                with amp:
                    out = velocity(LEARNING)
                out.float().square().mean().backward()

            found[name][f"both_{LEARNING}_ms"] = _timed(learn, device)
        (results / "network.json").write_text(json.dumps(found, indent=1) + "\n")
        print(name, found[name], flush=True)
    return 0


def _timed(call: Callable, device: torch.device) -> float:
    """Milliseconds of a call, the first one left out."""
    begin = 0.0
    for index in range(CALLS + 1):
        if index == 1:
            _wait(device)
            begin = time.perf_counter()
        call()
    _wait(device)
    return (time.perf_counter() - begin) * 1e3 / CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
