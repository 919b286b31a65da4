"""UniRL's strategies against their published formulas. UniRL is not installed here: a stand-in
module plays the one whose classes are subclassed.
"""

import pickle
import sys
from types import ModuleType

import published
import pytest
import torch

from flowkern.compat import unirl

KINDS = {"FlowSDEStrategy": "flow", "CPSSDEStrategy": "cps", "DanceSDEStrategy": "dance"}
NAMES = pytest.mark.parametrize("name", KINDS)


def transition(name, v, x, sigma, sigma_next, eta, sigma_max=0.99, **how):
    """In float64: prev_sample, log_prob, mean, the standard deviation and g."""
    s, n = (published.wide(t.float(), x) for t in (sigma, sigma_next))
    of = {
        "FlowSDEStrategy": lambda: published.flow(s, n, v, x, eta, sigma_max, **how),
        "CPSSDEStrategy": lambda: published.cps(s, n, v, x, eta, **how),
        "DanceSDEStrategy": lambda: published.dance(s, n, v, x, eta, **how),
    }
    x_next, _, log_prob, mean, std = of[name]()
    g = std if name == "CPSSDEStrategy" else std / torch.sqrt(s - n)
    return x_next, log_prob, mean, std, g


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigmas", [(1.0, 0.8), ([1.0, 0.9, 0.3], [0.8, 0.7, 0.1])])
def test_a_transition_is_drawn_and_replayed(name, dtype, sigmas):
    """0-dim and per-sample sigmas, float64 ones too; the stream of random numbers is torch's; what
    is stored in the latents' dtype is what is scored.
    """
    strategy = getattr(unirl, name)()
    torch.manual_seed(0)
    v, x = torch.randn(2, 3, 4, 5).to(dtype)
    sigma, sigma_next = (torch.tensor(s, dtype=torch.float64) for s in sigmas)
    options = {"eta": 0.7, "sigma_max": 0.95}

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    drawn = strategy.denoise(
        v, x, sigma, sigma_next, generator=torch.Generator().manual_seed(3), **options
    )
    exact, _, mean, std, _ = transition(
        name, v, x, sigma, sigma_next, 0.7, noise=noise, sigma_max=0.95
    )
    assert all(part.dtype == torch.float32 for part in drawn)
    assert torch.equal(drawn[0], drawn[0].to(dtype).float())  # as it will be stored
    atol = 2e-6 if dtype == torch.float32 else 2**-8 * float(exact.abs().max())
    torch.testing.assert_close(drawn[0].double(), exact, rtol=0, atol=atol)
    theirs = transition(name, v, x, sigma, sigma_next, 0.7, x_next=drawn[0], sigma_max=0.95)
    close(drawn[1], theirs[1])
    close(drawn[2], mean)

    leaf = v.float().clone().requires_grad_()
    replayed = strategy.denoise(leaf, x, sigma, sigma_next, prev_sample=drawn[0], **options)
    assert torch.equal(replayed[0], drawn[0])
    torch.testing.assert_close(replayed[1], drawn[1], rtol=0, atol=0)  # the ratio is exactly 1
    near = drawn[0] * (1 + 1e-4 * (dtype == torch.bfloat16))  # rounds to what was stored
    again = strategy.denoise(v, x, sigma, sigma_next, prev_sample=near, **options)
    assert torch.equal(again[0], drawn[0]) and torch.equal(again[1], drawn[1])
    (replayed[1].sum() + replayed[2].square().mean()).backward()
    truth = v.double().requires_grad_()
    expected = transition(name, truth, x, sigma, sigma_next, 0.7, x_next=drawn[0], sigma_max=0.95)
    (expected[1].sum() + expected[2].square().mean()).backward()
    largest = float(truth.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=0, atol=2e-6 * largest)

    step = strategy.step(
        v, x, sigma, sigma_next, 0.7, generator=torch.Generator().manual_seed(3), sigma_max=0.95
    )
    close(step[1], mean)
    close(step[2], std.reshape(sigma.shape))


@NAMES
def test_without_noise_there_is_no_log_probability(name):
    """eta below 1e-7; as much of the random stream is used, and nothing is rounded."""
    strategy = getattr(unirl, name)()
    v, x = torch.randn(2, 2, 6).to(torch.bfloat16)
    sigma, sigma_next = torch.tensor(0.8), torch.tensor(0.6)
    generator = torch.Generator().manual_seed(0)
    found, log_prob, mean = strategy.denoise(v, x, sigma, sigma_next, eta=0.0, generator=generator)
    assert log_prob is None
    close(found, transition(name, v, x, sigma, sigma_next, 0.0, noise=torch.zeros(()))[0])
    assert torch.equal(found, mean)
    same = torch.Generator().manual_seed(0)
    torch.randn(x.shape, generator=same)
    assert torch.equal(torch.randn(2, generator=same), torch.randn(2, generator=generator))
    replayed = strategy.denoise(v, x, sigma, sigma_next, eta=0.0, prev_sample=x.float() + 1e-4)
    assert replayed[1] is None and torch.equal(replayed[0], x.float() + 1e-4)


def test_a_list_of_generators_is_per_sample():
    v, x = torch.randn(2, 2, 6)
    sigmas = torch.tensor(0.8), torch.tensor(0.6)
    seeded = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    strategy = unirl.FlowSDEStrategy()
    both = strategy.denoise(v, x, *sigmas, generator=seeded(4, 5))
    second = strategy.denoise(v[1:], x[1:], *sigmas, generator=seeded(5))
    assert torch.equal(both[0][1:], second[0]) and torch.equal(both[1][1:], second[1])


@NAMES
def test_standard_deviations_of_a_schedule(name):
    """What FlowDPPO's KL and TempFlow-GRPO's weights ask for."""
    strategy = getattr(unirl, name)()
    x = torch.zeros(3, 1)
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.3]), torch.tensor([0.8, 0.7, 0.1])
    of = {"sigma": sigma, "sigma_next": sigma_next, "eta": 0.7, "sigma_max": 0.95}
    *_, std, g = transition(
        name, x, x, sigma, sigma_next, 0.7, noise=torch.zeros(()), sigma_max=0.95
    )
    close(strategy.transition_std(**of), std.flatten())
    close(strategy._std_dev_t(**of), g.flatten())
    wide = of | {"sigma": sigma[:, None, None], "sigma_next": sigma_next[:, None, None]}
    assert strategy.transition_std(**wide).shape == (3, 1, 1)
    one = of | {"sigma": sigma[1], "sigma_next": sigma_next[1]}
    assert strategy._std_dev_t(**one).shape == ()


@pytest.fixture
def peer(monkeypatch):
    """A stand-in for UniRL: strategies with a name, a transition and a state of their own."""
    module = ModuleType("unirl.sde.kernels")
    for name, short in KINDS.items():

        class Theirs:
            canonical_name = short

            def __init__(self, *, config=None):
                self.config = config

            def denoise(self, *_, **__):
                raise AssertionError("the peer's transition")

            step = transition_std = _std_dev_t = denoise

            def reset(self):
                return "theirs"

        setattr(module, name, type(name, (Theirs,), {}))
    for part in ("unirl", "unirl.sde"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, "unirl.sde.kernels", module)
    return module


@NAMES
def test_a_strategy_is_a_subclass_of_unirls(peer, name):
    """Algorithms ask isinstance; what is not the transition stays theirs."""
    strategy = getattr(unirl, name)(config="theirs")
    assert isinstance(strategy, getattr(peer, name)) and strategy.config == "theirs"
    assert strategy.canonical_name == KINDS[name] and strategy.reset() == "theirs"
    assert getattr(unirl, name) is type(strategy) is type(pickle.loads(pickle.dumps(strategy)))
    v, x = torch.randn(2, 2, 6)
    sigmas = torch.tensor(0.8), torch.tensor(0.6)
    found = strategy.denoise(v, x, *sigmas, prev_sample=x)
    close(found[1], transition(name, v, x, *sigmas, 1.0, x_next=x)[1])
    (
        strategy.step(v, x, *sigmas),
        strategy.transition_std(sigma=sigmas[0], sigma_next=sigmas[1], eta=1.0),
    )


@NAMES
def test_sigmas_of_the_host_and_one_for_several(name):
    """As arithmetic takes them: numbers on the CPU beside latents elsewhere; (), beside (B,)."""
    strategy = getattr(unirl, name)()
    v, x = torch.randn(2, 3, 6)
    sigma, sigma_next = torch.tensor(0.8), torch.tensor([0.7, 0.6, 0.5])
    elsewhere = strategy.denoise(v.to("meta"), x.to("meta"), sigma, sigma_next[0])
    assert elsewhere[1].device.type == "meta"
    *_, std, g = transition(name, v, x, sigma.expand(3), sigma_next, 0.5, x_next=x)
    of = {"sigma": sigma, "sigma_next": sigma_next, "eta": 0.5}
    close(strategy.transition_std(**of), std.flatten())
    close(strategy._std_dev_t(**of), g.flatten())
    close(strategy.step(v, x, sigma, sigma_next, 0.5)[2], std.flatten())


def test_a_replay_is_one_graph_of_a_compiler():
    strategy, s = unirl.FlowSDEStrategy(), torch.tensor([0.8, 0.6])
    v, x, x_next = torch.randn(3, 1, 6)

    def replayed(v):
        return strategy.denoise(v, x, s[0], s[1], prev_sample=x_next)[1]

    whole = torch.compile(replayed, backend="eager", fullgraph=True)
    assert torch.equal(whole(v), replayed(v))


def test_what_is_off_is_said_in_unirls_words():
    strategy, x, s = unirl.FlowSDEStrategy(), torch.randn(2, 3, 6), torch.tensor([0.8, 0.7, 0.6])
    calls = {
        "noise_pred": lambda: strategy.denoise(x[..., :2], x, s[0], s[1]),
        "prev_sample": lambda: strategy.denoise(x, x, s[0], s[1], prev_sample=x[..., :2]),
        "sigma": lambda: strategy.denoise(x, x, s, s / 2),
        "eta": lambda: strategy.step(x, x, s[0], s[1], eta=-1.0),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


def test_a_unirl_without_the_class_is_named(peer):
    del peer.FlowSDEStrategy
    with pytest.raises(ImportError, match=r"unirl.sde.kernels.FlowSDEStrategy: this version of"):
        unirl.FlowSDEStrategy  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'FlashSDEStrategy'"):
        unirl.FlashSDEStrategy  # noqa: B018
    assert set(KINDS) <= set(dir(unirl))
