"""flowkern serve-reward, as a command: with a port, a token and an end."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from waiting import wait_for

from flowkern.cli import main
from flowkern.rewards import RewardError, Unscored, load_reward
from flowkern.rewards.http import Http
from flowkern.rewards.remote.protocol import JSON

pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import flowkern.rewards.remote.server  # noqa: F401, it needs both

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import time
from pathlib import Path

def waits(images, prompts, metadata):
    Path(metadata[0]["begun"]).touch()
    while not Path(metadata[0]["until"]).exists():
        time.sleep(0.01)
    return [1.0]
"""


def is_open(url):
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True


@pytest.mark.long(5)
def test_the_command_serves_what_the_reward_scores_and_ends_at_ctrl_c(tmp_path, monkeypatch):
    from flowkern.rewards.digits import DigitsClassifier, real_digits

    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    (tmp_path / "own_reward.py").write_text(WAITS)
    words = "digits_classifier own_reward:waits --port 0 --token-env REWARD_TOKEN".split()
    server = subprocess.Popen(
        [sys.executable, "-m", "flowkern", "serve-reward", *words, "--max-bytes", "30000000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = server.stdout.readline()
        url = re.fullmatch(
            r"serving digits_classifier, waits at (http://\S+), with the token\n", said
        )[1]
        remote = load_reward(
            "remote", "digits", name="digits_classifier", url=url, token_env="REWARD_TOKEN"
        )
        pixels = real_digits("held_out")[0][:6].mul(255).round().div(255)
        prompts, metadata = [""] * 6, [{"digit": i} for i in range(6)]
        wanted = DigitsClassifier()(pixels, prompts, metadata)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        found, _ = remote(pixels, prompts, metadata)
        assert torch.equal(found, torch.as_tensor(wanted).double())
        # Refused before it is read, and told so: the connection does not just break.
        large = {"content": bytes(2 * 10**7), "headers": {"content-type": JSON}}
        for secret, status in ((None, 401), ("s3cret", 400)):
            with pytest.raises(RewardError, match=f"answered {status}: ") as error:
                Http(url, secret=secret, retries=0).post("/v1/score", **large)
            assert not isinstance(error.value, Unscored)
        with pytest.raises(RewardError, match="answered 413: body: expected at most 30000000"):
            large["content"] = bytes(40_000_000)
            Http(url, secret="s3cret", retries=0).post("/v1/score", **large)
        waits = load_reward("remote", name="waits", url=url, token_env="REWARD_TOKEN", retries=0)
        with ThreadPoolExecutor(2) as pool:
            asked = []
            for count, name in enumerate(("first", "second"), 1):
                row = {"begun": str(tmp_path / "begun"), "until": str(tmp_path / name)}
                asked.append(pool.submit(waits, torch.zeros(1, 3, 4, 4), ["p"], [row]))
                wait_for((tmp_path / "begun").exists)
                wait_for(lambda n=count: waits.server.get("/v1/info").json()["running"] == n)
            server.send_signal(signal.SIGINT)
            wait_for(lambda: not is_open(url))
            (tmp_path / "first").touch()
            assert asked[0].result(10)[0].tolist() == [1.0], "asked before the end, and answered"
            server.send_signal(signal.SIGINT)
            with pytest.raises(Unscored, match="answered 503: the server is shutting down"):
                asked[1].result(10)
        out, err = server.communicate(timeout=20)
    finally:
        server.kill()
    assert (server.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("picksore", 2, "reward.picksore: got 'picksore', expected .*did you mean 'pickscore'"),
        ("digits_judge --host 0.0.0.0", 2, "--host: 0.0.0.0 is open .*takes --token-file PATH or"),
        ("digits_judge --port 65536", 2, "--port: got 65536, expected 0 to 65535"),
        ("digits_judge --max-bytes 0", 2, "--max-bytes: got 0, expected 1 to"),
        (
            "digits_judge --token-file no/such",
            2,
            "--token-file: cannot read 'no/such': No such f",
        ),
        ("digits_judge --token-env NO_SUCH_ONE", 2, "--token-env: .* no variable 'NO_SUCH_ONE'$"),
        ("digits_judge weight=2", 2, "weight: is the run's to say"),
        (
            "digits_judge digits.batch=2",
            2,
            "digits.batch: got 'digits', expected one of digits_jud",
        ),
        ("digits_judge colour=red --port 0", 2, "reward.digits_judge.colour: unknown key"),
        ("a:b c:b", 2, "c:b: there is a reward of the name b already"),
        ("device=cpu", 2, "expected the name of a reward"),
        (
            "digits_judge --port {taken}",
            1,
            "--port: 127.0.0.1 port {taken}: Address already in use",
        ),
        (
            "digits_judge --host no.invalid --token-env A_TOKEN --port 0",
            1,
            "--host: no.invalid port 0: ",
        ),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(arguments, status, said, capsys, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = arguments.format(taken=port).split()
        assert main(["serve-reward", *words]) == status
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and re.search(said.format(taken=port), err), err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "flowkern.rewards.remote.server")
    monkeypatch.delattr("flowkern.rewards.remote.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve-reward", "digits_judge"]) == 2
    said = "flowkern: serve-reward needs uvicorn: pip install 'flowkern[train,serve]'\n"
    assert capsys.readouterr().err == said
