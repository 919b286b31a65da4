"""A launcher that is killed takes its processes along."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import signal, sys
from flowkern.train.launcher import end_with_launcher
end_with_launcher()
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit()))
print("began", flush=True)
signal.pause()
"""
LAUNCHER = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {PROCESS!r}]).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_launcher_that_is_killed_takes_its_processes_along():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], env=environment, stdout=subprocess.PIPE
    )
    assert launcher.stdout.readline() == b"began\n"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert select.select([launcher.stdout], [], [], 30)[0], "it goes on"
    assert launcher.stdout.read() == b"told\n"
    launcher.stdout.close()
