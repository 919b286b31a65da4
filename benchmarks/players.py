"""The processes of train_step.py: a contender each, and beside it what compiles ahead for it."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from contenders import WAYS, Contender, Way, ahead, compiled_for
from settings import Setting


def way_of(name: str) -> Way:
    """Of a contender's name: a letter, or LETTER:ALGORITHM."""
    return WAYS[name[0]]


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
            for more in ahead(way_of(name), setting)
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
    way = way_of(name)
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
        compiled_for(way_of(name), setting, **more)
    except BaseException:  # the contender will say it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
