"""GenEval: the clauses on boxes, and a detector that answers as a server does, or not."""

import base64
import io
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from flowkern.rewards import Unscored, load_reward
from flowkern.rewards.clauses import Thing, check_clauses, judge, relations

LEFT, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20)


def found(**boxes):
    return {name: [Thing(*one) for one in some] for name, some in boxes.items()}


def test_counts_as_the_three_scores_have_them():
    row = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    dogs = [judge(found(dog=[(LEFT,)] * n), row) for n in range(6)]
    assert [v.score for v in dogs] == [0, 0.5, 1, 0.5, 0, -0.5], "negative past twice as many"
    assert [v.strict for v in dogs] == [False, False, True, False, False, False]
    assert [v.correct for v in dogs] == [False, False, True, False, False, False]
    del row["exclude"]
    more = judge(found(dog=[(LEFT,)] * 3), row)
    assert more.correct and not more.strict


def test_colors_enter_the_score_when_the_count_is_right():
    row = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    for colors, score in (("red red", 1), ("red blue", 0.75), ("blue blue", 0.5)):
        verdict = judge(found(cup=[(LEFT, color) for color in colors.split()]), row)
        assert verdict == (score, score == 1, score == 1)
    assert judge(found(cup=[(LEFT, "red")]), row).score == 0.25, "(1/2 + 0) / 2"
    surest = found(cup=[(LEFT, "red"), (LEFT, "red"), (LEFT, "blue")])
    assert judge(surest, row) == ((0.5 + 0) / 2, True, False), "the benchmark looks at the surest"


def test_positions_earn_what_they_did_where_they_were_released():
    row = {
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "position": ["right of", 0]},
        ]
    }
    right = judge(found(dog=[(LEFT,)], cat=[(RIGHT,)]), row)
    assert right == (1, True, True)
    wrong = judge(found(dog=[(RIGHT,)], cat=[(LEFT,)]), row)
    assert wrong == ((1 + 1 + 0 + 1) / 4, False, False), "0 for the place, and then 1"
    alone = judge(found(cat=[(RIGHT,)]), row)
    assert alone == ((0 + 1 + 0) / 3, False, False), "0 alone without a target"
    assert judge(found(dog=[(LEFT,)]), row).score == (1 + 0 + 0) / 3
    two = found(dog=[(LEFT,), (RIGHT,)], cat=[(RIGHT,)])
    assert judge(two, row) == ((0 + 1 + 0) / 3, True, False), "the surest dog is to the left"


def test_relations_against_the_formula_and_its_laws():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a, b = (np.sort(rng.uniform(0, 100, (2, 2)), 0) for _ in range(2))
        offset = (a.mean(0) - b.mean(0)).astype(np.float64)
        sizes = np.abs(np.diff(a, axis=0) + np.diff(b, axis=0))[0]
        x, y = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
        x, y = (x, y) / np.linalg.norm(offset)
        expected = {"left of"} if x < -0.5 else {"right of"} if x > 0.5 else set()
        expected |= {"above"} if y < -0.5 else {"below"} if y > 0.5 else set()
        got = relations(a.ravel(), b.ravel())
        assert got == expected
        assert relations(b.ravel(), a.ravel()) == {opposite[one] for one in got}
        assert relations(4 * a.ravel() + 8, 4 * b.ravel() + 8) == got
        seen.add(frozenset(got))
    assert len(seen) == 9, "none, four alone, four corners"
    assert relations(LEFT, LEFT) == set()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, r"metadata\['include'\]: got None"),
        ({"include": []}, "expected a list of clauses"),
        (
            {"include": [{"class": "a"}]},
            r"\['include'\]\[0\]: .*count to be a whole number above 0",
        ),
        ({"include": [{"class": "a", "count": 0}]}, "above 0"),
        ({"include": [{"class": "a", "count": 1, "color": 3}]}, "color to be a word"),
        ({"include": [{"class": "a", "count": 1, "position": ["near", 0]}]}, "a relation of left"),
        ({"include": [{"class": "a", "count": 1, "position": ["above", 0]}]}, "a clause before it"),
        ({"include": [{"class": "a", "count": 1}], "exclude": [{"class": "b"}]}, "exclude"),
    ],
)
def test_rows_that_are_no_clauses_are_refused(row, said):
    with pytest.raises(ValueError, match=said):
        check_clauses(row)


ROWS = [
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 1}],
        "exclude": [{"class": "cup", "count": 1}],
    },
]


def test_a_detector_over_http(served):
    """Pixels arrive as they are; what it is asked of each image; thresholds of both kinds."""
    from PIL import Image

    reward = load_reward("geneval", url="http://detector:18085", batch=2)

    def answer(body):
        assert body["protocol"] == 1
        found = []
        for one in body["images"]:
            pixels = np.array(Image.open(io.BytesIO(base64.b64decode(one["png"]))))
            if one["classes"] == ["cup"]:
                assert one["colors"] == ["cup"] and (pixels == (255, 0, 128)).all()
                found.append([
                    {"class": "cup", "score": 0.2, "box": [1, 1, 2, 2], "color": "blue"},
                    {"class": "cup", "score": 0.4, "box": [0, 0, 5, 5], "color": "red"},
                ])  # fmt: skip
            else:
                assert one["classes"] == ["cup", "dog"] and not one["colors"]
                found.append([{"class": "dog", "score": s, "box": LEFT} for s in (0.95, 0.8)])
        return 200, {"detections": found, "version": "stand-in 1"}

    images = torch.tensor([1, 0, 128 / 255]).view(1, 3, 1, 1).expand(3, 3, 6, 8)
    requests = served(reward, answer)
    scores, info = reward(images, ["a", "b", "c"], [ROWS[0], ROWS[1], ROWS[0]])
    assert len(requests) == 2 and requests[0].url.path == "/v1/detect"
    assert scores.tolist() == [1, 1, 1] == info["correct"].tolist()
    assert info["strict_counting"].nan_to_num(-1).tolist() == [-1, 1, -1]
    assert reward.detector == "stand-in 1"
    with pytest.raises(ValueError, match="include.*of prompt 'b'"):
        reward(images, ["a", "b", "c"], [ROWS[0], {}, {}])


def test_what_the_detector_fails_at_has_no_score(served):
    reward = load_reward("geneval", url="http://detector", batch=1, retries=1)

    def answer(body):
        one = body["images"][0]["classes"] == ["cup"]
        return (503, {}) if one else (200, {"detections": [[]]})

    images = torch.zeros(2, 3, 4, 4)
    requests = served(reward, answer)
    scores, _ = reward(images, ["a", "b"], ROWS)
    assert scores.isnan().tolist() == [True, False] and scores[1] == 0
    assert len(requests) == 3, "one of them was asked for again"
    for wrong in (
        {"detections": []},
        {"verdicts": [{"score": None, "correct": 1, "strict": 1}]},
        {"detections": [[{"class": "cup", "score": 1, "box": LEFT}]]},
        {"detections": [[{"class": "cup", "score": 1, "box": (0, 1), "color": "red"}]]},
        [1],
        {"detections": [[{"class": "cup", "score": "nan", "box": LEFT, "color": "red"}]]},
    ):
        served(reward, lambda body, wrong=wrong: (200, wrong))
        with pytest.raises(Unscored, match="the answer is not what docs/rewards.md asks of"):
            reward(images[:1], ["a"], ROWS[:1])


def test_the_detector_of_the_page_speaks_the_protocol(served, monkeypatch):
    """Without a port: the class is given the bytes of a request."""
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    code = re.search(r"```python\n(import base64, io, json\n.*?)```", page, re.S)[1]
    assert len(code.splitlines()) <= 24
    seen, made = [], []

    def judged(images, rows, only_strict=False):
        seen.extend(zip(images, rows, strict=True))
        return [0.5, 1.0], [0.0, 1.0], [0.0, 1.0], {}, {}

    theirs = types.SimpleNamespace(load_geneval=lambda: judged)
    monkeypatch.setitem(sys.modules, "reward_server.gen_eval", theirs)
    monkeypatch.setitem(sys.modules, "reward_server", types.SimpleNamespace(gen_eval=theirs))
    idle = types.SimpleNamespace(serve_forever=lambda: None)
    monkeypatch.setattr("http.server.HTTPServer", lambda at, kind: made.append(kind) or idle)
    exec(compile(code, "docs/rewards.md", "exec"), {})

    class Wire(io.BytesIO):
        sent = b""

        def makefile(self, *_):
            return self

        def sendall(self, data):
            self.sent += data

    def answer(body):
        data = json.dumps(body).encode()
        wire = Wire(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        made[0].log_message = lambda *_: None
        made[0](wire, ("", 0), None)
        return 200, json.loads(wire.sent.partition(b"\r\n\r\n")[2])

    reward = load_reward("geneval", url="http://detector")
    served(reward, answer)
    scores, info = reward(torch.zeros(2, 3, 4, 4), ["a", "b"], ROWS)
    assert scores.tolist() == [0.5, 1] and info["strict"].tolist() == [0, 1]
    assert seen[0][0].size == (4, 4) and seen[0][1] == {"prompt": "a"} | ROWS[0]
    assert reward.detector == "flow_grpo's"


def test_options_are_held_to(monkeypatch):
    monkeypatch.delenv("DETECTOR_TOKEN", raising=False)
    for options, said in (
        ({"url": "detector"}, "url: got 'detector', expected http"),
        ({"grade": "mean"}, "grade: got 'mean', expected one of scores"),
        ({"threshold": 3}, "threshold: expected 0 to 1"),
        ({"token_env": "DETECTOR_TOKEN"}, "token_env: the environment variable DETECTOR_TOKEN"),
        ({"retries": -1}, "retries: got -1, expected a whole number"),
        ({"request_timeout": 0}, "request_timeout: expected seconds"),
    ):
        with pytest.raises(ValueError, match=said):
            load_reward("geneval", **{"url": "http://detector"} | options)
