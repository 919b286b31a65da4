"""Which images have a KL is a matter of what they are worth, and not of rounding."""

import pytest
import torch

from flowkern.rl.algorithms import recipe
from flowkern.schedules import sd3_sigmas


def gated(own, other, **options):
    """Of ten images, those that have a KL."""
    made = recipe("gardo")(
        group_size=5, num_inference_steps=2, auxiliary_rewards=["other"], **options
    )
    scores = {
        name: torch.tensor(values, dtype=torch.float64).view(2, 5)
        for name, values in (("own", own), ("other", other))
    }
    weight = made.credit().kl_weight(scores, {"own": 1.0}, made.plan(sd3_sigmas))
    return weight.flatten().nonzero().flatten().tolist()


def test_images_that_are_as_uncertain_are_treated_alike():
    """.3 - .1 and .2 - 0 are the same share, and two numbers."""
    own, other = [3, 2, 0, 1, 4, 5, 6, 7, 8, 9], [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert gated(own, other, kl_share=0.1) == [], "both tie with the threshold"
    assert gated(own, other, kl_share=0.2) == [0, 1]


@pytest.mark.parametrize("other", [range(10), reversed(range(10)), [0] * 10])
def test_the_share_of_all_is_all(other):
    assert gated([*range(10)], [*other], kl_share=1.0) == [*range(10)]


def test_what_is_good_counts_by_how_far_it_is_from_its_group():
    """Over the group's mean; what is bad does not, and nothing without a reward that says so."""
    scores = {
        "own": torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, -2.0, 0.0, 0.0]]),
        "apart": torch.tensor([[3.0, 1.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]]),
    }
    options = {"group_size": 4, "num_inference_steps": 2, "auxiliary_rewards": ["apart"]}
    found = {}
    for by in (None, "apart"):
        made = recipe("gardo")(diversity_reward=by, **options)
        found[by] = made.credit()(scores, {"own": 1.0}, made.plan(sd3_sigmas)).tolist()
    assert found[None] == scores["own"].tolist()
    assert found["apart"] == [[1.5, 0.5, -1.0, -1.0], [2.0, -2.0, 0.0, 0.0]]
