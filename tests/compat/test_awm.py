"""AWM's surrogate log-likelihood against its formula in float64, through a stand-in network."""

from types import SimpleNamespace

import pytest
import torch

from flowkern.compat.awm import WEIGHTINGS, compute_log_prob_awm


class Network(torch.nn.Module):
    """Of diffusers' call: what it is asked is checked, what it answers is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = torch.nn.Parameter(answer)

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, **rest):
        assert rest == {"return_dict": False}
        assert len(hidden_states) == len(timestep) == len(encoder_hidden_states) == len(self.answer)
        self.asked = timestep
        return (self.answer.to(hidden_states.dtype),)


def weighted(m, t, weighting, power):
    if weighting == "huber":
        return -t * (torch.sqrt(m + 1e-10) - 1e-5)
    if weighting == "ghuber":
        return -t / power * ((m + 1e-10) ** power - 1e-10**power)
    return -m * t ** {"Uniform": 0, "t": 1, "t**2": 2}[weighting]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cfg", [False, True])
def test_the_surrogate_and_its_gradient(weighting, dtype, cfg):
    train = SimpleNamespace(cfg=cfg, ghuber_power=0.3)
    config = SimpleNamespace(train=train, sample=SimpleNamespace(guidance_scale=4.5))
    x_t, x0, noise = (torch.randn(3, 4, 8, 8).to(dtype) for _ in range(3))
    t = torch.tensor([0.2, 0.9731, 1.0]).reshape(3, 1, 1, 1)
    rows = 6 if cfg else 3
    text, pooled = torch.randn(rows, 5, 7), torch.randn(rows, 7)
    network = Network(torch.randn(rows, 4, 8, 8))
    given = (network, None, None, t, text, pooled, config, x_t, x0, noise)
    log_prob, velocity, std = compute_log_prob_awm(*given, weighting)
    assert torch.equal(network.asked, torch.cat([t.flatten() * 1000] * (rows // 3)))

    truth = network.answer.detach().to(dtype).double().requires_grad_()
    guided = truth
    if cfg:
        uncond, cond = truth.chunk(2)
        guided = uncond + 4.5 * (cond - uncond)
    m = ((guided - (noise.double() - x0.double())) ** 2).flatten(1).mean(1)
    expected = weighted(m, t.flatten().double(), weighting, 0.3)
    assert log_prob.dtype == torch.float64 and velocity.dtype == torch.float32
    loose = dtype == torch.float16 and cfg  # guidance is in the network's dtype, as theirs is
    tolerance = {"rtol": 5e-3, "atol": 2e-2} if loose else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(log_prob, expected, **tolerance)
    if not loose:  # guidance cancels numbers of a size of 10
        tolerance["atol"] = 2e-6
    torch.testing.assert_close(velocity.double(), guided.detach(), **tolerance)
    torch.testing.assert_close(std, 0.7 * torch.sqrt(t / (1 - t.clamp(0, 0.99))))
    log_prob.sum().backward()
    expected.sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(network.answer.grad, truth.grad.float(), **tolerance)


def test_times_of_another_batch_are_refused_before_the_network_is_asked():
    x, t = torch.randn(2, 4, 6), torch.full((3, 1, 1), 0.5)
    config = SimpleNamespace(train=SimpleNamespace(cfg=False))
    with pytest.raises(ValueError, match=r"timestep: expected one for each of 2 samples, got .*3"):
        compute_log_prob_awm(None, None, None, t, None, None, config, x, x, x)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting: expected one of .*, got 'elbo'"):
        compute_log_prob_awm(*[None] * 10, "elbo")
