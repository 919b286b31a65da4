"""A reward of your own: a class, whose keywords are its options, in a run on handwritten digits.

    python examples/own_reward.py [key.path=value ...]

Forty optimizer steps. The share of ink goes from .31 to .40, as asked for, and the judge, which is
not optimized, from .48 to .30: nobody asked for digits. Hold one back in every run.
"""

import sys

from flowkern.cli import main


class Ink:
    """How near the share of ink is to `wanted`: 0 is best."""

    def __init__(self, wanted: float = 0.4):
        if not 0 < wanted < 1:
            raise ValueError(f"wanted: got {wanted}, expected a share between 0 and 1")
        self.wanted = wanted

    def __call__(self, images, prompts, metadata):
        ink = images.mean((1, 2, 3))  # images (B, 3, H, W) in [0, 1], white on black
        return -(ink - self.wanted).abs(), {"share": ink}  # scores; what else is reported


if __name__ == "__main__":
    reward = "reward={ink: {kind: 'own_reward:Ink', wanted: 0.4}, digits_judge: {weight: 0}}"
    run = ["output_dir=runs/own-reward", "train.steps=40", reward]
    sys.exit(main(["demo", *run, *sys.argv[1:]]))
