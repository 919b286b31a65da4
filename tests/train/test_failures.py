"""Rewards that leave images out, see whole groups, or are waited for while sampling goes on."""

import os
import re
import signal
import threading
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("accelerate")
from flowkern.rewards import RewardError, Unscored
from flowkern.train.config import ConfigError, Rewards
from flowkern.train.errors import RunError
from flowkern.train.failures import ROLLOUTS, Failures
from flowkern.train.fields import build
from flowkern.train.loop import Loop
from flowkern.train.reward_calls import AHEAD, THREADS, KeyedReward
from flowkern.train.scoring import load_rewards, score
from flowkern.train.stop import Stop, StopRequest

NAN = float("nan")


def batches(*sizes):
    """Images that are their own numbers."""
    first = 0
    for size in sizes:
        images = torch.arange(first, first + size).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        yield images, [{"prompt": f"p{i}"} for i in range(first, first + size)]
        first += size


def numbers(images):
    return images[:, 0, 0, 0].double()


def keyed(name, function, weight=1.0, **options):
    return KeyedReward(f"reward.{name}", weight, function, **options)


# ---- without a score ----


def flaky(images, prompts, metadata):
    if numbers(images)[0] == 2:
        raise Unscored("http://far: no answer\nwithin 3 s")
    return numbers(images)


def holed(images, prompts, metadata):
    return torch.where(numbers(images) == 5, torch.nan, 1.0), {"seen": numbers(images)}


def test_what_has_no_score_is_in_no_mean_and_is_counted():
    rewards = {
        "far": keyed("far", flaky, weight=2.0, scale=(0.5, 10.0)),
        "holed": keyed("holed", holed, may_be_nan=True),
        "judge": keyed("judge", flaky, weight=0.0),
        "fine": keyed("fine", lambda images, *_: numbers(images), weight=0.0),
    }
    found = score(rewards, batches(2, 3, 2))
    assert found.rewards["far"].nan_to_num(-1).tolist() == [0, 1, -1, -1, -1, 5, 6], "raw"
    assert found.rewards["mean"].nan_to_num(-1).tolist() == [21, 22, -1, -1, -1, -1, 27]
    assert found.means() == {
        "reward/mean": pytest.approx(70 / 3), "reward/far": 3, "reward/holed": 1,
        "reward/judge": 3, "reward/fine": 3, "info/holed/seen": 3, "failed_rewards": 4,
        "failed_rewards/far": 3, "failed_rewards/holed": 1, "failed_rewards/judge": 3,
    }  # fmt: skip
    why = {
        "far": "reward.far: http://far: no answer within 3 s",
        "holed": "reward.holed: NaN for 1 of 7 images",
        "judge": "reward.judge: http://far: no answer within 3 s",
    }
    assert found.explained() == why
    for value, allowed in ((NAN, False), (float("inf"), True), (1e160, True)):
        wrong = keyed("f", lambda images, *_, v=value: [v] * len(images), may_be_nan=allowed)
        said = r"^reward.f: (nan|inf|1e\+160) for image 0 of 2"
        with pytest.raises(RewardError, match=said) as caught:
            score({"f": wrong}, batches(2))
        assert ("reward.f.allow_nan=true" in str(caught.value)) == (value is NAN)


class Scaled:
    scales: ClassVar = {"raw": (1.0, 0.0), "peer": (0.5, 3.0)}
    default_scale = "peer"
    may_fail = True

    def __init__(self, size: int = 1): ...

    def __call__(self, images, prompts, metadata): ...


def test_options_of_every_reward(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mine", SimpleNamespace(Scaled=Scaled, f=flaky))
    kind = {"kind": "mine:Scaled"}
    tree = {"a": kind, "b": kind | {"scale": "raw"}, "c": kind | {"scale": -2, "size": 3}}
    tree |= {"d": {"kind": "mine:f"}, "e": {"kind": "mine:f", "allow_nan": True, "scale": 0.1}}
    found = load_rewards(build(Rewards, tree))
    scales = [(0.5, 3.0), (1.0, 0.0), (-2.0, 0.0), (1.0, 0.0), (0.1, 0.0)]
    assert [one.scale for one in found.values()] == scales
    assert [one.may_be_nan for one in found.values()] == [True, True, True, False, True]
    for options, message in (
        (kind | {"scale": "raww"}, "reward.a.scale: got 'raww', expected one of raw, peer, or a n"),
        ({"kind": "mine:f", "scale": "raw"}, "reward.a.scale: got 'raw', expected a number: it na"),
        (kind | {"scale": True}, "a.scale: got True, expected a number from"),
        (kind | {"scale": " "}, "a.scale: got ' ', expected a number from"),
        (kind | {"scale": 0}, "a.scale: got 0, expected a number from -1e100 to 1e100 that is not"),
        (kind | {"allow_nan": 1}, "a.allow_nan: got 1, expected a bool"),
        (kind | {"alow_nan": True}, "reward.a.alow_nan: .* did you mean 'reward.a.allow_nan'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_rewards(build(Rewards, {"a": options}))


# ---- groups ----


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1,) * 12, (4, 4, 4), (3, 3, 3, 3), (2, 9, 1)])
def test_a_reward_of_groups_sees_them_whole_and_all_once(sizes):
    group, calls = [7] * 4 + [3] * 4 + [9] * 4, []

    def by_group(images, prompts, metadata, *, group):
        calls.append((numbers(images).long().tolist(), group, prompts))
        assert [one["group"] for one in metadata] == group
        return [sum(g == other for other in group) for g in group]

    def plain(images, prompts, metadata):
        return [one["group"] for one in metadata]

    rewards = {"by": keyed("by", by_group), "plain": keyed("plain", plain)}
    found = score(rewards, batches(*sizes), group=group)
    assert found.rewards["by"].tolist() == [4] * 12 and found.rewards["plain"].tolist() == group
    places = [place for call, *_ in calls for place in call]
    assert places == list(range(12)) and all(len(call) % 4 == 0 for call, *_ in calls)
    assert [g for _, groups, _ in calls for g in groups] == group
    assert [p for *_, prompts in calls for p in prompts] == [f"p{i}" for i in range(12)]
    assert score(rewards, batches(*sizes)).rewards["by"].tolist() == [1] * 12, "each its own"


# ---- beside sampling ----


class Waits:
    overlaps = True

    def __init__(self, work):
        self.work = work

    def __call__(self, images, prompts, metadata):
        return self.work(images)


def test_sampling_goes_on_while_a_reward_waits_with_the_same_scores():
    drawn, order = threading.Event(), []

    def slow(images):
        assert drawn.wait(20), "the last batch is never drawn"
        order.append(threading.current_thread())
        return numbers(images) / 3, {"third": numbers(images)}

    def draw():
        yield from batches(2, 1, 3)
        drawn.set()

    rewards = {"slow": keyed("slow", Waits(slow)), "here": keyed("here", flaky, weight=0.1)}
    found = score(rewards, draw())
    assert threading.main_thread() not in order and len(order) == 3
    at_once = {**rewards, "slow": keyed("slow", lambda images, *_: slow(images))}
    expected = score(at_once, draw())
    for a, b in ((found.rewards, expected.rewards), (found.info, expected.info)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a)


def test_no_more_calls_wait_than_a_few():
    go, most = threading.Event(), []

    def counted():
        for i, batch in enumerate(batches(*[1] * (AHEAD + 3))):
            most.append(i)
            if i == AHEAD + 1:  # sampling could go no further than this before one has ended
                assert go.is_set()
            yield batch

    def slow(images):
        if numbers(images)[0] < THREADS:
            threading.Timer(0.05, go.set).start()
            assert go.wait(20)
        return numbers(images)

    found = score({"slow": keyed("slow", Waits(slow))}, counted())
    assert found.rewards["slow"].tolist() == list(range(AHEAD + 3)) and len(most) == AHEAD + 3


def test_what_fails_beside_sampling_is_named_and_late_is_late():
    end = threading.Event()

    def fails(images):
        raise KeyError("gone")

    def says(value):
        return lambda images: value

    for work, options, message in (
        (fails, {}, r"^reward.slow: KeyError: 'gone' \(at test_failures\.py:\d+\)$"),
        (says([1]), {}, r"^reward.slow: returned shape \(1,\); expected 2 real numbers"),
        (lambda images: end.wait(20), {"timeout": 0.05}, r"^reward.slow: did not .* 0.05 s, its"),
    ):
        with pytest.raises(RewardError, match=message):
            score({"slow": keyed("slow", Waits(work), **options)}, batches(2, 2))
    # Those that hang keep one that has all the time from ever beginning.
    hung = keyed("hung", Waits(lambda images: end.wait(20)), timeout=0.05)
    rewards = {"patient": keyed("patient", Waits(numbers)), "hung": hung, "also": hung}
    with pytest.raises(RewardError, match="^reward.hung: did not return"):
        score(rewards, batches(1, 1, 1))
    end.set()
    in_time = {"slow": keyed("slow", Waits(numbers), timeout=20)}
    assert score(in_time, batches(2, 2)).rewards["slow"].tolist() == [0, 1, 2, 3]


def test_a_signal_is_heard_while_a_reward_beside_is_waited_for():
    end = threading.Event()

    def hangs(images):
        os.kill(os.getpid(), signal.SIGTERM)
        end.wait(20)

    with StopRequest() as stop, pytest.raises(Stop):
        score({"slow": keyed("slow", Waits(hangs))}, batches(1), stop.in_reward)
    end.set()
    assert stop.status == 128 + signal.SIGTERM


# ---- how many may fail ----


def rollout(left_out, samples=16, **reasons):
    return SimpleNamespace(left_out=left_out, samples=samples, unit="images", reasons=reasons)


def test_a_run_goes_on_with_a_share_of_the_last_rollouts():
    """In its first ones as in all others: with eight of 160, as ten rollouts are, and not nine."""
    kept = Failures(0.05)
    assert kept.note(0, rollout(0)) == []
    assert kept.note(1, rollout(1, a="reward.a: gone")) == ["reward.a: gone"]
    assert kept.note(1, rollout(1, a="reward.a: gone")) == [], "drawn again, and said"
    resumed = Failures(0.05)
    resumed.load_state_dict(kept.state_dict())
    for failures in (kept, resumed):
        with pytest.raises(RunError, match=r"^9 of the 48 images of the last 3 .*, 5.6% .*gone$"):
            failures.note(2, rollout(8, a="reward.a: gone"))
        assert failures.note(2, rollout(7)) == [], "drawn again"
        for i in range(3, ROLLOUTS):
            failures.note(i, rollout(0))
        with pytest.raises(RunError, match=r"^9 of the 160 images of the last 10 .*, 5.6% "):
            failures.note(10, rollout(1))
        for number, count in ((10, 0), (11, 1), (12, 7)):  # the first of ten is forgotten each time
            failures.note(number, rollout(count))
    for most in (0.05, 1.0):
        with pytest.raises(RunError, match=r"^none of the 16 images of a rollout has a score; r$"):
            Failures(most).note(3, rollout(16, a="r"))
    Failures(1.0).note(3, rollout(15))
    Failures(0.05).note(0, rollout(8))
    with pytest.raises(
        RunError, match="^9 of the 16 images of the last rollout have no score, 5.6"
    ):
        Failures(0.05).note(0, rollout(9))
    with pytest.raises(RunError, match="^1 of the 16 images of the last rollout has no"):
        Failures(0.0).note(0, rollout(1))


def test_a_remote_reward_that_became_another_between_stop_and_resume_is_refused(
    tiny, tmp_path, monkeypatch
):
    httpx = pytest.importorskip("httpx2")
    from flowkern.rewards.http import Http

    def loop(version, name="far", *overrides):
        one = {"version": version, "takes_group": False, "scales": {}, "default_scale": None}
        limits = {"images": 256, "max_bytes": 10**9}
        about = {"protocol": [1], "rewards": {"r": one}, "limits": limits}
        web = httpx.MockTransport(lambda request: httpx.Response(200, json=about))
        monkeypatch.setattr("flowkern.rewards.asking.Http", partial(Http, transport=web))
        reward = f"reward={{{name}: {{kind: remote, name: r, url: 'http://server:1'}}}}"
        return Loop(tiny(reward, "data.test_prompts=null", *overrides))

    begun, latest = loop("1"), "train.resume_from_checkpoint=latest"
    begun.begin()
    begun.checkpoint()
    begun.directory.release()
    said = "^reward.far: http://server:1: r is '2' now and was '1': scores of the two are not of o"
    changed = loop("2", "far", latest)
    with pytest.raises(ConfigError, match=said):
        changed.begin()
    changed.directory.release()
    for version, name in (("1", "far"), ("2", "another")):
        again = loop(version, name, latest)
        again.begin()
        again.directory.release()
    state = tmp_path / "run/checkpoint-0/state.pt"
    assert torch.load(state)["rewards"] == {"far": {"name": "r", "version": "1"}}


FORGETS = """
from flowkern.rewards import Unscored
calls, lost = [], {}
class Reward:
    overlaps = True
    def __call__(self, images, prompts, metadata):
        if len(images) == 3:
            raise Unscored("asleep")  # in every validation
        calls.append(len(images))
        count = lost.get(len(calls), 0)
        return [float("nan")] * count + [image.mean() for image in images[count:]]
"""


def test_a_run_stops_with_the_reason_and_goes_on_where_it_was(tiny, tmp_path, lines, monkeypatch):
    """Counted are rollouts from before the checkpoint, too. Its validations say what there is."""
    (tmp_path / "forgets.py").write_text(FORGETS)
    monkeypatch.syspath_prepend(tmp_path)
    import forgets

    def loop(lost, *overrides):
        """lost: by the number of a rollout of this process, how many images."""
        forgets.calls.clear()
        forgets.lost = lost
        own = "{kind: 'forgets:Reward', allow_nan: true}"
        reward = f"reward={{own: {own}, digits_judge: {{weight: 0}}}}"
        small = "algorithm.prompts_per_rollout=2", "validation.num_prompts=3"
        return Loop(tiny(reward, "train.checkpointing_steps=100", *small, *overrides))

    message = "step 3: 2 of the 24 images of the last 3 rollouts have no score, 2.5% of what 10"
    limit, latest = "train.max_failed_rewards=0.02", "train.resume_from_checkpoint=latest"
    with pytest.raises(RunError, match=rf"^{re.escape(message)}.*1 of 8.*continue with") as first:
        loop({2: 1, 3: 1}, limit).run()
    with pytest.raises(RunError) as again:
        loop({1: 1}, limit, latest).run()
    assert str(again.value) == str(first.value)
    assert loop({1: 1}, latest, "train.max_failed_rewards=0.2").run() == 0
    records = lines(tmp_path / "run/metrics.jsonl")
    assert [record["failed_rewards/own"] for record in records] == [0, 1, 1, 0]
    assert all(record["reward/digits_judge"] >= 0 for record in records)
    for record in lines(tmp_path / "run/validation.jsonl"):
        assert record["failed_rewards"] == record["failed_rewards/own"] == 3
        assert record["reward/mean"] is None and record["reward/digits_judge"] >= 0
    with pytest.raises(RunError, match="^none of the 8 images of a rollout has a score; rew"):
        loop({1: 8}, "train.overwrite_output_dir=true").step()
