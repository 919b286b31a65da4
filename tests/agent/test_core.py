"""The core of an agent: memories, prompts, turns, trajectories in waves, credit, batches."""

import asyncio
from pathlib import Path

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from flowkern.agent.batch import TurnBatch
from flowkern.agent.credit import TurnCredit
from flowkern.agent.demo.blind import said
from flowkern.agent.demo.system import GENERATOR, executor, generator, parse, verifier
from flowkern.agent.engines import Generation, Sampling
from flowkern.agent.engines.transformers import TransformersEngine, draw
from flowkern.agent.memory import Action, Memory, Query, Step
from flowkern.agent.planner import parse as parse_lines
from flowkern.agent.policy import Policy
from flowkern.agent.prompts import Prompts
from flowkern.agent.rollout import Flow, Trajectory, roll_out, score
from flowkern.agent.system import System
from flowkern.agent.tools import Result
from flowkern.checks import ConfigError

PLANNER = Path(__file__).parents[2] / "assets/agent-demo/planner"
ABOUT = {"kind": "total", "catalogue": "blue", "items": ["pear", "lamp"], "numbers": []}
QUERY = Query("total price of pear and lamp", "59", 3, ABOUT)
VALUES = {"pear": 47, "lamp": 12}


@pytest.fixture(scope="module")
def language():
    model = AutoModelForCausalLM.from_pretrained(PLANNER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(PLANNER)


# ---- texts ----


def test_what_is_said_is_never_a_template(tmp_path):
    evil = "{{ 7 * 7 }} {0} {x!r} {% raw %} %s"
    memory = Memory(Query(evil, ""))
    memory.add(Step("search", evil, evil, evil))
    text = Prompts().render("planner", memory=memory, tools=[], turns_left=1)
    assert text.count(evil) == 4 and "49" not in text
    for template, message in {
        "{{ memory.__class__.__mro__ }}": "unsafe",
        "{{ nothing }}": "'nothing' is undefined",
        "{% for %}": "Expected",
        "{{ memory.steps.append(1) }}": "unsafe|not safely",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
        "{{ 'x' * 10**13 }}": "MemoryError",
    }.items():
        (tmp_path / "planner.jinja").write_text(template)
        with pytest.raises(ConfigError, match=f"agent.prompts: planner.jinja: .*({message})"):
            Prompts(tmp_path).render("planner", memory=memory)
    (tmp_path / "planner.jinja").write_text("{% include '/etc/passwd' %}")
    for name, lacks in {"../secret": "../secret.jinja", "planner": "/etc/passwd"}.items():
        with pytest.raises(ConfigError, match=f"agent.prompts: has no template {lacks}"):
            Prompts(tmp_path).render(name)
    with pytest.raises(ConfigError, match="agent.prompts: got .*expected a folder"):
        Prompts(tmp_path / "none")


GOOD = "Justification: x\n**Context:** a\nb\nSub-Goal: do it\nTool Name: `Web Search`\n"


@pytest.mark.parametrize(
    "text, found",
    [
        (GOOD, Action("web_search", "do it", "a\nb")),
        (GOOD.upper(), Action("web_search", "DO IT", "A\nB")),
        (f"Tool: calculator\n{GOOD}", Action("web_search", "do it", "a\nb")),
        (GOOD.replace("Web Search", "search"), "there is no tool '`search`'; there are calc"),
        (GOOD.replace("Sub-Goal", "Goal"), "the turn has no line 'Sub-Goal:'"),
        ("", "the turn has no line 'Context:'"),
        ("Context:" * 10**5, "the turn has no line 'Sub-Goal:'"),
    ],
)
def test_a_turn_is_read_or_said_to_be_none(text, found):
    read = parse_lines(text, ["calculator", "web_search"])
    assert read == found if isinstance(found, Action) else read.startswith(found)


# ---- the engine ----


def test_the_engine_draws_what_generate_draws_and_what_the_policy_says(language):
    model, tokenizer = language
    texts = ["question total price of pear and lamp turn", "question weight of 7 vase turn"]
    prompts = tokenizer([texts[0], texts[1], texts[0], texts[0]])["input_ids"]
    stops = frozenset([tokenizer.eos_token_id])
    engine = TransformersEngine({}, model=model)
    greedy = asyncio.run(engine.generate(prompts, Sampling(0.0, 1.0, 16, stops), [0] * 4))
    for prompt, one in zip(prompts, greedy, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert one.ids == theirs[0, len(prompt) :].tolist() and one.finish == "stop"
    assert engine.calls == 2 + 4 * (len(greedy[0].ids) - 1), "equal prompts are prefilled once"

    sampling, seeds = Sampling(1.3, 1.0, 12, stops), [11, 12, 13, 14]
    together = asyncio.run(engine.generate(prompts, sampling, seeds))
    alone = TransformersEngine({"max_batch": 1}, model=model)
    apart = asyncio.run(alone.generate(prompts, sampling, seeds))
    assert [one.ids for one in together] == [one.ids for one in apart]
    assert len({tuple(one.ids) for one in together}) > 2, "equal prompts, other seeds"
    policy = Policy(model)
    for one in together:
        turns = TurnBatch((torch.tensor([*one.prompt_ids, *one.ids]),), *_row(one))
        ours = policy.log_prob(turns.padded(torch.tensor([0])), 1.3)
        torch.testing.assert_close(ours, torch.tensor(one.log_probs), atol=2e-5, rtol=0)
    (cut,) = asyncio.run(engine.generate(prompts[:1], Sampling(0.0, 1.0, 3, stops), [0]))
    assert cut.finish == "length" and cut.ids == greedy[0].ids[:3]


def _row(one):
    return torch.tensor([len(one.prompt_ids)]), torch.tensor([0]), torch.tensor(one.log_probs)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds = torch.arange(20_000)
    logits = p.log().expand(len(seeds), 4)
    token, log_p = draw(logits, Sampling(), seeds, 3)
    counts = torch.bincount(token, minlength=4) / len(seeds)
    assert (counts - p).abs().max() < 4 * 0.5 / len(seeds) ** 0.5
    torch.testing.assert_close(log_p, p.log()[token])
    token, log_p = draw(logits, Sampling(top_p=0.7), seeds, 3)
    assert set(token.tolist()) == {0, 1}
    torch.testing.assert_close(log_p, (p / 0.8).log()[token])
    certain = torch.full((9, 4), -1e4).index_fill_(1, torch.tensor([3]), 0.0)
    assert draw(certain, Sampling(), seeds[:9], 0)[0].tolist() == [3] * 9


# ---- trajectories ----

PLAN = [
    Action("search", "price", "item 1"),
    Action("search", "price", "item 2"),
    Action("calculator", "plus", "step 1 step 2"),
    Action(GENERATOR, "answer", "step 3"),
]


class Spoken:
    """An engine that says what it is told, turn by turn: a text, or a failed generation."""

    calls, is_exact, facts = 0, True, ()

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.asked = tokenizer, list(turns), []

    async def generate(self, prompts, sampling, seeds):
        self.asked.append(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))
        turn = self.turns[min(len(self.asked), len(self.turns)) - 1]
        if isinstance(turn, Generation):
            return [turn for _ in prompts]
        ids = self.tokenizer(f"{turn} <eos>", add_special_tokens=False)["input_ids"]
        return [Generation(list(prompt), ids, [0.0] * len(ids), "stop") for prompt in prompts]


async def search(query):
    *_, item = query.split()
    return Result(f"one {item} is {VALUES[item]}.", None, 0.0)


async def calculator(expression):
    a, _, b = expression.split()
    return Result(str(int(a) + int(b)), None, 0.0)


def walk(language, *turns, query=QUERY, count=1, seconds=5.0, **changed):
    parts = {"executor": executor, "verifier": verifier, "generator": generator, "parse": parse}
    tools = {"search": search, "calculator": calculator, GENERATOR: None}
    render = Prompts().render
    prompt = lambda memory, left: render("demo", memory=memory, turns_left=left)  # noqa: E731
    system = System(tools=changed.pop("tools", tools), prompt=prompt, **parts | changed)
    engine = Spoken(language[1], *turns)
    flow = Flow(system, engine, language[1], max_turns=5, seconds=seconds)
    found = asyncio.run(roll_out(flow, [(query, i) for i in range(count)], Sampling(), (0, 0)))
    asyncio.run(score(found, {"exact": lambda answer, query: answer == query.answer}))
    return found, engine


def test_a_reward_that_never_returns_ends_the_run():
    async def hanging(answer, query):
        await asyncio.Event().wait()

    late = score([Trajectory(QUERY, 0, Memory(QUERY))], {"mine": hanging}, seconds=0.01)
    with pytest.raises(TimeoutError, match="^reward.mine: did not return within 0.01 s, agent.sec"):
        asyncio.run(late)


def test_a_question_is_answered_in_turns_from_a_memory_of_its_own(language):
    (one, two), engine = walk(language, *map(said, PLAN), count=2)
    assert one.answer == "59" and one.rewards == {"exact": 1.0} and one.ended == "verifier"
    assert [step.result for step in one.memory.steps] == ["47", "12", "59", "59"]
    assert one.memory.steps is not two.memory.steps
    assert engine.asked[0] == ["question total price of pear and lamp turn"] * 2
    assert engine.asked[2][1].endswith("step 2 search price result 1 2 turn")


async def _raises(*_):
    raise RuntimeError("is\ndown")


async def _hangs(*_):
    await asyncio.sleep(60)


LOST = Generation.failed([], "the server hung up")
ENDLESS = Generation([5], [7] * 16, [0.0] * 16, "length")


@pytest.mark.parametrize(
    "turns, changed, reason",
    [
        (["turn turn"], {}, "the turn is not of the form"),
        (["context item 1 goal price tool sum"], {}, "there is no tool sum"),
        ([ENDLESS], {}, "the turn did not end within 16 tokens"),
        ([LOST], {}, "the server hung up"),
        (["context item 3 goal price tool search"], {}, "there is no item 3"),
        (["context step 1 goal answer tool generator"], {}, "there is no step 1"),
        ([said(PLAN[0])], {"executor": _raises}, "executor: RuntimeError: is down"),
        ([said(PLAN[0])], {"executor": _hangs, "seconds": 0.05}, "executor: took more than 0.05 s"),
    ],
)
def test_what_goes_wrong_in_a_turn_is_a_failed_step(language, turns, changed, reason):
    """Until the last turn there is; the next prompt says so."""
    changed = dict(changed)
    seconds = changed.pop("seconds", 5.0)
    found, engine = walk(language, *turns, count=2, seconds=seconds, **changed)
    for one in found:
        assert one.ended == "max_turns" and len(one.memory.steps) == 5 == len(one.turns)
        assert one.memory.steps[0].failure.startswith(reason)
        assert one.answer == "" and one.rewards == {"exact": 0.0} and not one.failures
    assert "failed" in engine.asked[1][0]


def test_a_verifier_or_generator_that_is_down_is_counted_and_the_batch_survives(language):
    (one,), _ = walk(language, *map(said, PLAN), verifier=_raises)
    assert one.ended == "max_turns" and one.failures == ["verifier: RuntimeError: is down"] * 5
    (one,), _ = walk(language, *map(said, PLAN), generator=_raises)
    assert one.answer == "" and one.failures == ["generator: RuntimeError: is down"]


def test_a_prompt_that_is_too_long_is_no_turn(language):
    query = Query("pear " * 20_000, "", 0, ABOUT)
    (one,), engine = walk(language, said(PLAN[0]), query=query)
    assert one.memory.steps[0].failure == "the prompt is longer than 18432 tokens"
    assert not engine.asked and not one.turns[0].generation.ids


# ---- credit and batches ----


def test_groups_of_rows_count_turns_and_groups_of_trajectories_do_not():
    """Two successes of one turn, six failures of three: the released code's numbers."""
    reward = torch.tensor([1.0, 1.0, *[0.0] * 6], dtype=torch.float64)
    trajectory = torch.tensor([0, 1, *[i for i in range(2, 8) for _ in range(3)]])
    group = torch.zeros(8, dtype=torch.int64)
    verl = {"unbiased": True, "eps": 1e-6}
    by_row = TurnCredit("row", **verl)(reward, group, trajectory)
    torch.testing.assert_close(
        by_row[[0, 2]], torch.tensor([2.9240, -0.3249]).double(), atol=2e-4, rtol=0
    )
    by_trajectory = TurnCredit(**verl)(reward, group, trajectory)
    expected = torch.tensor([1.6202, -0.5401]).double()
    torch.testing.assert_close(by_trajectory[[0, 2]], expected, atol=2e-4, rtol=0)
    final = TurnCredit(turns="final", **verl)(reward, group, trajectory)
    assert (final != 0).sum() == 8 and (final[[0, 4]] == by_trajectory[[0, 4]]).all()
    assert not TurnCredit()(torch.ones(8), group, trajectory).any()


def test_rows_of_one_length_go_together_and_each_token_knows_its_place(language):
    (one,), _ = walk(language, *map(said, PLAN))
    (two,), _ = walk(language, "turn")
    turns = TurnBatch.of([one, two])
    assert len(turns) == 9 and turns.trajectory.tolist() == [0] * 4 + [1] * 5
    lengths = [len(ids) for ids in turns.ids]
    chunks = turns.chunks(torch.arange(9), 2)
    assert sorted(torch.cat(chunks).tolist()) == list(range(9))
    assert [lengths[i] for i in torch.cat(chunks)] == sorted(lengths)
    seen = []
    for rows in chunks:
        padded = turns.padded(rows)
        seen += padded.token.tolist()
        for row, place, target, token in zip(*padded[1:], strict=True):
            ids = turns.ids[rows[row]]
            assert target == ids[place + 1] and place + 1 >= turns.prompt[rows[row]]
            assert turns.row[token] == rows[row]
    assert sorted(seen) == list(range(len(turns.sample_log_prob)))
