"""Do AWM and DiffusionNFT learn better from images that are solved better?

Each line samples its training images in another way on the demo model's grid, SD3's own, whose step
to the last noise level above 0 is long; solver_error.py says how far each way is from the truth.
"""

from __future__ import annotations

from causes import Experiment

MATCHING = {"awm": "AWM", "diffusion_nft": "DiffusionNFT"}
WAYS = {
    "second": ("order 2 on the model's levels", ("algorithm.last_sigma_ratio=0",)),
    "half": ("order 2, the last level half of the one before", ()),
}

EXPERIMENTS = {
    f"{entry}_{name}": Experiment(f"{label}: {what}", entry, overrides)
    for entry, label in MATCHING.items()
    for name, (what, overrides) in WAYS.items()
}
