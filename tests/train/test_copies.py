"""Copies of the trained weights: running means, swapped in and out."""

import pytest
import torch

from flowkern.train.copies import Copies


def test_a_copy_is_a_running_mean_and_knows_when_it_is_current():
    weight = torch.tensor([1.0, 2.0])
    copies = Copies([weight], ["old", "mean"])
    assert copies.is_current("old") and not copies.is_current("reference")
    weight += 4
    copies.weights_moved()
    assert not copies.is_current("old")
    copies.update("mean", 0.75)
    assert torch.equal(copies.state_dict()["copies"]["mean"][0], torch.tensor([2.0, 3.0]))
    copies.update("old", 0.0)
    assert copies.is_current("old") and not copies.is_current("mean")
    assert torch.equal(copies.state_dict()["copies"]["old"][0], weight)


def test_a_network_runs_with_a_copy_and_gets_its_own_weights_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    copies = Copies([layer.weight], ["old"])
    before, x = layer.weight.detach().clone(), torch.ones(1, 1)
    with torch.no_grad():
        layer.weight += 1
    copies.weights_moved()
    with pytest.raises(KeyboardInterrupt), copies.using("old"):
        assert torch.equal(layer(x), before)
        raise KeyboardInterrupt
    assert torch.equal(layer(x), before + 1) and layer.weight.requires_grad
    with copies.using(None):
        assert torch.equal(layer(x), before + 1)


def test_a_checkpoint_of_other_copies_is_refused():
    copies = Copies([torch.zeros(2)], ["old"])
    with pytest.raises(ValueError, match=r"weight copies \['ema'\], expected \['old'\]"):
        copies.load_state_dict({"copies": {"ema": [torch.zeros(2)]}, "current": []})


def test_the_mean_that_is_evaluated_takes_one_step_per_optimizer_step(tiny):
    """Not one per micro-batch, and not one per rollout."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from flowkern.train.loop import EVALUATED, Loop

    options = ("train.ema_decay=0.2", "algorithm.updates_per_rollout=2", "train.max_batch=5")
    loop = Loop(tiny(*options))
    weights, update = [loop.parameters[1].detach().clone()], loop.update

    def watched(*arguments):
        metrics = update(*arguments)
        weights.append(loop.parameters[1].detach().clone())
        return metrics

    loop.update = watched
    loop.step()
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min((1 + n) / (10 + n), 0.2)
        expected = decay * expected + (1 - decay) * weight
    actual = loop.copies.state_dict()["copies"][EVALUATED][1]
    torch.testing.assert_close(actual, expected)
    assert len(weights) == 3 and not torch.equal(actual, weights[-1])
