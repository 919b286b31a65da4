"""Executor, verifier and generator as a language model that says whatever a test has it say."""

import asyncio
import contextlib
import json
import time

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'flowkern[agent]'")
import servers

from flowkern.agent.answers import number_in, verdict_in
from flowkern.agent.clients import FailedCall
from flowkern.agent.engines import Generation, Sampling
from flowkern.agent.memory import Action, Memory, Query, Step
from flowkern.agent.modules import answer_in, arguments_in, is_enough, system
from flowkern.agent.planner import parse
from flowkern.agent.rollout import Flow, roll_out, score
from flowkern.agent.tools import tool
from flowkern.checks import ConfigError

QUICK = {"timeout_s": 20, "deadline_s": 60, "retries": 0, "backoff_s": 0}
TRICK = "{{ 7 * 7 }} {0} %s {% raw %}"


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


def said(text):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


class Model(servers.Server):
    """Says `text`, whatever it is asked."""

    def __init__(self):
        super().__init__({"/v1/chat/completions": lambda _: said(self.text)})
        self.text = "yes"

    @property
    def asked(self):
        return json.loads(self.requests[-1].body)["messages"][-1]["content"]


@pytest.fixture
def model():
    with Model() as model:
        yield model


@pytest.fixture
def agent(model):
    options = {"base_url": f"{model.url}/v1", "model": "tiny", "patience": QUICK}
    return system(options, {"calculator": {}})


def memory():
    found = Memory(Query(f"How much is it? {TRICK}", "5"))
    found.add(Step("search", "find", '{"query": "x"}', f"a result {TRICK}"))
    return found


ACTION = Action("add", f"add them {TRICK}", "2 and 3")
TOOLS = {"add": tool(add)}


def executed(agent):
    return asyncio.run(agent.executor(memory(), ACTION, TOOLS))


def test_executor(model, agent):
    model.text = 'I would call it with\n```json\n{"a": 2, "b": 3}\n```\nas said.'
    step = executed(agent)
    assert step == Step("add", ACTION.sub_goal, '{"a": 2, "b": 3}', "5")
    for text in (TRICK, ACTION.context, "Adds.", '"integer"', "a result"):
        assert text in model.asked


@pytest.mark.parametrize(
    ("text", "command", "failure"),
    [
        ("execution = tool.execute(a=2, b=3)", "", "executor: .*no JSON object"),
        ("__import__('os').system('touch HERE')", "", "executor: .*no JSON object"),
        ("[2, 3]", "", "executor: .*no JSON object"),
        ('{"a": 2', "", "executor: .*no JSON object"),
        ("{" * 20_000, "", "executor: .*no JSON object"),
        ('{"a":' * 10_000, "", "executor: .*no JSON object"),
        ('{"a": 2}', '{"a": 2}', "b"),
        ('{"a": "two", "b": 3}', '{"a": "two", "b": 3}', "a"),
        ('{"a": 2, "b": 3, "c": 4}', '{"a": 2, "b": 3, "c": 4}', "c"),
    ],
)
def test_executor_that_says_no_arguments(
    model, agent, tmp_path, monkeypatch, text, command, failure
):
    """A failed step, with the reason in the planner's sight; nothing that it says is run."""
    monkeypatch.chdir(tmp_path)
    model.text = text
    step = executed(agent)
    with pytest.raises(AssertionError, match=failure):
        raise AssertionError(step.failure)
    assert (step.tool, step.sub_goal, step.command) == ("add", ACTION.sub_goal, command)
    assert step.failure in step.result and "\n" not in step.failure
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "add", "arguments": {"a": 1, "b": 2}}', {"a": 1, "b": 2}),
        ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', {"a": 1}),
        (
            'First {"a": 0, "b": 0} is wrong; {"a": 1, "b": {"c": "}"}} is right.',
            {"a": 1, "b": {"c": "}"}},
        ),
        ("{}", {}),
    ],
)
def test_arguments(text, found):
    schema = {"properties": {"a": {}, "b": {}}}
    assert arguments_in(text, schema) == found
    own = {"properties": {"arguments": {}, "name": {}, "parameters": {}}}
    assert arguments_in('{"arguments": {"a": 1}}', own) == {"arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("All is there.\nConclusion: STOP", True),
        ("conclusion: continue", False),
        ("**Conclusion:** `STOP`", True),
        ("### Conclusion\n**Conclusion**: **CONTINUE**.", False),
        ("> _Conclusion: Stop_", True),
        ("It must not STOP before it is checked.\n\nConclusion: CONTINUE", False),
        ("Conclusion: CONTINUE\nOn second thoughts it is enough.\nConclusion: STOP.", True),
        ("STOP", True),
        ("I say **CONTINUE**", False),
        ("One could stop, but CONTINUE", False),
    ],
)
def test_verifier(model, agent, text, stops):
    model.text = text
    assert asyncio.run(agent.verifier(memory())) is stops is is_enough(text)
    assert TRICK in model.asked


@pytest.mark.parametrize("text", ["perhaps", "", "STOP or CONTINUE?", "a non-STOPping matter"])
def test_verifier_that_says_neither(text):
    if text == "a non-STOPping matter":
        text = "NONSTOP"
    with pytest.raises(FailedCall, match=r"^it said (neither STOP nor CONTINUE|both)$"):
        is_enough(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 and 3 are 5.\nAnswer: 5", "5"),
        ("**Final Answer:** **5**", "5"),
        ("Answer: 4\nNo.\n- answer: `5`", "5"),
        ("5", "5"),
        ("The answer: it depends", "The answer: it depends"),
        ("Answer:\n\\boxed{5}", "\\boxed{5}"),
    ],
)
def test_generator(model, agent, text, answer):
    model.text = text
    assert asyncio.run(agent.generator(memory())) == answer == answer_in(text)
    assert TRICK in model.asked


@pytest.mark.parametrize("text", ["", "  ", "Answer: ", "Answer: **"])
def test_generator_that_gives_no_answer(text):
    with pytest.raises(FailedCall, match="gave no answer"):
        answer_in(text)


def test_a_model_that_is_down(model, agent):
    """The step fails; verifier and generator say why, and a rollout counts it."""
    model.faults.extend([servers.BROKEN] * 3)
    step = executed(agent)
    assert step.failure.startswith("executor: tiny at ") and "answered 500" in step.failure
    for module in (agent.verifier, agent.generator):
        with pytest.raises(FailedCall, match="answered 500"):
            asyncio.run(module(memory()))


class Planner:
    """Engine and tokenizer of a planner that always says the same."""

    said = "Context: 2 + 3\nSub-Goal: add\nTool Name: calculator"

    async def generate(self, prompts, sampling, seeds):
        return [Generation(list(prompt), [1], [-1.0], "stop") for prompt in prompts]

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, texts, **_):
        return {"input_ids": [[1] for _ in texts]}

    def batch_decode(self, rows, **_):
        return [self.said for _ in rows]


@pytest.mark.parametrize("down", [False, True])
def test_a_rollout_whose_models_are_down_has_its_trajectories_and_rewards(model, agent, down):
    """Failed steps to T_max and an empty answer, each counted; the batch survives."""
    model.text = 'Conclusion: STOP\nAnswer: {"expression": "2 + 3"}'
    if down:
        model.routes["/v1/chat/completions"] = lambda _: servers.Answer(b"down", 503)
    flow = Flow(agent, Planner(), Planner(), max_turns=2)
    starts = [(Query("2 + 3?", "5", number), member) for number in (0, 1) for member in (0, 1)]

    async def made():
        found = await roll_out(flow, starts, Sampling(), (0, 0))
        await score(found, {"is_json": lambda answer, query: float(answer.startswith("{"))})
        return found

    for one in asyncio.run(made()):
        assert one.rewards == {"is_json": 0.0 if down else 1.0}
        assert len(one.turns) == len(one.memory.steps) == (2 if down else 1)
        if down:
            assert (one.ended, one.answer) == ("max_turns", "")
            assert all("answered 503" in step.failure for step in one.memory.steps)
            assert [text.split(":")[0] for text in one.failures] == ["verifier"] * 2 + ["generator"]
        else:
            assert (one.ended, one.failures) == ("verifier", [])
            assert one.memory.steps[0].result == "5"


def test_the_planner_is_asked_with_what_there_is(agent):
    (message,) = agent.prompt(memory(), 2)
    assert message["role"] == "user" and message["content"].count(TRICK) == 2
    assert "calculator" in message["content"] and "included: 2." in message["content"]


def test_options_of_one_module(model):
    own = {"verifier": {"model": "small", "temperature": 0.5}}
    options = {"base_url": f"{model.url}/v1", "model": "tiny", "patience": QUICK, **own}
    agent = system(options, {})
    model.text = "Conclusion: STOP"
    asyncio.run(agent.verifier(memory()))
    asyncio.run(agent.generator(memory()))
    sent = [json.loads(request.body) for request in model.requests[-2:]]
    assert [(s["model"], s["temperature"]) for s in sent] == [("small", 0.5), ("tiny", 0.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": None}, r"agent\.modules\.base_url: missing; executor, verifier and gen"),
        ({"model": None}, r"agent\.modules\.model: missing"),
        ({"base_url": "here"}, r"agent\.modules\.base_url: got 'here', expected http://"),
        ({"modle": "x"}, r"agent\.modules\.modle: unknown key; did you mean 'model'"),
        ({"verifier": {"verifier": {}}}, r"agent\.modules\.verifier\.verifier: unknown key"),
        ({"verifier": "small"}, r"agent\.modules\.verifier: got 'small', expected a mapping"),
        ({"token_env": "NOT_SET"}, r"agent\.modules\.token_env: the environment variable NOT_SET"),
        ({"patience": {"retries": -1}}, r"agent\.modules\.patience\.retries: got -1"),
        (
            {"temperature": "hot"},
            r"agent\.modules\.temperature: expected a number .*'hot'",
        ),
        ({"base_url": "http://127.0.0.1:9"}, "agent.modules: the executor does not answer: .*conn"),
    ],
)
def test_refused(model, options, message):
    given = {"base_url": f"{model.url}/v1", "model": "tiny", "patience": QUICK, **options}
    with pytest.raises(ConfigError, match=message) as caught:
        system(given, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["planner", "executor", "verifier", "generator"])
def test_a_template_of_ones_own_is_tried_at_the_start(model, tmp_path, name):
    options = {"base_url": f"{model.url}/v1", "model": "tiny", "patience": QUICK}
    (tmp_path / f"{name}.jinja").write_text("{{ memory.query.txt }}")
    with pytest.raises(ConfigError, match=rf"agent\.prompts: {name}\.jinja: .*txt"):
        system(options, {"calculator": {}}, str(tmp_path))


READERS = {
    "a planner's turn": lambda said: parse(said, ["search"]),
    "a verifier's word": is_enough,
    "an answer": answer_in,
    "a number": number_in,
    "a verdict": verdict_in,
}


@pytest.mark.parametrize("unit", ["\n", "\r\n", "\n**", "True*", "answer ", "{", "1,"], ids=repr)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_text_is_slow_to_read(read, unit):
    """Empty lines without end once took half a minute, in which no limit of time held."""
    begun = time.process_time()
    with contextlib.suppress(FailedCall):
        read("True\n" + unit * (20_000 // len(unit)))
    assert time.process_time() - begun < 1
