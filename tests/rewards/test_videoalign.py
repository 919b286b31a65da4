"""VideoAlign over HTTP: which frames go, what is made of the answer, what has no score."""

import base64
import io

import numpy as np
import pytest
import torch

from flowkern.rewards import Unscored, load_reward
from flowkern.rewards.videoalign import sampled

TOLD = {
    "VQ_mean": 1.0,
    "VQ_std": 2.0,
    "MQ_mean": 0.0,
    "MQ_std": 0.5,
    "TA_mean": -1.0,
    "TA_std": 1.0,
}
ANSWER = {"logits": {"VQ": 5.0, "MQ": 1.0, "TA": 2.0}, "inference_config": TOLD, "version": "x"}


@pytest.mark.parametrize(
    ("count", "fps", "number"),
    [(81, 16, 10), (24, 8, 6), (5, 1, 4), (4, 24, 4), (3, 24, 2), (2, 24, 2), (1, 24, 0)],
)
def test_frames_are_two_of_a_second_and_even(count, fps, number):
    places = sampled(count, fps)
    assert len(places) == number and places == sorted(set(places))
    assert places == [] or (places[0], places[-1]) == (0, count - 1)


def test_what_goes_and_what_comes_back(served):
    from PIL import Image

    reward = load_reward("videoalign", url="http://server", dimensions=["VQ", "MQ"])
    levels = torch.arange(12).view(1, 12, 1, 1, 1) * 20
    videos = levels.expand(2, 12, 3, 4, 6).to(torch.uint8).clone()
    seen = {}

    def answer(body):
        frames = [np.array(Image.open(io.BytesIO(base64.b64decode(f)))) for f in body["frames"]]
        seen[body["prompt"]] = [int(f[0, 0, 0]) // 20 for f in frames], body["fps"]
        assert frames[0].shape == (4, 6, 3)
        return 200, ANSWER

    requests = served(reward, answer)
    scores, info = reward(videos, ["a", "b"], [{"fps": 4}, {"fps": 2}])
    assert requests[0].url.path == "/v1/videoalign"
    assert seen["a"] == ([0, 2, 4, 7, 9, 11], 2), "6 of 12 frames: half of the 4 of a second"
    assert seen["b"] == (list(range(12)), 2)
    assert {name: value.tolist() for name, value in info.items()} == {
        "VQ": [2, 2], "MQ": [2, 2], "TA": [3, 3]
    }  # fmt: skip
    assert scores.tolist() == [4, 4] and reward.model == "x"
    whole = load_reward("videoalign", url="http://server", fps=4)
    served(whole, answer)
    assert whole(videos, ["a", "b"])[0].tolist() == [7, 7]


def test_what_cannot_be_scored_is_nan_or_said(served):
    reward = load_reward("videoalign", url="http://server", retries=0)
    videos = torch.zeros(2, 4, 3, 4, 4)
    served(reward, lambda body: (200, ANSWER) if body["prompt"] == "a" else (500, {}))
    scores, info = reward(videos, ["a", "b"], [{"fps": 8}] * 2)
    assert scores.isnan().tolist() == [False, True] == info["TA"].isnan().tolist()
    assert reward(videos[:, :1], ["a", "a"], [{"fps": 8}] * 2)[0].isnan().all()
    with pytest.raises(Unscored, match="answered 500"):
        reward(videos[:1], ["b"], [{"fps": 8}])
    for row in ({}, {"fps": 0}, {"fps": "8"}):
        with pytest.raises(ValueError, match=r"metadata\['fps'\]: expected frames of a second"):
            reward(videos[:1], ["a"], [row])
    with pytest.raises(ValueError, match="expected videos"):
        reward(videos[:, 0], ["a", "a"], [{"fps": 8}] * 2)
    for wrong in (
        {"logits": ANSWER["logits"]},
        ANSWER | {"inference_config": TOLD | {"VQ_std": 0}},
        ANSWER | {"inference_config": TOLD | {"VQ_std": -1.0}},
        ANSWER | {"logits": {"VQ": 1}},
        ANSWER | {"logits": {"VQ": "nan", "MQ": 1, "TA": 1}},
        [],
    ):
        served(reward, lambda body, wrong=wrong: (200, wrong))
        with pytest.raises(Unscored, match="not what docs/rewards.md asks of VideoAlign"):
            reward(videos[:1], ["a"], [{"fps": 8}])


def test_options_are_held_to():
    for options, said in (
        ({"dimensions": ["VQ", "XX"]}, "dimensions: got"),
        ({"dimensions": []}, "dimensions: got"),
        ({"fps": 0}, "fps: expected a number above 0"),
        ({"url": "server"}, "url: got 'server'"),
        ({"concurrency": 0}, "concurrency: got 0, expected"),
    ):
        with pytest.raises(ValueError, match=said):
            load_reward("videoalign", **{"url": "http://server"} | options)
