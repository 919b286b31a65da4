"""Whole iterations of training on a model of real size, by several ways on the same images.

    python benchmarks/train_step.py --model sd35m|tiny --algorithm NAME [--contenders a,c,d,e,b]
        [--images 8] [--rollouts 2] [--limit SECONDS] [--device cuda] [--json PATH]

Stable Diffusion 3.5 medium by its published configuration with random weights (large_model.py), 512
pixels, LoRA of rank 32, bfloat16. Contenders: (a) the plain path as the released script writes it,
(b) the same with the network's blocks compiled by torch.compile, (c) flowkern, (d) flowkern with
model.compile, (e) with model.quantization=float8 beside (not on a CPU). Each is a process of its
own and takes turns, in the order in which they are named: a warm-up, then the timed iterations.
They begin when all have compiled, which they do by networks of a few blocks, or when half of
--limit is gone; what still compiles then is stopped while another is timed, so that nothing else
computes. With --limit: ends then, and fills what is left with more turns. The file is written after
each turn. Out of memory: the batch is halved.

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
import traceback  # noqa: E402
from contextlib import contextmanager, suppress  # noqa: E402
from multiprocessing.connection import wait  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from contenders import MODELS, WAYS, Contender, Setting, ahead, compiled_for, operations  # noqa: E402
from harness import can_fork, describe_machine, results_folder  # noqa: E402
from plain_loops import LOOPS  # noqa: E402

PEAKS = {"H100": 989.0, "H200": 989.0}
"""TFLOP/s of dense bfloat16 products (SXM), by data sheets."""


class Player:
    """A contender's process, from here."""

    def __init__(self, name: str, setting: Setting, folder: Path, context):
        self.name, self.turns, self.is_ready, self.error = name, 0, False, None
        self.line, theirs = context.Pipe()
        arguments = name, setting, folder, theirs
        self.process = context.Process(target=play, args=arguments)
        self.process.start()
        theirs.close()  # before others inherit it, so that its end is heard
        self.beside = [
            context.Process(target=prepare, args=(name, setting, more))
            for more in ahead(WAYS[name], setting)
        ]
        for process in self.beside:
            process.start()

    def hear(self, patience: float) -> dict[str, Any] | None:
        """What it says next, within so many seconds; None: nothing."""
        try:
            if not self.line.poll(min(max(0.0, patience), 1e6)):
                return None
            said = self.line.recv()
        except (EOFError, OSError):
            said = {"error": f"ended with exit status {self.process.exitcode}"}
        self.error = said.get("error")
        return said

    def ask(self, is_first: bool) -> None:
        with suppress(OSError):  # it is gone, which is heard next
            self.line.send(is_first)

    def signal(self, number: int) -> None:
        for process in (self.process, *self.beside):
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):  # it has no session yet, or is over
                if number == signal.SIGKILL:
                    process.kill()


def play(name: str, setting: Setting, folder: Path, line) -> None:
    """In the process: ready, then a turn whenever it is asked."""
    os.setsid()
    way = WAYS[name]
    try:
        begin = time.monotonic()
        kept = []
        if way.is_compiled and setting.has_few:
            kept.append(compiled_for(way, setting))
        line.send({"ready": time.monotonic() - begin})
        made = None
        while True:
            is_first = line.recv()
            made = made or Contender(way, setting)
            row = made.rollout(is_first)
            kept.clear()
            if is_first:
                made.keep(folder / f"{name}.pt")
            if setting.device != "cpu":
                torch.cuda.empty_cache()
            line.send(row)
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        line.send({"error": f"{type(error).__name__}: {error}"[:600]})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of what a compiler keeps open may hold it


def prepare(name: str, setting: Setting, more: dict[str, Any]) -> None:
    """In a process beside a contender's: compile, for the cache."""
    os.setsid()
    os.nice(5)
    try:
        compiled_for(WAYS[name], setting, **more)
    except BaseException:  # the contender will say it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
            "contenders": {name: WAYS[name].says for name in options.contenders},
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
        options = self.options
        way, batch = WAYS[name], options.max_batch
        if way.is_compiled and not way.is_plain:  # no row is there to fill a batch up
            batch = options.compiled_batch or options.images
        return Setting(options.model, options.algorithm, options.images, batch, options.device)

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
            f"{row['images_per_s']:.2f} images/s, {row['rows']}, {row['tflops']:.1f} TFLOP/s, "
            f"peak {row['peak_memory_gb']} GB",
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
        of_a_row, rows = self.result["tflop_of_a_row"], row["rows"]
        with_gradient = rows.get("learning", 0)
        tflop = with_gradient * of_a_row["both"]
        tflop += (sum(rows.values()) - with_gradient) * of_a_row["forward"]
        name = self.result["machine"].get("gpu", "")
        peak = next((peak for card, peak in PEAKS.items() if card in name), None)
        rate = tflop / row["seconds"]
        return {
            "model_tflop": tflop, "tflops": rate, "utilization": rate / peak if peak else None
        }  # fmt: skip

    def compare(self) -> None:
        """The images and first gradients with flowkern's, by its norm."""
        kept = {n: self.folder / f"{n}.pt" for n in self.options.contenders}
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

    def ratios(self) -> dict[str, float]:
        """How many times as fast as another, by the medians of timed turns."""
        seconds = {}
        for name in self.options.contenders:
            took = sorted(
                r["seconds"]
                for r in self.result["rollouts"]
                if r["way"] == name and not r["is_warm_up"]
            )
            if took:
                seconds[name] = took[len(took) // 2]
        return _of_pairs(seconds)

    def counted(self) -> dict[str, float]:
        """What these would be if a TFLOP took all the same time."""
        return _of_pairs({row["way"]: row["model_tflop"] for row in self.result["rollouts"]})

    def close(self) -> None:
        for player in self.players:
            player.signal(signal.SIGKILL)
            for process in (player.process, *player.beside):
                process.join()
        self.about.kill()
        self.about.join()


def _of_pairs(cost: dict[str, float]) -> dict[str, float]:
    pairs = ("c", "a"), ("d", "c"), ("e", "c"), ("e", "a"), ("d", "b"), ("b", "a")
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
    print(json.dumps({"ratios": match.ratios(), "counted": match.counted()}))
    return 1 if match.result["errors"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--algorithm", choices=LOOPS, required=True)
    parser.add_argument("--contenders", default=None, help="letters, in the order of their turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=8, help="of the one prompt of an iteration")
    parser.add_argument("--rollouts", type=int, default=2, help="timed ones, after a warm-up")
    parser.add_argument("--max-batch", type=int, default=16, help="rows of a network call")
    parser.add_argument("--compiled-batch", type=int, help="of (d) and (e); as many as images")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    named = options.contenders or ("a,c,d,b" if options.device == "cpu" else "a,c,d,e,b")
    options.contenders = named.split(",")
    if unknown := [name for name in options.contenders if name not in WAYS]:
        parser.error(f"--contenders: got {unknown[0]!r}, expected letters of {', '.join(WAYS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
