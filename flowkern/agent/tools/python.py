"""Generated Python programs, in a sandbox."""

from __future__ import annotations

import os
import re
from typing import Annotated

from flowkern.agent.tools.output import Output, ToolFailure
from flowkern.agent.tools.sandboxes import GRACE, find_sandbox, warden
from flowkern.agent.tools.sandboxes.process import Outcome
from flowkern.agent.tools.tool import Limits
from flowkern.checks import ABOVE_0, Range, is_integer, shown

__all__ = ["Python"]

PROGRAM = 100_000
RAISED = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$")


class Python:
    """Runs programs in a sandbox that has been tried: sandbox "sandlock", "wasm" or "auto".

    seconds: of a program, by the clock; characters: of its output; memory: in MiB; packages: it
    may import what is installed beside this Python (sandlock alone); wasm_path, wasm_sha256: a
    CPython for WASI of one's own and its hash; concurrency: programs at a time, None: one for each
    processor. A program has no file to write, no network, no second process, and keeps nothing for
    the next one. Raises ConfigError where no sandbox can be had.
    """

    name = "python"

    def __init__(
        self,
        sandbox: str = "auto",
        seconds: Annotated[float, ABOVE_0] = 10.0,
        characters: int = 10_000,
        memory: Annotated[int, Range(64, most=2**20)] = 512,
        packages: bool = False,
        wasm_path: str | None = None,
        wasm_sha256: str | None = None,
        concurrency: int | None = None,
    ) -> None:
        ABOVE_0.check("seconds", seconds)
        for option, value, least in (("memory", memory, 64), ("concurrency", concurrency, 1)):
            if value is not None and not is_integer(value):
                raise ValueError(f"{option}: got {shown(value)}, expected a whole number")
            Range(least, most=2**20).check(option, value)
        self.sandbox = find_sandbox(sandbox, packages, wasm_path, wasm_sha256)
        self.seconds, self.memory = seconds, memory
        # A warden ends its program itself, and is ended GRACE later.
        self.limits = Limits(seconds + 2 * GRACE, characters)
        self.concurrency = concurrency or len(os.sched_getaffinity(0))
        libraries = "installed packages" if packages else "the standard library alone"
        self.description = (
            "Runs a Python 3 program and gives what it prints, and the value of its last "
            f"expression. It has {libraries}, no files, no network, and {seconds:g} seconds."
        )

    def __call__(self, program: str) -> str:
        """Runs a Python 3 program and gives what it prints.

        Args:
            program: The whole program; nothing of an earlier one is there.
        """
        if len(program) > PROGRAM:
            raise ToolFailure(f"the program has more than {PROGRAM:,} characters")
        characters = self.limits.characters
        outcome = self.sandbox.run(program, self.seconds, self.memory, 4 * characters)
        output = Output(characters)
        reason = self._reason(outcome)
        # What it printed comes first, whatever ended it; a flood is said by the output itself.
        yield outcome.output if reason is None else _shown(outcome.output, output)
        if reason is not None:
            raise ToolFailure(reason)

    def _reason(self, outcome: Outcome) -> str | None:
        if outcome.ended == "flood":
            return f"more than {self.limits.characters:,} characters of output; it was ended"
        if outcome.ended == "time" or outcome.status == warden.TIME_OVER:
            return f"it took more than {self.seconds:g} s"
        if outcome.status == 0:
            return None
        last = outcome.output.decode(errors="replace").strip().rpartition("\n")[2]
        if outcome.status == warden.NOT_STARTED:
            return f"the sandbox did not start: {last}"
        if outcome.status == warden.TRAPPED:
            return f"it was ended by the sandbox: {last}"
        if outcome.status == 1 and RAISED.match(last):
            return last
        if outcome.status < 0 or outcome.status > 128:
            number = -outcome.status if outcome.status < 0 else outcome.status - 128
            return f"it was killed by signal {number}" + (
                f", as for more than {self.memory} MiB of memory" if number == 9 else ""
            )
        return f"it ended with status {outcome.status}"


def _shown(output: bytes, within: Output) -> str:
    """As much as fits of an output that may stop anywhere, or be no text."""
    return output.decode(errors="replace")[: within.characters]
