"""The round trip to a server of rewards on this machine, beside a bare one of the same bytes.

    python benchmarks/remote_reward.py [--images 16] [--size 512] [--repeats 15]

The reward is a mean, the server `flowkern serve-reward` in a process of its own; the bare server
(starlette, uvicorn) reads the body and answers a line. One after another in each repeat, so that
what else the machine does meets both. Milliseconds: by the clock, and of the processor, here and at
the servers, which what else it does moves less.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from flowkern.rewards.http import Http
from flowkern.rewards.pixels import as_bytes
from flowkern.rewards.remote.body import encode
from flowkern.rewards.remote.client import RemoteReward
from flowkern.rewards.remote.protocol import Fields

HERE = Path(__file__).resolve()
BARE = """
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
import socket
async def score(request):
    return JSONResponse({"bytes": len(await request.body())})
sock = socket.create_server(("127.0.0.1", 0))
print(f"serving at http://127.0.0.1:{sock.getsockname()[1]},", flush=True)
app = Starlette(routes=[Route("/v1/score", score, methods=["POST"])])
uvicorn.Server(uvicorn.Config(app, http="h11", log_level="critical")).run(sockets=[sock])
"""


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


@contextmanager
def running(*arguments: str):
    """(the address that a server says, its process)."""
    server = subprocess.Popen(
        [sys.executable, *arguments], cwd=HERE.parent, stdout=subprocess.PIPE, text=True
    )
    try:
        url = server.stdout.readline().partition(" at ")[2].partition(",")[0]
        yield url, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shape = (options.images, 3, options.size, options.size)
    images = torch.rand(shape).mul(255).round().div(255)
    prompts, metadata = ["a prompt"] * options.images, [{}] * options.images
    pixels = as_bytes(images)
    fields = Fields(protocol=1, rewards=["brightness"], prompts=prompts)
    serve = ("-m", "flowkern", "serve-reward", "remote_reward:brightness", "--port", "0")
    with running(*serve) as (url, there), running("-c", BARE) as (bare_url, bare_there):
        remotes = {f: RemoteReward("brightness", url=url, format=f) for f in ("raw", "webp")}
        kind, body = encode(fields, pixels)
        bare = Http(bare_url)
        calls: dict[str, Callable[[], object]] = {
            "images to bytes": lambda: as_bytes(images),
            "bytes to a body": lambda: encode(fields, pixels),
            "a bare server": lambda: bare.post("/v1/score", content=body),
            "the server": lambda: remotes["raw"].server.post(
                "/v1/score", content=body, headers={"content-type": kind}
            ),
            "the reward, raw": lambda: remotes["raw"](images, prompts, metadata),
            "the reward, webp": lambda: remotes["webp"](images, prompts, metadata),
            "the reward, here": lambda: brightness(images, prompts, metadata),
        }

        def times() -> list[float]:
            """The clock, the processor here, and at the servers."""
            spent = [used for one in (there, bare_there) for used in one.cpu_times()[:2]]
            return [time.perf_counter(), time.process_time(), sum(spent)]

        taken: dict[str, list[list[float]]] = {name: [] for name in calls}
        for _ in range(options.repeats + 1):
            for name, call in calls.items():
                begin = times()
                call()
                taken[name].append([b - a for a, b in zip(begin, times(), strict=True)])
    print(f"{options.images} x {options.size} x {options.size}, {len(body) / 1e6:.1f} MB raw, ms")
    print(f"{'':<18} {'median':>8} {'least':>8} {'CPU here':>9} {'CPU there':>10}")
    for name, rows in taken.items():
        clock, here, elsewhere = (
            [1e3 * x for x in column] for column in zip(*rows[1:], strict=True)
        )
        means = f"{statistics.mean(here):9.1f} {statistics.mean(elsewhere):10.1f}"
        print(f"{name:<18} {statistics.median(clock):8.1f} {min(clock):8.1f} {means}")


if __name__ == "__main__":
    main()
