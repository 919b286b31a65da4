"""Executor, verifier and generator as calls of a language model; none of them is trained.

A model that is down, or says what cannot be read, becomes a failed step or a FailedCall, of a line:
`roll_out` counts it and goes on. What the executor's model writes is the arguments of a tool, as
JSON that the tool checks against its schema, and is never run.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowkern.agent import planner
from flowkern.agent.clients import FailedCall, TextClient
from flowkern.agent.memory import Action, Memory, Query, Step
from flowkern.agent.prompts import Prompts
from flowkern.agent.system import System, load_tools
from flowkern.agent.tools import Tool
from flowkern.checks import ConfigError, shown
from flowkern.lookup import nearest

MODULES = ("executor", "verifier", "generator")
CLIENT = ("base_url", "model", "token_env", "temperature", "top_p", "max_tokens", "patience")
LONGEST = 20_000  # characters of an answer that are looked at


@dataclass(frozen=True)
class Module:
    """A template, and the model that is asked with it."""

    client: TextClient
    prompts: Prompts

    async def ask(self, **values: Any) -> str:
        return await self.client(self.prompts.render(type(self).__name__.lower(), **values))


class Executor(Module):
    """Asks for the arguments of one call of the tool that the planner chose, and calls it."""

    async def __call__(self, memory: Memory, action: Action, tools: Mapping[str, Tool]) -> Step:
        tool = tools[action.tool]
        schema = json.dumps(tool.schema, ensure_ascii=False)
        try:
            said = await self.ask(memory=memory, action=action, tool=tool, schema=schema)
            arguments = arguments_in(said, tool.schema)
        except FailedCall as error:
            return Step.failed(f"executor: {error}", action.tool, action.sub_goal)
        command = json.dumps(arguments, ensure_ascii=False)
        result = await tool(**arguments)
        return Step(action.tool, action.sub_goal, command, result.text, result.failure)


class Verifier(Module):
    """Asks whether the memory is enough: True is stop."""

    async def __call__(self, memory: Memory) -> bool:
        """Raises FailedCall where the model cannot be asked, or says neither."""
        return is_enough(await self.ask(memory=memory))


class Generator(Module):
    """Asks for the answer to the question, from the memory."""

    async def __call__(self, memory: Memory) -> str:
        """Raises FailedCall where the model cannot be asked, or says nothing."""
        return answer_in(await self.ask(memory=memory))


def arguments_in(said: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The last JSON object of a text, with or without prose and markdown around it; of one that
    names the tool too, its "arguments". Raises FailedCall where there is none.
    """
    said, found, at = said[:LONGEST], None, 0
    decode = json.JSONDecoder().raw_decode
    while (at := said.find("{", at)) >= 0:
        try:
            found, at = decode(said, at)
        except ValueError:
            at += 1
        except RecursionError:
            break
    if not isinstance(found, dict):
        raise FailedCall("its answer has no JSON object with the tool's arguments")
    known = schema.get("properties", {})
    for inner in ("arguments", "parameters"):
        if inner not in known and isinstance(found.get(inner), dict):
            return found[inner]
    return found


_MARKS = r"[\s*_`#>'\"()-]*+"
_BEFORE = r"[ \t\r\xa0*_`#>'\"()-]*+"  # in its line: else each empty line looks through all others
_CONCLUSION = re.compile(rf"conclusion{_MARKS}:{_MARKS}(stop|continue)(?![a-z])", re.IGNORECASE)
_WORD = re.compile(r"\b(STOP|CONTINUE)\b")
_ANSWER = re.compile(rf"^{_BEFORE}(?:final\s+)?answer{_MARKS}:", re.IGNORECASE | re.MULTILINE)


def is_enough(said: str) -> bool:
    """Does a verifier's text say STOP? Its last "Conclusion:" counts, whatever markdown is around
    it; without one, the words STOP and CONTINUE in capitals, if it has only one of them. Raises
    FailedCall where it says neither.
    """
    said = said[-LONGEST:]
    *_, last = [None, *_CONCLUSION.finditer(said)]
    if last is not None:
        return last[1].casefold() == "stop"
    words = set(_WORD.findall(said))
    if len(words) != 1:
        raise FailedCall("it said neither STOP nor CONTINUE" if not words else "it said both")
    return words == {"STOP"}


def answer_in(said: str) -> str:
    """What follows the last "Answer:" that begins a line, or all of it. Raises FailedCall where
    there is nothing."""
    said = said[-LONGEST:]
    *_, last = [None, *_ANSWER.finditer(said)]
    answer = said if last is None else said[last.end() :]
    answer = answer.strip("*_` \t\r\n")
    if not answer:
        raise FailedCall("it gave no answer")
    return answer


def system(
    options: Mapping[str, Any], tools: Mapping[str, Any], prompts: str | None = None
) -> System:
    """The agent around a planner whose other modules are language models (`agent.system: llm`).

    options: `agent.modules`: base_url, model, token_env, temperature, top_p, max_tokens, patience,
    as `TextClient` takes them; under executor, verifier and generator those that differ for one.
    tools: `agent.tools`; prompts: a folder of templates of one's own. Raises ConfigError naming the
    key, and where a model does not answer.
    """
    clients = {name: _client(options, name) for name in MODULES}
    texts = Prompts(prompts)
    made = load_tools(tools, client=clients["executor"])
    modules = [
        kind(clients[kind.__name__.lower()], texts) for kind in (Executor, Verifier, Generator)
    ]

    def prompt(memory: Memory, turns_left: int) -> list[dict[str, str]]:
        tools = list(made.values())
        text = texts.render("planner", memory=memory, tools=tools, turns_left=turns_left)
        return [{"role": "user", "content": text}]

    _tried(texts, prompt, made)
    asyncio.run(_answer(clients))
    return System(made, prompt, planner.parse, *modules)


def _tried(texts: Prompts, prompt: Any, tools: Mapping[str, Tool]) -> None:
    """Each template once, so that a fault in one is said before the run begins."""
    memory = Memory(Query("q", "a"), [Step("t", "s", "c", "r")])
    prompt(memory, 1)
    for tool in tools.values():
        texts.render(
            "executor", memory=memory, action=Action("t", "s", "c"), tool=tool, schema="{}"
        )
    for name in ("verifier", "generator"):
        texts.render(name, memory=memory)


async def _answer(clients: Mapping[str, TextClient]) -> None:
    """Each once: a run whose modules are down would be one of failed steps."""
    for name, client in clients.items():
        try:
            await client("Say yes.")
        except FailedCall as error:
            raise ConfigError(f"agent.modules: the {name} does not answer: {error}") from error


def _client(options: Mapping[str, Any], name: str) -> TextClient:
    own = options.get(name) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"agent.modules.{name}: got {shown(own)}, expected a mapping")
    for place, given in (("agent.modules", options), (f"agent.modules.{name}", own)):
        known = (*CLIENT, *MODULES) if given is options else CLIENT
        for key in given:
            if key not in known:
                near = nearest(str(key), known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"{place}.{key}: unknown key; {hint}")
    given = {k: v for k, v in {**options, **own}.items() if k in CLIENT}
    for key in ("base_url", "model"):
        if not given.get(key):
            raise ConfigError(
                f"agent.modules.{key}: missing; executor, verifier and generator are a language "
                "model on a server of yours"
            )
    try:
        return TextClient(**given)
    except ConfigError as error:
        raise ConfigError(f"agent.modules.{error}") from error
