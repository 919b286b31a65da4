"""torchrun, and what is started through it: the process that a run's processes are children of."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """SIGTERM for this process where a launcher is killed (kill -9, out of memory) and can tell
    nobody: its processes would go on as a run that nothing watches, and hold its directory. On
    Linux; without a launcher nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
