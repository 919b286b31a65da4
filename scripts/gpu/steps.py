"""Steps with limits: each in a process group of its own, its output in a log of the results folder.

What is cut off leaves what it had: logs are written as the step speaks, summary.json after each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
PYTHON = sys.executable
PATIENCE = 5 if IS_REHEARSAL else 1  # the limits are those of a machine with 16 cores
TAIL = 15  # lines of a failed step's log that are shown


@dataclass
class Running:
    name: str
    limit: float
    begin: float
    process: subprocess.Popen
    log: Path


class Steps:
    """The steps of one part: none runs past its own limit, nor past the part's."""

    def __init__(self, part: str, seconds: float, results: Path):
        self.part, self.results = part, results
        seconds *= PATIENCE
        self.deadline = time.monotonic() + seconds
        self.summary: list[dict] = []
        self.processes: list[subprocess.Popen] = []
        results.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(
        self, name: str, limit: float, command: Sequence[str | Path], env: Mapping[str, str] = {}
    ) -> Running | None:
        """Begin a step; None where no time is left."""
        if self.left < 2:
            self._note(name, "no time left", 0.0)
            return None
        log = self.results / f"{name}.log"
        print(f"[{self.part}] {name}: {' '.join(map(str, command))}", flush=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | env, stdout=file,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return Running(name, PATIENCE * limit, time.monotonic(), process, log)

    def finish(self, step: Running | None, good: Sequence[int] = (0,)) -> bool:
        """Wait for a step, at most until its limit."""
        if step is None:
            return False
        left = min(step.begin + step.limit, self.deadline) - time.monotonic()
        try:
            status = step.process.wait(max(0.1, left))
            result = "passed" if status in good else f"failed ({status})"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            end(step.process)
        self._note(step.name, result, time.monotonic() - step.begin)
        if result != "passed":
            for line in step.log.read_text(errors="replace").splitlines()[-TAIL:]:
                print(f"    {line}", flush=True)
        return result == "passed"

    def run(self, name: str, limit: float, command, env: Mapping[str, str] = {}, good=(0,)) -> bool:
        return self.finish(self.start(name, limit, command, env), good)

    def close(self) -> None:
        """No step outlives its part."""
        for process in self.processes:
            if process.poll() is None:
                end(process)

    def skip(self, name: str, reason: str) -> None:
        self._note(name, f"skipped: {reason}", 0.0)

    @property
    def is_good(self) -> bool:
        return all(step["result"].startswith(("passed", "skipped")) for step in self.summary)

    def _note(self, name: str, result: str, seconds: float) -> None:
        step = {"part": self.part, "step": name, "result": result, "seconds": round(seconds, 1)}
        print(f"[{self.part}] {name}: {result}, {seconds:.0f} s", flush=True)
        self.summary.append(step)
        path = self.results / "summary.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        earlier = [s for s in earlier if s["part"] != self.part]
        path.write_text(json.dumps(earlier + self.summary, indent=1) + "\n")
        self._pack()

    def _pack(self) -> None:
        """All of it in one file, which is easier to carry home than many."""
        whole = self.results / "results.tar.gz"
        partial = whole.with_suffix(".partial")
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(self.results.iterdir()):
                if path.is_file() and path not in (whole, partial):
                    archive.add(path, path.name)
        partial.replace(whole)


def end(process: subprocess.Popen) -> None:
    """A step and what it started, gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
