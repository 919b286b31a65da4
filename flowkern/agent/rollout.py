"""Trajectories in waves: all that still run take their next turn together.

Whatever a planner, a tool or a model does becomes a failed step or an empty answer, and is counted:
a batch of trajectories is never lost to one of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, TypeVar

from flowkern.agent.engines import Engine, Generation, Sampling
from flowkern.agent.memory import Action, Memory, Query, Step
from flowkern.agent.system import System

Found = TypeVar("Found")
Reward = Callable[[str, Query], float | Awaitable[float]]
"""Of an answer."""


@dataclass(frozen=True)
class Turn:
    """What the planner said, token by token, and what it was read as."""

    generation: Generation
    text: str
    action: Action | None
    """None: the turn was malformed, or there was none."""

    @property
    def is_malformed(self) -> bool:
        return self.action is None and self.generation.finish != "failed"


@dataclass
class Trajectory:
    """One question worked on from a memory of its own."""

    query: Query
    member: int
    """Of its group."""
    memory: Memory
    turns: list[Turn] = field(default_factory=list)
    answer: str = ""
    ended: str = ""
    """Where: by its "verifier", or at "max_turns"."""
    failures: list[str] = field(default_factory=list)
    """What a verifier or a generator could not do, a line each; failed steps are in the memory."""
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flow:
    """What trajectories are made with, and their limits."""

    system: System
    engine: Engine
    tokenizer: Any
    """Of transformers."""
    max_turns: int
    max_prompt_tokens: int = 18_432
    """A turn whose prompt is longer is none; released as data.max_prompt_length."""
    concurrency: int = 64
    """Calls of executors, verifiers, generators and rewards at a time."""
    seconds: float = 500.0
    """For each of those calls; as the released limit of a trajectory."""


async def roll_out(
    flow: Flow,
    starts: Sequence[tuple[Query, int]],
    sampling: Sampling,
    seed: tuple[int, ...],
    passed: Callable[[int], object] = lambda turns: None,
) -> list[Trajectory]:
    """The trajectories of (query, member) pairs.

    Each is a function of its query, its member, `seed`, the weights, and what its tools say; not of
    the others. passed: told of turns, where one is over or is not needed any more: in the end of
    max_turns for each pair.
    """
    found = [Trajectory(query, member, Memory(query)) for query, member in starts]
    limit = asyncio.Semaphore(flow.concurrency)
    running = list(found)
    for turn in range(flow.max_turns):
        if not running:
            break
        await _planned(flow, running, sampling, [seed_of(*seed, t, turn) for t in running], turn)
        await asyncio.gather(*(_acted(flow, one, limit) for one in running))

        async def verified(one: Trajectory, left: int = flow.max_turns - turn) -> bool:
            is_done = await _verified(flow, one, limit)
            passed(left if is_done else 1)
            return is_done

        done = await asyncio.gather(*(verified(one) for one in running))
        for one, is_done in zip(running, done, strict=True):
            one.ended = "verifier" if is_done else "max_turns"
        running = [one for one, is_done in zip(running, done, strict=True) if not is_done]
    await asyncio.gather(*(_answered(flow, one, limit) for one in found))
    return found


def seed_of(seed: int, number: int, trajectory: Trajectory, turn: int) -> int:
    """63 bits for one turn: of a run's seed, the number of its rollout, and the trajectory."""
    name = f"{seed}/{number}/{trajectory.query.id}/{trajectory.member}/{turn}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


async def _planned(
    flow: Flow, running: Sequence[Trajectory], sampling: Sampling, seeds: Sequence[int], turn: int
) -> None:
    """The next turn of each, drawn and read."""
    left = flow.max_turns - turn
    prompts = encoded(flow.tokenizer, [flow.system.prompt(one.memory, left) for one in running])
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= flow.max_prompt_tokens]
    asked = [prompts[i] for i in fits], sampling, [seeds[i] for i in fits]
    drawn = await flow.engine.generate(*asked) if fits else []
    long = f"the prompt is longer than {flow.max_prompt_tokens} tokens"
    turns = [Generation.failed((), long) for _ in running]
    for i, one in zip(fits, drawn, strict=True):
        turns[i] = one
    texts = flow.tokenizer.batch_decode([one.ids for one in turns], skip_special_tokens=True)
    for trajectory, generation, text in zip(running, turns, texts, strict=True):
        said = read(generation, text, flow.system)
        action = said if isinstance(said, Action) else None
        trajectory.turns.append(Turn(generation, text, action))
        if action is None:
            trajectory.memory.add(Step.failed(said))


def read(generation: Generation, text: str, system: System) -> Action | str:
    """What a turn asks for, or in a line why it asks for nothing."""
    if generation.finish == "failed":
        return generation.failure or "there was no turn"
    if generation.finish == "length":
        return f"the turn did not end within {len(generation.ids)} tokens"
    return system.parse(text, system.tools.keys())


def encoded(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of texts as they are, and of chats through the tokenizer's template."""
    texts = [
        one
        if isinstance(one, str)
        else tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
        for one in prompts
    ]
    are_chats = any(not isinstance(one, str) for one in prompts)  # their template has all of it
    return tokenizer(texts, add_special_tokens=not are_chats)["input_ids"] if texts else []


async def _acted(flow: Flow, one: Trajectory, limit: asyncio.Semaphore) -> None:
    action = one.turns[-1].action
    if action is None:
        return
    step, failure = await guarded(
        lambda: flow.system.executor(one.memory, action, flow.system.tools), limit, flow.seconds
    )
    one.memory.add(step or Step.failed(f"executor: {failure}", action.tool, action.sub_goal))


async def _verified(flow: Flow, one: Trajectory, limit: asyncio.Semaphore) -> bool:
    """Does the trajectory end here? Not where the verifier cannot say."""
    found, failure = await guarded(lambda: flow.system.verifier(one.memory), limit, flow.seconds)
    if failure:
        one.failures.append(f"verifier: {failure}")
    return bool(found)


async def _answered(flow: Flow, one: Trajectory, limit: asyncio.Semaphore) -> None:
    found, failure = await guarded(lambda: flow.system.generator(one.memory), limit, flow.seconds)
    if failure:
        one.failures.append(f"generator: {failure}")
    one.answer = found or ""


async def guarded(
    call: Callable[[], Awaitable[Found]], limit: asyncio.Semaphore, seconds: float
) -> tuple[Found | None, str | None]:
    """What the call returns, or (None, in a line why it does not)."""
    async with limit:
        try:
            async with asyncio.timeout(seconds):
                return await call(), None
        except TimeoutError:
            return None, f"took more than {seconds:g} s"
        except Exception as error:
            return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


async def score(
    trajectories: Sequence[Trajectory],
    rewards: Mapping[str, Reward],
    concurrency: int = 64,
    seconds: float = 500.0,
) -> None:
    """Give each trajectory its rewards, by name. What one of them raises ends the run, and so does
    one that is awaited for longer than `seconds`: an answer that nobody could judge is neither
    right nor wrong."""
    limit = asyncio.Semaphore(concurrency)

    async def judged(one: Trajectory, name: str, reward: Reward) -> None:
        async with limit:
            value = reward(one.answer, one.query)
            if isawaitable(value):
                try:
                    async with asyncio.timeout(seconds) as time:
                        value = await value
                except TimeoutError:
                    if not time.expired():
                        raise
                    late = f"reward.{name}: did not return within {seconds:g} s, agent.seconds"
                    raise TimeoutError(late) from None
            one.rewards[name] = float(value)

    await asyncio.gather(*(judged(o, n, r) for o in trajectories for n, r in rewards.items()))
