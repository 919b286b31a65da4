"""What rewards are given and may return, and what becomes of those that do wrong."""

import asyncio
import copy
import csv
import io
import json
import signal
import sys
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("accelerate")
from flowkern.rewards import RewardError
from flowkern.rewards.pixels import as_bytes
from flowkern.rl.advantage import Credit
from flowkern.rollout import Plan
from flowkern.train import distributed
from flowkern.train.config import ConfigError, Rewards
from flowkern.train.distributed import together
from flowkern.train.errors import RunError
from flowkern.train.fields import build
from flowkern.train.prompts import read_prompts
from flowkern.train.reward_calls import Call, KeyedReward
from flowkern.train.scoring import Scores, load_rewards, score

KEY = "reward.mine:reward"
ASKED = [{"prompt": f"a {word}", "deep": {"tags": ["x"]}} for word in ("cat", "dog", "newt")]
IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def named(**functions):
    """Rewards by name, each counting with weight 1."""
    return {name: KeyedReward(f"reward.{name}", 1.0, f) for name, f in functions.items()}


def evaluate(rewards, images, prompts):
    """Scores by name, of one call each."""
    return {n: Call.of(reward, images, prompts).ask().scores for n, reward in rewards.items()}


def giving(value):
    return named(**{"mine:reward": lambda images, prompts, metadata: value})


def test_no_reward_spoils_what_the_next_one_sees():
    seen = []

    def vandal(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), [str(one) for one in metadata]))
        images.zero_()
        prompts.clear()
        for one in metadata:
            assert one["deep"]["tags"] == ["x"], "of this image alone"
            one["deep"]["tags"].append("y")
            one["prompt"] = None
        metadata.pop()
        return torch.zeros(3)

    buffer = torch.zeros(3, dtype=torch.float64)

    def recycler(images, prompts, metadata):
        return buffer.add_(1)

    mine, prompts = IMAGES.clone(), [ASKED[0], ASKED[0], ASKED[1]]  # siblings share one
    before = copy.deepcopy(prompts)
    found = [evaluate(named(a=vandal, b=recycler, c=vandal), mine, prompts) for _ in range(2)]
    assert len(seen) == 4 and all(str(each) == str(seen[0]) for each in seen)
    assert torch.equal(mine, IMAGES) and prompts == before
    assert found[0]["b"].tolist() == [1] * 3 and found[1]["b"].tolist() == [2] * 3, (
        "no memory of it"
    )


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 2], (1, 0, 2), np.array([1, 0, 2]), np.array([2, 0, 1], np.float16)[::-1],
        torch.tensor([1, 0, 2]), torch.tensor([1.0, 0, 2]),
        torch.tensor([1, 0, 2], dtype=torch.uint8),
        [torch.tensor(1.0), np.float32(0), Fraction(2)], [True, False, np.int64(2)],
        np.array([1, 0, 2], ">f8"), torch.tensor([1.0, 0, 2], requires_grad=True),
        torch.tensor([[1.0, 0, 2]] * 2)[0],
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)  # fmt: skip
def test_scores_of_any_real_kind_are_taken_in_float64(value):
    (found,) = evaluate(giving(value), IMAGES, ASKED).values()
    assert torch.equal(found, torch.tensor([1.0, 0, 2], dtype=torch.float64))
    assert not found.requires_grad


def test_large_scores_keep_what_tells_them_apart():
    signal = [0.01 * x + 1e6 for x in (1, 2, 3)]
    for value in (signal, np.array(signal), torch.tensor(signal, dtype=torch.float64)):
        assert score(giving(value), [(IMAGES, ASKED)]).rewards["mean"].tolist() == signal
    assert score(giving([2**53 - 1, 1, 2]), [(IMAGES, ASKED)]).rewards["mean"][0] == 2**53 - 1


async def later(images, prompts, metadata): ...


def hanging(images, prompts, metadata):
    while True:
        try:
            signal.pause()
        except Exception:
            pass


def leaving(images, prompts, metadata):
    sys.exit(0)


def test_images_leave_in_bytes_where_a_reward_takes_them():
    """What it would make of them itself; other rewards that overlap get them as they were drawn."""
    seen = {}

    class Far:
        overlaps = True

        def __init__(self, name, takes_bytes=False):
            self.name, self.takes_bytes = name, takes_bytes

        def __call__(self, images, prompts, metadata):
            seen[self.name] = images
            return as_bytes(images).double().mean((1, 2, 3))

    rewards = named(far=Far("far", True), own=Far("own"))
    found = score(rewards, [(IMAGES, ASKED)]).rewards
    assert seen["far"].dtype == torch.uint8 and torch.equal(seen["far"], as_bytes(IMAGES))
    assert torch.equal(seen["own"], IMAGES) and torch.equal(found["far"], found["own"])
    with pytest.raises(RewardError, match="^reward.far: ValueError: images: .* to 2, exp"):
        score(named(far=Far("far", True)), [(IMAGES / IMAGES.max() * 2, ASKED)])


def cancelled(images, prompts, metadata):
    raise asyncio.CancelledError  # no Exception, either


def failing(images, prompts, metadata):
    raise KeyError("two\nlines")


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "returned None"),
        ({"score": [1, 2, 3]}, "returned a dict"),
        ((x for x in (1, 2, 3)), "returned a generator"),
        ("abc", "returned a str"),
        (1.0, "returned a float"),
        ([1, 2], r"returned shape \(2,\)"),
        ([], r"returned shape \(0,\)"),
        (torch.ones(3, 1), r"returned shape \(3, 1\)"),
        (torch.tensor(1.0), r"returned shape \(\)"),
        (np.ones((1, 3)), r"returned shape \(1, 3\)"),
        ([1, 2, "3"], "returned '3' in place 2 of a list"),
        ([1, None, 3], "returned None in place 1 of a list"),
        ([1, 2j, 3], "returned 2j in place 1 of a list"),
        ([np.complex64(1), 2, 3], r"returned \(1\+0j\) in place 0"),
        ([[1], [2], [3]], r"returned \[1\] in place 0"),
        ([torch.ones(2)] * 3, "returned a Tensor with 2 elements"),
        ([10**400, 2, 3], "returned int too large"),
        (([1, 2, 3], None), r"returned \[1, 2, 3\] in place 0 of a tuple"),
        (([1, 2, 3], {}, {}), r"returned \[1, 2, 3\] in place 0 of a tuple"),
        (torch.ones(3) * 1j, r"returned a tensor of torch\.complex64"),
        (np.ones(3) * 1j, "returned an array of complex128"),
        (np.array(["1", "2", "3"]), "returned an array of <U1"),
        (np.array([1, None, 3]), "returned an array of object"),
        ((None, {}), "returned None"),
    ],
)
def test_what_is_no_score_per_image_is_refused_by_key(value, message):
    with pytest.raises(RewardError, match=f"^{KEY}: {message}.*; expected 3 real numbers") as stop:
        evaluate(giving(value), IMAGES, ASKED)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("function, message", [
    (leaving, r"SystemExit: 0 \(at test_scoring\.py:\d+\)$"),
    (cancelled, r"CancelledError: \(at test_scoring\.py:\d+\)$"),
    (failing, r"KeyError: .two\\nlines. \(at test_scoring\.py:\d+\)$"),
    (lambda images: 0, r"TypeError: .* takes 1 positional argument"),
])  # fmt: skip
def test_a_reward_that_raises_or_leaves_is_named(function, message):
    with pytest.raises(RewardError, match=f"^reward.f: {message}"):
        evaluate(named(f=function), IMAGES, ASKED)
    with pytest.raises(KeyboardInterrupt):  # not the reward's doing
        evaluate(named(f=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)), IMAGES, ASKED)


def test_a_reward_that_never_returns_is_named():
    """It catches what it can; the handler of signals is afterwards as it was."""
    before = signal.getsignal(signal.SIGALRM)
    late = {"f": KeyedReward("reward.f", 1.0, hanging, timeout=0.05)}
    with pytest.raises(RewardError, match=r"^reward.f: did not return within 0.05 s, its timeout$"):
        evaluate(late, IMAGES, ASKED)
    (made,) = load_rewards(build(Rewards, {"digits_judge": {"timeout": 60}})).values()
    assert made.timeout == 60
    in_time = {"f": KeyedReward("reward.f", 1.0, lambda *_: [1, 2, 3], made.timeout)}
    assert evaluate(in_time, IMAGES, ASKED)["f"].tolist() == [1, 2, 3]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e160])
def test_scores_that_are_not_finite_are_refused_with_the_image(bad):
    values = iter([[0, 1, 2], [0, bad, bad]])
    rewards = named(fine=lambda *_: [0, 0, 0], f=lambda *_: next(values))
    text = r"^reward.f: (-?inf|nan|1e\+160) for image 4 of 6, prompt 'a dog', and of 1 other"
    with pytest.raises(RewardError, match=text):
        score(rewards, [(IMAGES, ASKED), (IMAGES, ASKED)])
    large = {name: KeyedReward(name, 1e60, lambda *_: [1e100, 0, 0]) for name in "ab"}
    with pytest.raises(RewardError, match="reward: the weighted sum: 2e.160 for image 0"):
        score(large, [(IMAGES, ASKED)])


def test_images_that_are_no_numbers_are_not_the_rewards_fault():
    """A VAE that overflows, weights of NaN: a reward casts them to bytes and scores, or raises."""
    broken = IMAGES.clone()
    broken[1, 0, 0, 0] = float("nan")
    for function in (lambda *_: [0, 0, 0], lambda images, *_: 1 / 0):
        with pytest.raises(RewardError, match="^model: 1 of [36] images is not finite.* 'a dog'"):
            score(named(f=function), [(broken, ASKED), (IMAGES, ASKED)])


def test_what_a_reward_tells_beside_its_scores_is_reported_or_warned_of():
    batches = iter(
        [
            ([1, 2, 3], {"length": [4, 5, float("nan")], 7: np.ones(3, bool)}),
            (torch.ones(3), {"length": torch.tensor([9, 9, 9.0]), "why": ["red", "", "blue"]}),
            [0, 0, 0],
        ]
    )
    with pytest.warns(UserWarning, match=r"reward\.judge: info 'why' is not one real number"):
        found = score(named(judge=lambda *_: next(batches)), [(IMAGES, ASKED)] * 3)
    assert found.rewards["judge"].tolist() == [1, 2, 3, 1, 1, 1, 0, 0, 0]
    told = {"info/judge/length": 36 / 5, "info/judge/7": 1.0}
    assert found.means() == {"reward/mean": 1, "reward/judge": 1} | told
    unknown = score(named(a=lambda *_: ([0, 0, 0], {"x": [float("nan")] * 3})), [(IMAGES, ASKED)])
    assert unknown.means().keys() == {"reward/mean", "reward/a"}, "JSON has no NaN"


def test_scores_are_joined_in_order_with_what_some_lack():
    parts = [
        score(giving(value), [(IMAGES, ASKED)])
        for value in ([1, 2, 3], ([4, 5, 6], {"x": [7, 8, 9]}))
    ]
    joined = Scores.joined(parts).at(torch.tensor([5, 0]))
    assert joined.rewards["mean"].tolist() == [6, 1]
    assert joined.means()["info/mine:reward/x"] == 9


def test_one_ranks_failure_is_every_ranks(monkeypatch):
    there, sent = SimpleNamespace(num_processes=2), []
    monkeypatch.setattr(distributed, "gather_object", lambda mine: sent.extend(mine) or sent)

    def fails():
        raise RewardError("reward.a: gone")

    with pytest.raises(RewardError, match="^reward.a: gone"):
        together(there, fails)
    with pytest.raises(RunError, match="^process 0: reward.a: gone"):
        together(there, lambda: 3)  # what the first one sent is there already
    sent.clear()
    assert together(there, lambda: 3) == [3]


@pytest.mark.parametrize("name, message", [
    ("beauty", "got 'beauty', expected one of aesthetic.*; 'beauty' is not built in: "),
    ("digits_judg", "got 'digits_judg', expected .*; did you mean 'digits_judge'\\?$"),
    ("no_such_module:f", "got .* there is no module no_such_module"),
    ("math:no_such", "got 'math:no_such', but math has no 'no_such'"),
    ("math:pi", "'math:pi' is float, and cannot be called"),
    ("odd_rewards:later", "'odd_rewards:later' is asynchronous"),
    ("odd_rewards:Later", "'odd_rewards:Later' is asynchronous"),
    ("odd_rewards:Broken", r"ZeroDivisionError: division by zero \(at odd_rewards\.py:"),
    ("odd_rewards:Silent", "'odd_rewards:Silent' is Silent, and cannot be called"),
    ("leaving_rewards:f", "got .* raised SystemExit: 3"),
])  # fmt: skip
def test_rewards_that_cannot_be_made_are_named_by_key(tmp_path, monkeypatch, name, message):
    (tmp_path / "odd_rewards.py").write_text(
        "async def later(images, prompts, metadata): ...\n"
        "class Later:\n    async def __call__(self, images, prompts, metadata): ...\n"
        "class Broken:\n    def __init__(self): 1 / 0\n"
        "class Silent: ...\n"
    )
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    others = {"digits_judge": {"weight": 1.0}}
    with pytest.raises(ConfigError, match=f"^reward.{name}: {message}"):
        load_rewards(build(Rewards, others | {name: {"weight": 0}}))
    with pytest.raises(ConfigError, match=f"^reward.mine(.kind)?: {message}"):
        load_rewards(build(Rewards, others | {"mine": {"kind": name}}))


SERVED = """
class Served:
    def __init__(self, url: str, name, *, batch: int = 16):
        if batch < 1:
            raise ValueError(f"batch: got {batch}, expected at least 1")
        self.told = url, name, batch
    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)
class Named(Served):
    def __init__(self, name="its own", **others):
        self.told = name, others
def plain(images, prompts, metadata): ...
"""


def test_options_go_to_what_makes_the_reward(tmp_path, monkeypatch):
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.syspath_prepend(tmp_path)
    kind, tree = "served:Served", {"digits_judge": {"weight": 0}}
    tree |= {"a": {"kind": kind, "url": "u"}, "b": {"kind": kind, "url": "u", "name": "x"}}
    tree |= {"served:Named": {"size": 1}, "digits_classifier": {"kind": "served:plain"}}
    found = load_rewards(build(Rewards, tree))
    assert list(found) == list(tree) and [r.weight for r in found.values()] == [0, 1, 1, 1, 1]
    assert found["a"].reward.told == ("u", "a", 16), "a name that is required is the key"
    assert found["b"].reward.told == ("u", "x", 16)
    assert found["served:Named"].reward.told == ("its own", {"size": 1})
    assert found["digits_classifier"].reward.__name__ == "plain", "kind wins"
    for options, message in (
        ({"kind": kind}, "reward.a.url: missing, and has no default"),
        (
            {"kind": kind, "url": "u", "btach": 1},
            "btach: .* did you mean 'reward.a.batch'",
        ),
        (
            {"kind": kind, "url": "u", "zzz": 1},
            "reward.a.zzz: unknown key; known are weight, ",
        ),
        ({"kind": kind, "url": "u", "batch": 0}, "reward.a.batch: got 0, expected at least 1"),
        ({"kind": kind, "url": 3}, "reward.a.url: got 3, expected a string"),
        ({"kind": kind, "url": "u", "batch": True}, "batch: got True, expected a whole number"),
        (
            {"kind": "served:plain", "size": 1},
            "reward.a.size: .* a function takes no options: make it a class",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_rewards(build(Rewards, {"a": options}))


# ---- from a prompt file to advantages ----

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
PROMPTS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=3)
KINDS = {
    "list": list,
    "array": np.array,
    "tensor": lambda scores: torch.tensor(scores, dtype=torch.float64),
    "pair": lambda scores: (tuple(scores), {"as it is": scores}),
    "objects": lambda scores: [np.float64(score) for score in scores],
}
MEMBERS = 4


def write(path, prompts, mark, end):
    """A file of these prompts, as the path's suffix says; returns what it is to be read as."""
    kind = path.suffix.lower()
    if kind == ".txt":
        prompts = [text.replace("\n", " ").strip(" \t\r") for text in prompts]
        prompts = [text for text in prompts if text.strip()] or ["a prompt"]
        text = end.join(prompts)
    elif kind == ".csv":
        file = io.StringIO()
        table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end)
        table.writerows([["prompt", "n"], *([text, "1"] for text in prompts)])
        text = file.getvalue()
    else:
        lines = [json.dumps({"prompt": text}, ensure_ascii=mark == "") for text in prompts]
        text = f"[{','.join(lines)}]" if kind == ".json" else end.join(lines)
    path.write_bytes((mark + text).encode())
    return prompts


@settings(deadline=None, max_examples=30)
@given(
    PROMPTS,
    st.sampled_from(["a.txt", "a.TXT", "a.jsonl", "a.NDJSON", "a.json", "a.csv"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([0.0, 0.1, 1e6, -3e30]),
    st.sampled_from([0.0, 1e-9, 0.01, 1.0]),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_odd_prompts_and_odd_scores_become_the_advantages_they_should(
    prompts, name, mark, end, kind, level, scale, batch, seed
):
    with TemporaryDirectory() as directory:
        path = Path(directory) / name
        prompts = write(path, prompts, mark, end)
        asked = read_prompts(path)
    assert [one["prompt"] for one in asked] == prompts
    wanted = np.random.default_rng(seed).integers(-3, 4, (len(asked), MEMBERS))
    wanted = level + scale * wanted
    asked = [one for one in asked for _ in range(MEMBERS)]
    images = torch.arange(len(asked)).float()[:, None, None, None].expand(-1, 3, 1, 1)

    def reward(images, prompts, metadata):
        place = images[:, 0, 0, 0].long()
        assert prompts == [asked[i]["prompt"] for i in place] == [one["prompt"] for one in metadata]
        images.fill_(-1)
        return KINDS[kind](wanted.ravel()[place.numpy()].tolist())

    parts = [slice(i, i + batch) for i in range(0, len(asked), batch)]
    found = score(named(odd=reward), ((images[part], asked[part]) for part in parts)).rewards
    assert np.array_equal(found["odd"].numpy(), wanted.ravel())
    plan = Plan()
    for member in range(MEMBERS):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    scores, credit = {"odd": found["odd"].view(-1, MEMBERS)}, Credit()
    actual = credit(scores, {"odd": 2.0}, plan).numpy()
    difference = 2 * (wanted - wanted[:, :1])
    difference -= difference.mean(1, keepdims=True)
    std = difference.std(1, keepdims=True)
    is_flat = std[:, 0] < 1e-6
    expected = np.where(is_flat[:, None], 0, difference / (std + 1e-4))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    assert not actual[is_flat].any()
    assert credit.zero_std_ratio(scores, {"odd": 2.0}, plan) == is_flat.mean()
