"""AgentFlow: a planner that is trained in the flow of its own turns (arXiv 2510.05592).

Every turn the planner says what to do next, an executor does it with a tool, the memory gains a
step, and a verifier says whether that is enough; a generator then answers. The planner alone is
trained, on every turn of a trajectory, with the reward of its answer.

    query, memory -> planner -> Action -> executor -> Step -> verifier -> ... -> generator -> answer
"""

from __future__ import annotations

from flowkern.lookup import lazily

_HOMES = {
    **dict.fromkeys(("Action", "Memory", "Query", "Step"), "flowkern.agent.memory"),
    **dict.fromkeys(("System", "SYSTEMS", "load_system"), "flowkern.agent.system"),
    **dict.fromkeys(("Engine", "Generation", "Sampling"), "flowkern.agent.engines"),
    **dict.fromkeys(("Trajectory", "Turn", "roll_out"), "flowkern.agent.rollout"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
