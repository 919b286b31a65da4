"""flowkern report: the page of runs that are whole, under way, broken, or none."""

import html
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("jinja2")
pytest.importorskip("PIL")
import yaml
from PIL import Image

from flowkern.cli import main
from flowkern.train import durable

EVIL = '</script><script>window.evil=1</script>\' onload="window.evil=2" {{ 7 * 7 }} & é'
CONFIG = {
    "output_dir": "runs/x",
    "model": {"path": "someone/model", "negative_prompt": EVIL},
    "data": {"test_prompts": None},
    "reward": {"sharp": {"weight": 2.0}, "judge": {"weight": 0}},
    "train": {"steps": 40},
    "validation": {"num_images": 2},
    "algorithm": {"name": "flow_grpo"},
}


@pytest.fixture
def run(tmp_path):
    """Of 30 steps of 40, with two validations, a change on a resume, and a last line cut short."""
    path = tmp_path / "a run"
    (path / "samples").mkdir(parents=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (EVIL, "two", "three")))
    config = CONFIG | {"data": {"test_prompts": str(prompts)}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "config-20.yaml").write_text(yaml.safe_dump(config | {"train": {"steps": 20}}))
    records = [
        {"step": i, "reward/mean": 2 * i, "reward/sharp": i, "reward/judge": -i, "kl": None,
         "pg_clipfrac_higher": 0.25, "pg_clipfrac_lower": 0.5, "grad_norm": 1e-7 * i,
         "nfe/sample": 10, "nfe/naive_sample": 40, "nfe/train": 20, "nfe/naive_train": 60,
         "timing_s/rollout": 3.0, "timing_s/train": 1.0, "timing_s/step": 4.0, EVIL: float(i)}
        for i in range(1, 31)
    ]  # fmt: skip
    lines = [json.dumps(record) for record in records]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "rew']))
    held_out = [{"step": i, "reward/mean": i, "reward/sharp": i + 0.125} for i in (0, 20)]
    (path / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
    events = [("begun", 0, ""), ("failed", 12, EVIL), ("resumed", 10, "")]
    events += [("warned", 15, "the ratio is off"), ("resumed", 20, "")]
    events[1:1] = [("done", 10, "done: 10 steps"), ("resumed", 10, "")]
    happened = [
        {"event": kind, "step": step, "at": "2026-01-02T03:04:05+00:00", "said": said,
         "environment": {"device": "cuda, H200", "command": "flowkern train a.yaml"}}
        for kind, step, said in events
    ]  # fmt: skip
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in happened))
    (path / "best.json").write_text('{"step": 20, "metric": "reward/sharp", "value": 0.5}')
    for step, colour in ((0, "red"), (20, "blue")):
        Image.new("RGB", (8, 8), colour).save(path / f"samples/step-{step}.png")
    (path / "samples/step-30.png").write_bytes(b"half of a pic")
    return path


def test_a_page_says_what_the_directory_has(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "<script>window" not in page and "{{ 7" in page, "text of a run is text"
    assert not re.search(r'(src|href)="(?!#|data:)', page), "nothing is asked of a network"
    text = html.unescape(re.sub(r"<[^>]*>", "|", page))
    assert page.count(html.escape(EVIL, quote=False)[:20]) >= 4, "prompt, option, fault, record"
    for said in (
        "flow_grpo on someone/model · ended without a word (killed?) after 30 of 40 optimizer",
        "0.125 → 20.1",
        "best checkpoint||step 20||reward/sharp 0.5",
        "optimized, weight 2",
        "0.30 times the released loop's",
        "train.steps: 20, then 40",
        "75.0 %",
        "cuda, H200",
        "kl was not finite in 30 steps",
        "metrics.jsonl: 1 line without a record",
        "ended without a word before this resume",
        "2026-01-02 03:04:05 UTC",
    ):
        assert said in text, said
    assert "done: 10 steps" not in text, "a run that was made longer has no fault"
    rows = re.findall(r"[\d,.]+", re.search(r"sampling\|\|.*", text)[0])
    assert rows == "300 1,200 0.25 600 1,800 0.33 900 3,000 0.30".split()
    assert re.findall(r'data-step="(\d+)"', page) == ["0", "20"], "what is no picture is left out"
    assert page.count("<svg") == 2 + 3 + 2, "rewards; clipped, grad_norm, EVIL; seconds"
    assert main(["report", str(run)]) == 0, "a report is made anew"


def test_what_is_no_run_and_where_no_page_can_go(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    fresh, bare, busy = (tmp_path / name for name in ("fresh", "bare", "busy"))
    for path in (fresh, bare, busy):
        path.mkdir()
    shutil.copy(run / "config.yaml", fresh)
    (busy / "metrics.jsonl").write_text('{"step": 1, "loss": 1e400}\n{"step": 2, "loss": 3}\n')
    (fresh / "best.json").write_text("[]")
    early = {"event": "done", "step": 2, "said": "done: ended early: it fell"}
    (fresh / "events.jsonl").write_text(json.dumps(early))
    (busy / "run.lock").write_text('{"host": "far away", "pid": 1}')
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (tmp_path / "mine.html").write_text("<html>mine")
    cut, warned = tmp_path / "cut", tmp_path / "warned"
    for path in (cut, warned):
        shutil.copytree(bare, path)
    (cut / "config.yaml").write_text("reward:\n  digits_cla")
    (warned / "events.jsonl").write_text(
        "".join(json.dumps({"event": e, "step": 0, "said": e}) + "\n" for e in ("begun", "warned"))
    )
    for path, said in (
        (cut, "1 of 1 optimizer step"),
        (warned, "ended without a word (killed?) after 1 of 1"),
        (fresh, "No optimizer step is recorded yet"),
        (fresh, "done: ended early: it fell"),
        (bare, "1 of 1 optimizer step"),
        (busy, "under way on far away: 2 of 2"),
    ):
        assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0
        assert said in (tmp_path / "page.html").read_text()
    saved = tmp_path / "whole/checkpoint-1"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    capsys.readouterr()
    for arguments, status, said in (
        (["nowhere"], 2, "run: there is no folder 'nowhere'"),
        ([str(tmp_path / "empty")], 2, "has neither config.yaml nor metrics.jsonl"),
        ([str(saved)], 2, f"is a checkpoint; expected its run, '{saved.parent}'"),
        ([str(run), "--output", "page.pdf"], 2, "--output: got 'page.pdf', expected a name in"),
        ([str(run), "--output", str(tmp_path / "no/page.html")], 2, "there is no folder"),
        ([str(run), "--output", str(tmp_path / "mine.html")], 2, "is there, and no report"),
        ([str(run), "--output", "/proc/page.html"], 1, "/proc/page.html cannot be written: "),
    ):
        assert main(["report", *arguments]) == status
        error = capsys.readouterr().err
        assert said in error and error.startswith("flowkern: ") and error.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "<html>mine"

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    assert main(["report", str(run)]) == 1
    assert "report.html cannot be written: No space left on device" in capsys.readouterr().err
    assert not [*run.glob("report.html*")]


def test_long_runs_are_drawn_by_means_between_their_least_and_most():
    from flowkern.train.charts import MOST, Chart, Series, short, ticks

    values = [(step, float(step % 10)) for step in range(10_000)]
    one = Series("a", values)
    assert len(one.buckets) <= MOST and one.is_thinned
    assert {bucket[2:] for bucket in one.buckets[:-1]} == {(0.0, 9.0)}
    assert sum(mean for _, mean, *_ in one.buckets) / len(one.buckets) == pytest.approx(4.5, 0.01)
    chart = Chart("a", [one])
    assert chart.y(9.0) < chart.y(4.5) < chart.y(0.0) and chart.x(0) < chart.x(9_999)
    flat = Chart("b", [Series("b", [(3, -7.0)])])
    assert flat.y_ticks == [-7.0] and flat.x_ticks == [3] and flat.line(flat.series[0])
    assert ticks(0.0, 0.3, 4) == [0.0, 0.1, 0.2, 0.3] and ticks(-1e-9, 1e-9, 4)[0] == -1e-9
    assert [short(x) for x in (0.0, 1234.0, 0.12345, 1e-7, 3e9)] == [
        "0", "1,234", "0.1235", "1.00e-7", "3.00e9",
    ]  # fmt: skip


def test_a_browser_shows_it(run, tmp_path):
    """The slider, a pointer over a chart, and no error, in Chromium where it is installed."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, found), None)
    if browser is None:
        pytest.skip("chromium is not installed")
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    asked = """<script>
const slider = document.querySelector(".slider input"), svg = document.querySelector("svg");
slider.value = 0; slider.dispatchEvent(new Event("input"));
const shown = [...document.querySelectorAll(".gallery img")].map((i) => i.checkVisibility());
const box = svg.getBoundingClientRect();
const at = (x) => new PointerEvent("pointermove", {clientX: box.left + x * box.width});
svg.dispatchEvent(at(1));
const said = svg.parentNode.querySelector(".legend").innerText.replaceAll("\\n", " ");
const wide = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify([shown, said, wide, window.evil ?? null]);
</script>"""
    page.write_text(
        page.read_text()
        .replace("<head>", "<head><script>onerror = (m) => { window.evil = m; }</script>", 1)
        .replace("</body>", f"{asked}</body>")
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'home'}"]
    done = subprocess.run(
        [browser, *flags, "--window-size=500,900", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    shown, said, fits, evil = json.loads(html.unescape(title[1]))
    assert shown == [True, False] and evil is None and fits
    assert said.split() == "training rollouts30 held-out prompts– step 30".split()
