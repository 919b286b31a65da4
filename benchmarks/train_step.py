"""Whole iterations of training on a model of real size, by several ways on the same images.

    python benchmarks/train_step.py --model sd35m|flux1|wan21-1.3b|tiny|tiny-flux1|tiny-wan21
        --algorithm NAME [--contenders a,c,d,e,b] [--images 8] [--iteration 150] [--rollouts 2]
        [--limit SECONDS] [--device cuda] [--json PATH]

Real architectures by their published configurations with random weights (large_model.py,
larger_models.py), LoRA of rank 32, bfloat16; 512 pixels, Wan 33 frames of 480 x 832; one prompt,
and else what the algorithm's paper has (settings.py). Contenders: (a) the plain path as the
algorithm's released script writes it, (b) the same with the network's blocks compiled by
torch.compile, (c) flowkern, (d) flowkern with model.compile, (e) with model.quantization=float8
beside (not on a CPU); a:NAME is (a) of another algorithm, to the same number of images. Each is a
process of its own and takes turns, in the order in which they are named: a warm-up, then the timed
iterations. They begin when all have compiled, which they do by networks of a few blocks, or when
half of --limit is gone; what still compiles then is stopped while another is timed, so that nothing
else computes. With --limit: ends then, and fills what is left with more turns. The file is written
after each turn. Out of memory: the batch is halved. Ways are compared by seconds, on a CPU by those
that the processor worked for them, which what else the machine does hardly changes.

counted: how many times as fast one would be than another if a TFLOP took all the same time.
model_tflop: products and attention of the rows that a way asks, as torch's flop counter counts them
for a row without a gradient (forward) and with one (forward, and backward as LoRA on a frozen base
needs it); neither rows that fill a batch up, nor what is computed again, nor the VAE.
utilization: that by seconds and the device's dense bfloat16 peak by its data sheet, for float8 too.
"""

from __future__ import annotations

import os
import time

BEGIN = time.monotonic()
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each process
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # no context before processes fork
import argparse  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from multiprocessing.connection import wait  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from contenders import WAYS, operations  # noqa: E402
from counting import MIDDLE, tflop  # noqa: E402
from harness import can_fork, describe_machine, results_folder  # noqa: E402
from plain_loops import LOOPS  # noqa: E402
from players import Player, way_of  # noqa: E402
from settings import IMAGES, MODELS, Setting  # noqa: E402

PEAKS = {"H100": 989.0, "H200": 989.0}
"""TFLOP/s of dense bfloat16 products (SXM), by data sheets."""


def describe(setting: Setting, line) -> None:
    """In a process: the machine, a row's operations, the parameters."""
    os.setsid()
    line.send({
        "machine": describe_machine(torch.device(setting.device)),
        "tflop_of_a_row": operations(MODELS[setting.model]),
    })  # fmt: skip
    os._exit(0)


class Match:
    """The players, their turns, and the file."""

    def __init__(self, options: argparse.Namespace, folder: Path, context):
        self.options, self.folder, self.path = options, folder, options.json
        self.result: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "contenders": {name: says(name) for name in options.contenders},
            "definition": " ".join(__doc__.split("model_tflop:")[1].split()),
            "weights": "random", "ready_after_s": {}, "errors": {}, "rollouts": [],
        }  # fmt: skip
        mine, theirs = context.Pipe()
        self.about = context.Process(target=describe, args=(self.setting("a"), theirs))
        self.about.start()
        theirs.close()
        self.players = [Player(n, self.setting(n), folder, context) for n in options.contenders]
        try:
            self.result |= mine.recv()
        except EOFError:
            raise SystemExit("the machine could not be described: see above") from None
        if self.path is None:
            device = torch.device(options.device)
            self.path = results_folder(device, self.result["machine"]) / "train_step.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def setting(self, name: str) -> Setting:
        options, way = self.options, way_of(name)
        algorithm = name[2:] or options.algorithm
        images = options.images or IMAGES.get(algorithm, 8)
        batch = options.max_batch
        if way.is_compiled:  # no row is there to fill a batch up
            batch = options.compiled_batch or images
        asked = options.iteration, options.steps, options.checkpointing, options.precision
        setting = Setting(options.model, algorithm, images, batch, options.device, *asked)
        return setting.released_batch() if way.is_plain else setting

    @property
    def left(self) -> float:
        return self.options.limit - (time.monotonic() - BEGIN)

    def run(self) -> None:
        turns = self.options.rollouts + 1
        while self.left > 0:
            self.listen()
            living = [p for p in self.players if p.error is None]
            wanted = [p for p in living if p.turns < turns]
            ready = [p for p in wanted if p.is_ready]
            if ready and self.may_begin(wanted):
                self.turn(min(ready, key=lambda p: p.turns))  # in their order
            elif wanted:
                wait([p.line for p in wanted], timeout=max(0.0, min(1.0, self.left)))
            elif living and self.options.limit < float("inf"):
                turns += 1
                took = [r["seconds"] for r in self.result["rollouts"]]
                if self.left < 1.2 * sum(took[-len(living) :]):
                    break
            else:
                break
        for player in self.players:
            if player.error is None and player.turns < self.options.rollouts + 1:
                self.result["errors"][player.name] = f"no time left: {player.turns} turns"
        self.write()

    def may_begin(self, wanted: list[Player]) -> bool:
        """When all are ready, or half of the time is gone."""
        return all(p.is_ready for p in wanted) or self.left < self.options.limit / 2

    def listen(self) -> None:
        for player in self.players:
            if not player.is_ready and player.error is None and (said := player.hear(0)):
                self.say(player, said)
                if player.error is None:
                    player.is_ready = True
                    self.result["ready_after_s"][player.name] = round(said["ready"], 1)

    def turn(self, player: Player) -> None:
        """The first is a warm-up, beside which others may compile."""
        is_first = player.turns == 0
        with self.alone(player, not is_first):
            player.ask(is_first)
            said = player.hear(self.left)
        if said is None:
            player.error = "out of time"
            if player.turns > self.options.rollouts:  # more than was asked for
                return
            said = {"error": player.error}
        player.turns += 1
        self.say(player, said)
        if player.error is not None:
            return
        row = {"way": player.name, "rollout": player.turns - 1, "is_warm_up": is_first} | said
        row |= self.rate(row)
        self.result["rollouts"].append(row)
        if is_first:
            self.compare()
        self.write()
        phases = ", ".join(f"{name} {s:.2f}" for name, s in row["phases"].items())
        at = time.monotonic() - BEGIN
        print(
            f"{at:5.1f} s  ({player.name}) {row['seconds']:.2f} s ({phases}), "
            f"{row['images_per_s']:.2f} images/s, {row['rows']}, {row['tflops']:.3g} TFLOP/s"
            + (f", {used:.0%} of the peak" if (used := row["utilization"]) else "")
            + (f", at most {memory:.1f} GB" if (memory := row["peak_memory_gb"]) else ""),
            flush=True,
        )

    @contextmanager
    def alone(self, player: Player, is_timed: bool):
        others = [p for p in self.players if p is not player and not p.is_ready]
        others = [p for p in others if is_timed and p.error is None]
        for other in others:
            other.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                other.signal(signal.SIGCONT)

    def rate(self, row: dict[str, Any]) -> dict[str, Any]:
        cost = tflop(row["rows"], self.result["tflop_of_a_row"])
        name = self.result["machine"].get("gpu", "")
        peak = next((peak for card, peak in PEAKS.items() if card in name), None)
        rate = cost / row["seconds"]
        return {
            "model_tflop": cost, "tflops": rate, "utilization": rate / peak if peak else None
        }  # fmt: skip

    def compare(self) -> None:
        """The images and first gradients with flowkern's, by its norm."""
        own = [name for name in self.options.contenders if len(name) == 1]
        kept = {n: self.folder / f"{n}.pt" for n in own}
        kept = {n: path for n, path in kept.items() if path.exists()}
        if "c" not in kept:
            return
        right = torch.load(kept["c"], weights_only=True)
        for name, path in kept.items():
            if name == "c" or name in self.result.get("relative_difference", {}):
                continue
            found = torch.load(path, weights_only=True)
            off = {k: float((found[k] - v).norm() / v.norm()) for k, v in right.items()}
            self.result.setdefault("relative_difference", {})[name] = off

    def say(self, player: Player, said: dict[str, Any]) -> None:
        if "error" in said:
            self.result["errors"][player.name] = said["error"]
            print(f"({player.name}) {said['error']}", flush=True)
            self.write()
        elif "ready" in said:
            print(f"{time.monotonic() - BEGIN:5.1f} s  ({player.name}) is ready", flush=True)

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        whole = self.result | {"ratios": self.ratios(), "counted": self.counted()}
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        partial.replace(self.path)

    def seconds(self) -> dict[str, list[float]]:
        """Of the timed turns, for an image, ascending."""
        found: dict[str, list[float]] = {}
        clock = "processor_s" if self.options.device == "cpu" else "seconds"
        for row in self.result["rollouts"]:
            if not row["is_warm_up"]:
                found.setdefault(row["way"], []).append(row[clock] / row["images"])
        return {name: sorted(took) for name, took in found.items()}

    def ratios(self) -> dict[str, float]:
        """How many times as fast as another, image by image, by the medians of timed turns."""
        seconds = self.seconds().items()
        return of_pairs({name: took[len(took) // 2] for name, took in seconds})

    def counted(self) -> dict[str, float]:
        """What these would be if a TFLOP took all the same time."""
        rows = self.result["rollouts"]
        return of_pairs({row["way"]: row["model_tflop"] / row["images"] for row in rows})

    def table(self) -> str:
        """The ways, and how many times as fast one is as another: measured, and by counting."""
        lines, ratios, counted = [], self.ratios(), self.counted()
        unit = "images/s" + (" of the processor" if self.options.device == "cpu" else "")
        for name, took in self.seconds().items():
            least, median, most = (took[i] for i in (0, len(took) // 2, -1))
            lines.append(
                f"({name}) {says(name)}: {1 / median:.2f} {unit} ({1 / most:.2f} to "
                f"{1 / least:.2f} in {len(took)} turns)"
            )
        for pair, ratio in ratios.items():
            by = counted[pair]
            lines.append(f"{pair}: {ratio:.2f} times, counted {by:.2f}: {ratio / by:.2f} of it")
        return "\n".join(lines)

    def close(self) -> None:
        for player in self.players:
            player.signal(signal.SIGKILL)
            for process in (player.process, *player.beside):
                process.join()
        self.about.kill()
        self.about.join()


def says(name: str) -> str:
    return way_of(name).says + (f", {name[2:]}" if name[2:] else "")


def of_pairs(cost: dict[str, float]) -> dict[str, float]:
    pairs = [("c", "a"), ("d", "c"), ("e", "c"), ("e", "a"), ("d", "b"), ("b", "a")]
    pairs += [(own, other) for own in "cde" for other in cost if len(other) > 1]
    return {f"{x} to {y}": cost[y] / cost[x] for x, y in pairs if x in cost and y in cost}


def main() -> int:
    options = _arguments()
    context = multiprocessing.get_context("fork" if can_fork(options.device) else "spawn")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        match = Match(options, Path(folder), context)
        try:
            match.run()
        finally:
            match.close()
    print(json.dumps({n: match.result.get(n) for n in ("relative_difference", "errors")}))
    print(match.table())
    return 1 if match.result["errors"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--algorithm", choices=LOOPS, required=True)
    parser.add_argument("--contenders", default=None, help="letters, in the order of their turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--images", type=int, help="of the one prompt; branches of a state, where there are such"
    )
    parser.add_argument("--iteration", type=int, default=MIDDLE, help="of a run: windows move")
    parser.add_argument("--steps", type=int, help="of a rollout, in place of the paper's")
    parser.add_argument("--precision", choices=("bf16", "no"), help="bf16; on a CPU no")
    parser.add_argument("--checkpointing", action="store_true", help="of all contenders")
    parser.add_argument("--rollouts", type=int, default=2, help="timed ones, after a warm-up")
    parser.add_argument("--max-batch", type=int, default=16, help="rows of a call of (c)")
    parser.add_argument("--compiled-batch", type=int, help="of (d) and (e); as many as images")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    named = options.contenders or ("a,c,d,b" if options.device == "cpu" else "a,c,d,e,b")
    options.contenders = named.split(",")
    for name in options.contenders:
        letter, colon, other = name.partition(":")
        if letter not in WAYS or (colon and (letter != "a" or other not in LOOPS)):
            parser.error(
                f"--contenders: got {name!r}, expected letters of {', '.join(WAYS)}, or a:ALGORITHM"
            )
    return options


if __name__ == "__main__":
    sys.exit(main())
