"""What a person sees of a run: bars, lines, the first minute."""

import io
import re
import sys

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from flowkern.checks import counted
from flowkern.train.display import Display
from flowkern.train.loop import Loop


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr("flowkern.train.display.time.monotonic", found)
    return found


def walk(display, clock, calls):
    """An iteration of two optimizer steps: 100 rows in 10 s, 3 s of a reward, then 50 in 15 s."""
    display.begin(2, lambda: {"sampling": 100, "training": 50})
    with display.phase("sampling"):
        for _ in range(10):
            calls[0] += 10
            clock.now += 1
            display.tick()
        clock.now += 3
        display.tick(is_scoring=True)
    with display.phase("training"):
        calls[0] += 50
        clock.now += 15
        display.tick()
    record = {"step": 1, "reward/mean": 0.25, "timing_s/rollout": 10, "timing_s/reward": 3}
    first = record | {"timing_s/train": 8, "timing_s/step": 21}
    display.log([first, {"step": 2, "timing_s/train": 7, "timing_s/step": 7}])


def test_a_terminal_has_the_way_and_what_is_left_from_the_first_rows_on(clock, monkeypatch):
    stream, calls = Terminal(), [0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    said = []
    display = Display(10, True, lambda: calls[0])
    with display.running(0):
        show = display._show
        monkeypatch.setattr(display, "_show", lambda: (show(), said.append(snapshot(display))))
        walk(display, clock, calls)
        walk_left = display._bars.tasks[0].fields["said"]
    # 100 rows and 50 that count three: after 10 s of a second per 10 rows, 2 of 10 steps take 25.
    assert said[10] == ("sampling", "100 of 100 rows", "0 of 10 steps, 1:55 left")
    assert said[11][0] == "scoring"
    assert said[5][1] == "50 of 100 rows"
    assert walk_left == (
        "2 of 10 steps, reward 0.250, 1:52 left, training 54 %, sampling 36 %, scoring 11 %"
    )
    assert "training" in stream.getvalue()
    before = stream.getvalue()
    display.tick(always=True)  # after its run nothing is shown
    assert stream.getvalue() == before


@pytest.mark.parametrize("columns, said", [
    (30, "2 of 10 steps"),
    (80, "2 of 10 steps, reward 0.250, 1:52 left, training 54 %"),
])  # fmt: skip
def test_a_narrow_terminal_keeps_names_and_bars(clock, monkeypatch, columns, said):
    stream, calls = Terminal(), [0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    display = Display(10, True, lambda: calls[0])
    with display.running(0):
        walk(display, clock, calls)
        assert display._bars.tasks[0].fields["said"] == said
        display._bars.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "training " in shown and "\u2501" in shown.splitlines()[-2], shown


def snapshot(display):
    run, now = display._bars.tasks
    return now.description, now.fields["said"], run.fields["said"]


def test_elsewhere_an_iteration_is_a_line_and_of_one_process(clock, capsys):
    calls = [0]
    for is_main in (True, False):
        display = Display(10, is_main, lambda: calls[0])
        with display.running(0):
            with display.phase("validation"):
                clock.now += 28
            walk(display, clock, calls)
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err == is_main * (
            "step 2 of 10, reward 0.250, 28 s, validation 50 %, sampling 18 %, scoring 5 %, "
            "training 27 %, 1:52 left\n"
        )


def test_the_first_minute_says_what_is_trained_on_what_and_no_library_does(
    tiny, capfd, monkeypatch
):
    from flowkern.cli.train import start

    config = tiny("train.steps=2", "reward.digits_judge.weight=0", "data.test_prompts=null")
    assert start(config) == 0
    found = capfd.readouterr()
    assert found.out == ""
    lines = found.err.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert re.search(r"SD3|StableDiffusion3Pipeline, .*[\d,]+ weights in float32, 32 x 32 px, "
                     r"D = 64 elements", said["model"])  # fmt: skip
    assert re.search(r"trains [\d,]+ weights, of rank 16 in \d+ layers: to_q", said["training"])
    assert (
        "4 prompts, 16 images; rows of the network: 48 sampling, 32 training; 2 steps to go"
        in (said["iteration"])
    )
    assert "digits_classifier 1, digits_judge (reported only)" in said["rewards"]
    assert said["folder"].endswith(config.output_dir)
    assert [line.split(",")[0] for line in lines if line.startswith("step ")] == [
        "step 1 of 2",
        "step 2 of 2",
    ]
    assert len(lines) == 9, "and nothing else"


def test_a_reward_that_is_waited_for_says_how_it_would_not_be():
    from types import SimpleNamespace

    from flowkern.train.banner import waiting

    def said(block, slots, *names):
        rewards = {n: SimpleNamespace(overlaps=n.startswith("far")) for n in ("near", *names)}
        task = SimpleNamespace(rewards=rewards, slots=range(slots))
        train = SimpleNamespace(prompts_per_block=block)
        return waiting(SimpleNamespace(task=task, config=SimpleNamespace(train=train)))

    assert said(None, 2, "far").startswith("far is asked when all of a rollout is sampled; with")
    assert said(None, 2, "far", "far2").startswith("far, far2 are asked when ")
    assert said(1, 2, "far") is said(None, 1, "far") is said(None, 2) is None


def test_on_a_known_card_the_first_minute_has_an_estimate(tiny, monkeypatch):
    from types import SimpleNamespace

    from flowkern.train import banner

    loop = Loop(tiny())
    assert banner.estimated(loop) is None, "nothing is known of a CPU"
    there = SimpleNamespace(device=SimpleNamespace(type="cuda"), world=1, config=loop.config)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert re.match(r"at most \d+\.\d GB; seconds of an iteration on rtx4090: sampling \d",
                    banner.estimated(there))  # fmt: skip
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA T4")
    assert banner.estimated(there) is None


def test_one_is_said_as_one():
    said = [counted(n, noun) for n in (0, 1, 1.0, 2, 12_000) for noun in ("step", "process")]
    assert said[:6] == ["0 steps", "0 processes", *["1 step", "1 process"] * 2]
    assert said[6:] == ["2 steps", "2 processes", "12,000 steps", "12,000 processes"]
