"""Copies of the trained weights: running means, swapped in and out."""

import pytest
import torch

from flowkern.checks import ConfigError
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


def test_a_mean_on_the_host_has_the_same_numbers():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(7, 5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    here, there = (
        Copies(list(layer.parameters()), ["mean", "old"], on_host=on_host)
        for layer, on_host in zip(layers, ([], ["mean"]), strict=True)
    )
    places = [p.data_ptr() for p in layers[1].parameters()]
    x = torch.randn(3, 7)
    for decay in (0.5, 0.9):
        for layer, copies in zip(layers, (here, there), strict=True):
            layer(x).square().sum().backward()
            with torch.no_grad():
                for p in layer.parameters():
                    p -= 0.1 * p.grad
            copies.weights_moved()
            copies.update("mean", decay)
    own = layers[1](x)
    with here.using("mean"), there.using("mean"):
        assert torch.equal(layers[0](x), layers[1](x)) and not torch.equal(layers[1](x), own)
    assert torch.equal(layers[1](x), own) and torch.equal(layers[0](x), own)
    # The weights stay where they are, as a device's would.
    assert places == [p.data_ptr() for p in layers[1].parameters()]
    states = [copies.state_dict()["copies"] for copies in (here, there)]
    for name in ("mean", "old"):
        assert all(map(torch.equal, states[0][name], states[1][name]))
    there.load_state_dict({"copies": states[0], "current": []})


def test_a_checkpoint_of_other_copies_is_refused():
    copies = Copies([torch.zeros(2)], ["old"])
    with pytest.raises(ValueError, match=r"weight copies \['ema'\], expected \['old'\]"):
        copies.load_state_dict({"copies": {"ema": [torch.zeros(2)]}, "current": []})


def test_the_mean_that_is_evaluated_takes_one_step_per_optimizer_step(tiny):
    """Not one per micro-batch, and not one per rollout."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from flowkern.train.loop import EVALUATED, Loop

    options = (
        "train.ema_decay=0.2",
        "train.offload_ema=true",
        "algorithm.updates_per_rollout=2",
        "train.max_batch=5",
    )
    with pytest.raises(ConfigError, match="^train.offload_ema: got true, but .* there is no mean"):
        tiny("train.offload_ema=true")
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
