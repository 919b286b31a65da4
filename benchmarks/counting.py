"""What an iteration asks of the network, without running it: rows by kind, and their operations.

    python benchmarks/counting.py --model sd35m|flux1|wan21-1.3b [--images N]

How many times as fast flowkern's loop is than the released one by counting alone, if an operation
took all the same time and nothing else any: in the middle of a run of 300 rollouts, and over it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flowkern.rl.recipe import Recipe
from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

KINDS = ("sampling", "learning", "not learning")
"""Of rows: in a rollout; in training with a gradient; in training without, which are references,
copies and halves of guidance that do not learn."""
MIDDLE, RUN = 150, range(0, 300, 5)  # windows move every 20 or 25 rollouts


def rows(recipe: Recipe, iteration: int, is_plain: bool) -> dict[str, float]:
    """Of one prompt, in a rollout of the middle of a run with one optimizer step."""
    objective = recipe.objective_at(uncond=0)
    halves = 1 if recipe.guidance(uncond=0) is None else 2
    if is_plain:  # with guidance both halves go through the network together, and back
        cost = recipe.released(iteration)
        calls = objective.calls()
        learning = calls / (1 + len(objective.anchors))
    else:
        cost = recipe.plan(sd3_sigmas, iteration).cost()
        calls = objective.calls(is_on_policy=recipe.sampler is None)
        learning = objective.together
    each = halves * cost.sample, learning * cost.train, (calls - learning) * cost.train
    return {kind: count for kind, count in zip(KINDS, each, strict=True) if count}


def tflop(rows: Mapping[str, float], of_a_row: Mapping[str, float]) -> float:
    """of_a_row: "forward", and "both" ways."""
    learning = rows.get("learning", 0)
    return learning * of_a_row["both"] + (sum(rows.values()) - learning) * of_a_row["forward"]


def per_image(
    recipe: Recipe, is_plain: bool, of_a_row: Mapping[str, float], iterations: Iterable[int]
) -> float:
    """TFLOP, of those rollouts together."""
    found = [tflop(rows(recipe, i, is_plain), of_a_row) for i in iterations]
    return sum(found) / len(found) / recipe.plan(sd3_sigmas).cost().images


def main() -> None:
    from contenders import operations
    from plain_loops import LOOPS
    from settings import IMAGES, MODELS, Setting

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--images", type=int, help="of a prompt, as train_step.py has it")
    options = parser.parse_args()
    of_a_row = operations(MODELS[options.model])
    setting = Setting(options.model, "", options.images or 8, 16, "cpu")
    recipes = {}
    for name in LOOPS:
        images = options.images or IMAGES.get(name, 8)
        recipes[name] = replace(setting, algorithm=name, images=images).recipe()
    print(
        f"{options.model}: TFLOP of a row {of_a_row['forward']:.3g}, with a gradient "
        f"{of_a_row['both']:.3g}\n{'':20}  TFLOP of an image  times as fast, counted\n"
        f"{'':20} released flowkern  in the middle  of a run"
    )
    means = {}
    for name, recipe in recipes.items():
        pairs = []
        for iterations in (range(MIDDLE, MIDDLE + 1), RUN):
            pairs.append([per_image(recipe, p, of_a_row, iterations) for p in (True, False)])
        middle, means[name] = pairs
        print(
            f"{name:20} {means[name][0]:8.4g} {means[name][1]:8.4g}  {middle[0] / middle[1]:13.2f}"
            f"  {means[name][0] / means[name][1]:8.2f}"
        )
    for other in ("flow_grpo", "dance_grpo"):
        ratio = means[other][0] / means["mixgrpo_flash"][1]
        print(f"mixgrpo_flash here to {other} as released, an image: {ratio:.2f} times")


if __name__ == "__main__":
    main()
