"""The OCR reward on an engine that is given, and once on the real one."""

import math
import sys

import numpy as np
import pytest
import torch

from flowkern.rewards import load_reward
from flowkern.rewards.ocr import asked_text, edit_distance, text_match


def reading(*lines):
    return load_reward("ocr", engine=lambda image: list(lines))


def images(count=1):
    return torch.zeros(count, 3, 8, 8)


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign "Open 24" and "shut"', {}, "Open 24"),
        ("a sign “Open 24”", {}, "Open 24"),
        (r"a sign \"Open\"", {}, "Open"),
        ('a sign "Open"', {"text": "Shut"}, "Shut"),
        ('a 3" pipe', {}, None),
        ("a sign", {"text": None}, None),
        ('a blank sign ""', {}, ""),
    ],
)
def test_what_is_asked_for(prompt, metadata, expected):
    assert asked_text(prompt, metadata) == expected
    assert asked_text("a sign", {}, "prompt") == "a sign"


def test_edit_distance_is_a_metric():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(12)]
    for a in words:
        for b in words:
            d = edit_distance(a, b)
            assert d == edit_distance(b, a) and (d == 0) == (a == b)
            assert abs(len(a) - len(b)) <= d <= max(len(a), len(b))
            assert all(d <= edit_distance(a, c) + edit_distance(c, b) for c in words[:4])
    assert edit_distance("kitten", "sitting") == 3


def test_rules_differ_as_their_projects_do():
    assert text_match("the HELLO  world", "hello world") == 1
    assert text_match("hexlo", "hello") == pytest.approx(0.8)
    assert text_match("much else", "abc") == 0, "capped at the length of the target"
    assert math.isnan(text_match("", " "))
    assert text_match("ab", "a b c d", "flow_grpo") == pytest.approx(1 - 2 / 4)
    assert text_match("ab", "a b c d", "cosmos_rl") == pytest.approx(1 - 2 / 7)
    assert text_match("a\nb", "ab", "verl_omni") == 1 > text_match("a\nb", "ab")
    assert [text_match(read, " ", "verl_omni") for read in ("", "x")] == [1, 0]


def test_lines_are_joined_and_the_unsure_are_not_read():
    reward = reading(("Op", 0.9), ("en", 0.5), ("ed", 0.49))
    scores, info = reward(images(2), ['a "open"', 'a "opened"'], [{}, {}])
    assert scores.tolist() == pytest.approx([1, 1 - 2 / 6]) and info["exact"].tolist() == [1, 0]


def test_a_prompt_without_a_text_has_no_score_and_costs_the_others_nothing():
    with pytest.warns(UserWarning, match="no score without a text to look for.*no quotes"):
        scores, _ = reading(("open", 1.0))(images(3), ['"open"', "no quotes", '""'], [{}] * 3)
    assert scores[0] == 1 and scores[1:].isnan().all()


def test_the_engine_sees_blue_first():
    seen = []
    reward = load_reward("ocr", engine=lambda image: seen.append(image) or [])
    red = images()
    red[:, 0] = 1
    assert reward(red, ['"x"'])[0].tolist() == [0]
    assert seen[0].dtype == np.uint8 and seen[0].shape == (8, 8, 3)
    assert seen[0][0, 0].tolist() == [0, 0, 255]


def test_options_are_held_to(monkeypatch):
    for options, said in (
        ({"rule": "flow"}, "rule: got 'flow', expected one of flow_grpo"),
        ({"unquoted": None}, "unquoted: got None"),
        ({"text_score": 2}, "text_score: expected 0 to 1, got 2"),
        ({"engine": "tesseract"}, "engine: got 'tesseract', expected"),
        ({"engine": len, "threads": 1.5}, "threads: got 1.5, expected a whole number or null"),
        ({"engine": len, "threads": 2}, "threads: says how rapidocr runs"),
    ):
        with pytest.raises(ValueError, match=said):
            load_reward("ocr", **options)

    def absent(name):
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)

    monkeypatch.setattr("flowkern.rewards.ocr.version", absent)
    with pytest.raises(
        ValueError, match=r"engine: rapidocr needs rapidocr: pip install 'flowkern\[ocr\]'"
    ):
        load_reward("ocr")


@pytest.mark.long(4)
def test_the_real_engine_reads_what_is_drawn():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(picture).text((10, 60), "Flow 42", "navy", ImageFont.load_default(32))
    drawn = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    reward = load_reward("ocr")
    scores, _ = reward(
        torch.stack([drawn, torch.zeros_like(drawn)]), ['a sign "flow 42"'] * 2, [{}, {}]
    )
    assert scores.tolist() == [1, 0]
    assert "PP-OCR" in reward.version and "onnxruntime" in reward.version


def test_an_engine_that_lacks_what_it_needs_itself_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr("flowkern.rewards.ocr.version", lambda name: "1")
    with pytest.raises(ValueError, match=r"^engine: rapidocr cannot be imported: .*flowkern\[ocr"):
        load_reward("ocr")
