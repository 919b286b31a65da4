"""What a run says of trajectories: counted where they were made, summed where they are reported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from flowkern.agent.rollout import Trajectory


@dataclass(frozen=True)
class Told:
    """What of a trajectory goes to the other ranks."""

    question: int
    kind: str
    reward: float
    """The weighted sum that is optimized."""
    rewards: Mapping[str, float]
    turns: int
    malformed: int
    """Turns that could not be read, and those without an end."""
    lost: int
    """Turns that were none: a server's failure, or a prompt that is too long."""
    calls: int
    failed: int
    """Of the calls of tools."""
    unanswered: int
    """What verifier and generator could not do."""
    prompt: int
    response: int
    """Tokens."""

    @classmethod
    def of(cls, one: Trajectory, weights: Mapping[str, float]) -> Told:
        pairs = list(zip(one.turns, one.memory.steps, strict=True))
        acted = [step for turn, step in pairs if turn.action is not None]
        return cls(
            question=one.query.id,
            kind=str(one.query.metadata.get("kind", "")),
            reward=sum(weight * one.rewards[name] for name, weight in weights.items()),
            rewards=one.rewards,
            turns=len(one.turns),
            malformed=sum(turn.is_malformed for turn in one.turns),
            lost=sum(turn.generation.finish == "failed" for turn in one.turns),
            calls=len(acted),
            failed=sum(step.failure is not None for step in acted),
            unanswered=len(one.failures),
            prompt=sum(len(turn.generation.prompt_ids) for turn in one.turns),
            response=sum(len(turn.generation.ids) for turn in one.turns),
        )


def figures(told: Sequence[Told], min_std: float) -> dict[str, float]:
    """Of a rollout."""
    groups = defaultdict(list)
    for one in told:
        groups[one.question].append(one.reward)
    spread = [pstdev(rewards) for rewards in groups.values()]
    flat = [std < max(min_std, 1e-300) for std in spread]
    return {
        "reward/mean": fmean(one.reward for one in told),
        **_rewards(told),
        "group_std": fmean(spread),
        "zero_std_ratio": fmean(flat),
        **_counts(told),
    }


def evaluated(sampled: Sequence[Told], greedy: Sequence[Told]) -> dict[str, float]:
    """Of an evaluation: success is the mean of what is optimized."""
    found = {"reward/mean": fmean(one.reward for one in sampled), **_rewards(sampled)}
    for name, told in {"eval/success": sampled, "eval/success_greedy": greedy}.items():
        found[name] = fmean(one.reward for one in told)
        kinds = sorted({one.kind for one in told if one.kind})
        for kind in kinds:
            found[f"{name}/{kind}"] = fmean(one.reward for one in told if one.kind == kind)
    counts = _counts(sampled)
    return found | {"eval/malformed": counts.pop("turns/malformed")} | counts


def _rewards(told: Sequence[Told]) -> dict[str, float]:
    return {f"reward/{name}": fmean(o.rewards[name] for o in told) for name in told[0].rewards}


def _counts(told: Sequence[Told]) -> dict[str, float]:
    turns = sum(one.turns for one in told)
    calls = sum(one.calls for one in told)
    return {
        "turns/mean": turns / len(told),
        "turns/malformed": sum(one.malformed for one in told) / turns,
        "turns/lost": sum(one.lost for one in told) / turns,
        "tool/failed": sum(one.failed for one in told) / max(1, calls),
        "unanswered": float(sum(one.unanswered for one in told)),
        "tokens/prompt": float(sum(one.prompt for one in told)),
        "tokens/response": float(sum(one.response for one in told)),
    }
