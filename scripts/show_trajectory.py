"""Work on one held-out question with the planner of a run, and show it turn by turn: the tokens
that it drew, with their probabilities, what was done, and what the memory gained. As Markdown.

    python scripts/show_trajectory.py runs/agent/demo [--checkpoint latest] [--question 1]
"""

import argparse
from math import exp
from pathlib import Path

from flowkern.agent.engines import Sampling
from flowkern.checks import ConfigError
from flowkern.train import tree
from flowkern.train.checkpoint import find_checkpoint
from flowkern.train.config import from_dict
from flowkern.train.loop import Loop
from flowkern.train.planner import EVALUATION, PlannerTask
from flowkern.train.questions import query_of


def planner_of(run: Path, checkpoint: str) -> PlannerTask:
    """Of a checkpoint, or, with "none", as training began."""
    loop = Loop(from_dict(tree.read_file(run / "config.yaml")))
    if checkpoint != "none":
        loop.load(find_checkpoint(checkpoint, run, "--checkpoint"))
    return loop.task


def shown(task: PlannerTask, question: int) -> list[str]:
    drawn = task.sampling
    sampling = Sampling(
        task.config.validation.temperature, 1.0, drawn.max_new_tokens, drawn.stop_ids
    )
    if not 0 <= question < len(task.held_out):
        raise ConfigError(f"--question: got {question}; there are {len(task.held_out)}, from 0")
    query = query_of(task.held_out[question], question)
    (one,) = task.trajectories([(query, 0)], sampling, EVALUATION)
    lines = [f"> {query.text}?", "", "| turn | the planner, token by token | the tool | result |"]
    lines.append("|---|---|---|---|")
    for number, (turn, step) in enumerate(zip(one.turns, one.memory.steps, strict=True), 1):
        words = task.tokenizer.convert_ids_to_tokens(turn.generation.ids)
        chances = [f"{w} <sub>{_chance(p)}</sub>" for w, p in _pairs(words, turn)]
        said = " ".join(chances).replace("<eos>", "&lt;eos&gt;")
        lines.append(f"| {number} | {said} | {step.command or step.tool} | {step.result} |")
    right = "right" if sum(one.rewards.values()) else f"wrong, it is {query.answer}"
    return [*lines, "", f"Answer: {one.answer or 'none'} ({right}); reward {one.rewards}."]


def _pairs(words: list[str], turn) -> list[tuple[str, float]]:
    return list(zip(words, turn.generation.log_probs, strict=True))


def _chance(log_prob: float) -> str:
    """Of a token; nothing is said of what was certain."""
    chance = exp(log_prob)
    return "" if chance > 0.995 else f"{chance:.2f}".lstrip("0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="latest", help='"none": as training began')
    parser.add_argument("--question", type=int, default=1, help="its place in data.test_prompts")
    options = parser.parse_args()
    try:
        lines = shown(planner_of(options.run, options.checkpoint), options.question)
    except ConfigError as error:
        parser.error(str(error))
    print("\n".join(lines).replace(" <sub></sub>", ""))


if __name__ == "__main__":
    main()
