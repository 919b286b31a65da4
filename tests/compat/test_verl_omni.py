"""verl-omni's drop-ins against the published formulas, on a stand-in for verl-omni.

verl-omni is not installed here: its scheduler is played by a small subclass of diffusers' own,
with a `step` that asks `sample_previous_step` as theirs does; its registry of losses by a dict.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import published
import pytest
import torch

from flowkern.compat import verl_omni

diffusers = pytest.importorskip("diffusers")


@dataclass
class Output:
    prev_sample: torch.Tensor
    log_prob: torch.Tensor | None
    prev_sample_mean: torch.Tensor
    std_dev_t: torch.Tensor


class Theirs(diffusers.FlowMatchEulerDiscreteScheduler):
    """The step of verl-omni's class as the drop-in sees it."""

    def step(self, model_output, timestep, sample, return_dict=True, **options):
        if self.step_index is None:
            self._init_step_index(timestep)
        made = self.sample_previous_step(
            sample=sample.float(), model_output=model_output, **options
        )
        self._step_index += 1
        made = (made[0].to(model_output.dtype), *made[1:])
        return Output(*made) if return_dict else made

    def sample_previous_step(self, *_, **__):
        raise AssertionError("the drop-in stands in for this")


class TheirLoss:
    @classmethod
    def compute_loss(cls, **_):
        raise AssertionError("the drop-in stands in for this")

    def __call__(self, *, config, model_output, data):
        return self.compute_loss(**model_output, **data, config=config)

    @staticmethod
    def prepare_actor_batch(batch):
        return batch


@pytest.fixture
def losses(monkeypatch):
    """What is registered, by name; verl-omni can be imported meanwhile."""
    found = {}

    def register(name):
        return lambda cls: found.__setitem__(name, cls()) or cls

    schedulers = ModuleType("verl_omni.pipelines.schedulers")
    schedulers.FlowMatchSDEDiscreteScheduler = type("Theirs", (Theirs,), {})
    algorithms = ModuleType("verl_omni.trainer.diffusion.diffusion_algos")
    algorithms.register_diffusion_loss, algorithms.DiffusionNFTLoss = register, TheirLoss
    packages = ("verl_omni", "verl_omni.pipelines", "verl_omni.trainer")
    packages = map(ModuleType, (*packages, "verl_omni.trainer.diffusion"))
    for module in (*packages, schedulers, algorithms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def scheduler(losses):
    scheduler = verl_omni.FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def formula(sigmas, index, v, x, level, sde_type, normalizer=True, **how):
    """In float64: prev_sample, log_prob, mean, std_dev_t, sqrt(-dt)."""
    s, n = (published.wide(sigmas[i], x) for i in (index, index + 1))
    if not normalizer and sde_type == "sde":
        how["score"] = lambda x_next, mean, std: published.squares(
            1 / (2 * std**2), x_next, mean, std
        )
    at = (s, n, v, x, level)
    made = published.flow(*at, sigmas[1], **how) if sde_type == "sde" else published.cps(*at, **how)
    x_next, _, log_prob, mean, std = made
    sqrt_dt = torch.sqrt(s - n)
    return x_next, log_prob, mean, std / sqrt_dt if sde_type == "sde" else std, sqrt_dt.flatten()


def close(got, expected, tolerance=2e-6):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("normalizer", [True, False])
def test_training_replays_the_published_formula(scheduler, sde_type, normalizer):
    x, v, x_next = torch.randn(3, 3, 16, 8)
    sigmas = scheduler.sigmas
    for steps in ([0, 4, 8], [7]):
        index = torch.tensor(steps)
        options = {
            "timestep": scheduler.timesteps[index],
            "sde_type": sde_type,
            "noise_level": 0.8,
            "include_logprob_normalizer": normalizer,
            "return_sqrt_dt": True,
        }
        leaf, truth = v.clone().requires_grad_(), v.double().requires_grad_()
        got = scheduler.sample_previous_step(x, leaf, prev_sample=x_next, **options)
        expected = formula(sigmas, index, truth, x, 0.8, sde_type, normalizer, x_next=x_next)
        assert torch.equal(got[0], x_next)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == torch.float32 and one.shape == other.shape
            close(one, other)
        for log_prob, mean in (got[1:3], expected[1:3]):
            (log_prob.sum() + mean.square().mean()).backward()
        off = (leaf.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
        assert off < 1e-5


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_of_steps_and_its_replay(scheduler, sde_type, dtype):
    x = torch.randn(2, 16, 8)
    generator, same = (torch.Generator().manual_seed(9) for _ in range(2))
    levels = {"noise_level": 0.7, "sde_type": sde_type}
    for i, t in enumerate(scheduler.timesteps[:-1]):
        v = torch.randn(2, 16, 8).to(dtype)
        made = scheduler.step(v, t, x, generator=generator, **levels)
        noise = torch.randn(v.shape, generator=same, dtype=dtype)
        expected = formula(scheduler.sigmas, torch.tensor([i]), v, x, 0.7, sde_type, noise=noise)
        ulp = torch.finfo(dtype).eps
        assert made.prev_sample.dtype == dtype  # theirs casts what the step has made
        torch.testing.assert_close(made.prev_sample.double(), expected[0], rtol=ulp, atol=2e-6)
        close(made.log_prob, expected[1])
        close(made.prev_sample_mean, expected[2])
        assert made.std_dev_t.shape == ()
        close(made.std_dev_t, expected[3].squeeze())
        if dtype == torch.float32:
            again = scheduler.sample_previous_step(
                x, v, t.expand(2), prev_sample=made.prev_sample, **levels
            )
            assert torch.equal(again[1], made.log_prob)  # the first ratio is exactly 1
        x = made.prev_sample.float()


def test_forms_of_the_arguments(scheduler):
    x, v, x_next = torch.randn(3, 3, 16, 8)
    t = scheduler.timesteps
    index = torch.tensor([2, 3, 4])
    got = scheduler.sample_previous_step(x, v, t[index], prev_sample=x_next, return_logprobs=False)
    assert got[1] is None and len(got) == 4
    expected = formula(scheduler.sigmas, index, v, x, 0.7, "sde", x_next=x_next)
    close(got[2], expected[2])
    close(got[3], expected[3])
    # without noise theirs is not finite
    assert scheduler.sample_previous_step(x, v, t[5:6], prev_sample=x_next, noise_level=0.0)[
        1
    ].tolist() == [0, 0, 0]
    scheduler.set_begin_index(0)
    made = scheduler.step(v, t[0], x, prev_sample=x_next, return_dict=False, return_sqrt_dt=True)
    assert len(made) == 5 and made[4].shape == (3,)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    rows = scheduler.sample_previous_step(x, v, t[index], generators)
    for i in range(3):
        row = slice(i, i + 1)
        one = torch.Generator().manual_seed(i)
        one = scheduler.sample_previous_step(x[row], v[row], t[index][row], one)
        assert torch.equal(one[0], rows[0][row]) and torch.equal(one[1], rows[1][row])


def test_what_cannot_be_served_is_said(scheduler):
    x = torch.randn(2, 16, 8)
    t = scheduler.timesteps[:1]
    with pytest.raises(ValueError, match="timestep: expected one of the scheduler's"):
        scheduler.sample_previous_step(x, x, t + 0.5)
    with pytest.raises(ValueError, match="timestep: None is the step at the scheduler's step_ind"):
        scheduler.sample_previous_step(x, x)
    with pytest.raises(ValueError, match="sde_type: expected one of"):
        scheduler.sample_previous_step(x, x, t, sde_type="ode")
    with pytest.raises(ValueError, match="noise_level: expected a finite number >= 0, got"):
        scheduler.sample_previous_step(x, x, t, noise_level=torch.tensor([0.7, 0.2]))
    with pytest.raises(ValueError, match=r"^model_output: expected shape \(2, 16, 8\), got \(1"):
        scheduler.sample_previous_step(x, x[:1], t)
    with pytest.raises(ValueError, match="^timestep: expected one or 2, one per sample; got 3"):
        scheduler.sample_previous_step(x, x, scheduler.timesteps[:3])
    with pytest.raises(ValueError, match="per_token_timesteps: verl-omni has one"):
        scheduler.sample_previous_step(x, x, t, per_token_timesteps=torch.ones(2, 16))


# ---- DiffusionNFT's loss ----


def predictions(dtype):
    """Of four samples; their reward probabilities are the ends, the middle and one between."""
    v, old, ref, x0, noise = torch.randn(5, 4, 16, 8)
    old, ref = v + 0.1 * old, v + 0.2 * ref
    t = torch.tensor([0.9, 0.6, 0.0, 0.05]).reshape(4, 1, 1)
    given = {
        "forward_prediction": v,
        "old_prediction": old,
        "ref_forward_prediction": ref,
        "x0": x0,
        "xt": (1 - t) * x0 + t * noise,
    }
    given = {name: x.to(dtype) for name, x in given.items()}
    given["forward_prediction"].requires_grad_()
    return given | {"t_expanded": t, "reward_prob": torch.tensor([0.0, 1.0, 0.5, 0.8])}


def published_loss(
    forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, reward_prob,
    beta, factor, ref_coef,
):  # fmt: skip
    """DiffusionNFT's loss on predicted clean samples, in float64, and what is reported of it."""

    def distance(velocity):
        off = xt - t_expanded * velocity - x0
        weight = off.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        return (off**2 / weight).mean((1, 2))

    v, old = forward_prediction, old_prediction
    positive = distance(old + beta * (v - old))
    negative = distance(old - beta * (v - old))
    policy = factor * (reward_prob * positive + (1 - reward_prob) * negative).mean() / beta
    to_ref = ((v - ref_forward_prediction) ** 2).mean()
    loss = policy + ref_coef * to_ref
    return loss, {
        "actor/policy_loss": policy,
        "actor/positive_loss": positive.mean(),
        "actor/negative_loss": negative.mean(),
        "actor/ref_kl_loss": to_ref,
        "actor/old_deviate": ((v - old) ** 2).mean(),
        "actor/reward_prob_mean": reward_prob.mean(),
        "actor/total_loss": loss,
    }


@pytest.mark.parametrize(("beta", "factor", "ref_coef"), [(1.0, 5.0, 0.0), (0.1, 3.0, 1e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nft_loss_and_its_metrics(losses, beta, factor, ref_coef, dtype):
    options = {"mix_beta": beta, "adv_clip_max": factor, "ref_kl_coef": ref_coef}
    config = SimpleNamespace(diffusion_loss=SimpleNamespace(**options, adaptive_weight_min=1e-5))
    given = predictions(dtype)
    data = {"reward_prob": given.pop("reward_prob")}
    verl_omni.install()
    loss, metrics = losses["diffusion_nft"](config=config, model_output=given, data=data)
    truth = {name: x.detach().double() for name, x in (given | data).items()}
    truth["forward_prediction"].requires_grad_()
    expected, reported = published_loss(**truth, beta=beta, factor=factor, ref_coef=ref_coef)
    loss.backward()
    expected.backward()
    off = given["forward_prediction"].grad.double() - truth["forward_prediction"].grad
    largest = truth["forward_prediction"].grad.abs().max()
    assert off.abs().max() / largest < max(1e-5, torch.finfo(dtype).eps)
    close(loss, expected)
    assert list(metrics) == list(reported)
    for name, value in reported.items():
        assert metrics[name] == pytest.approx(float(value.detach()), rel=1e-5), name
    data["reward_prob"] = data["reward_prob"][:, None].expand(-1, 3)  # one for each timestep
    again, _ = losses["diffusion_nft"](config=config, model_output=given, data=data)
    close(again, loss.detach(), 1e-7)
    config.diffusion_loss.adaptive_weight_min = 1e-4
    with pytest.raises(ValueError, match="diffusion_loss.adaptive_weight_min: expected 1e-5"):
        losses["diffusion_nft"](config=config, model_output=given, data=data)


def nft_config(**options):
    options = {"mix_beta": 0.5, "adv_clip_max": 5.0, "ref_kl_coef": 0.1} | options
    return SimpleNamespace(diffusion_loss=SimpleNamespace(**options, adaptive_weight_min=1e-5))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("xt", torch.ones(1, 16, 8), "^xt: expected shape"),  # else it would serve every sample
        ("old_prediction", torch.ones(1, 16, 8), "^old_prediction: expected shape"),
        ("ref_forward_prediction", torch.ones(4, 16, 1), "^ref_forward_prediction: expected shape"),
        ("t_expanded", torch.ones(2, 1, 1), r"^t_expanded: expected 4 rows, one per sample, got"),
        ("reward_prob", torch.ones(5), r"^reward_prob: expected 4 rows, one per sample, got"),
    ],
)
def test_what_the_nft_loss_refuses(losses, name, value, words):
    loss = verl_omni.DiffusionNFTLoss
    with pytest.raises(ValueError, match=words):
        loss.compute_loss(**predictions(torch.float32) | {name: value}, config=nft_config())
    for option in ("adv_clip_max", "mix_beta"):
        with pytest.raises(ValueError, match=f"^diffusion_loss.{option}: expected a .*> 0, got 0"):
            given = predictions(torch.float32)
            loss.compute_loss(**given, config=nft_config(**{option: 0.0}))


def test_the_nft_loss_of_a_t_that_is_hardly_above_0(losses):
    given = predictions(torch.float32)
    given["t_expanded"] = torch.full((4, 1, 1), 1e-30)
    given["xt"] = given["x0"] + 1e-6
    loss, metrics = verl_omni.DiffusionNFTLoss.compute_loss(**given, config=nft_config())
    assert loss.isfinite() and all(abs(x) < 1e3 for x in metrics.values())


# ---- the seams ----


def test_installed_everywhere_by_the_plug_in(losses):
    theirs = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
    scheduler = theirs(shift=3.0)  # made before
    scheduler.set_timesteps(4)
    sys.modules.pop("flowkern.compat.verl_omni_plugin", None)
    importlib.import_module("flowkern.compat.verl_omni_plugin")
    x = torch.randn(2, 16, 8)
    assert scheduler.step(x, scheduler.timesteps[0], x).log_prob.shape == (2,)
    assert isinstance(losses["diffusion_nft"], TheirLoss)
    assert losses["diffusion_nft"].prepare_actor_batch("batch") == "batch"
    made = verl_omni.FlowMatchSDEDiscreteScheduler
    assert made is verl_omni.FlowMatchSDEDiscreteScheduler and issubclass(made, theirs)
    assert made.from_config(scheduler.config).config.shift == 3.0


def test_without_verl_omni_one_line_says_so():
    for call in (verl_omni.install, lambda: verl_omni.FlowMatchSDEDiscreteScheduler):
        with pytest.raises(ImportError, match="pipelines.schedulers: verl-omni cannot be imported"):
            call()
    assert not hasattr(verl_omni, "FlowMatchEulerDiscreteScheduler")


def test_a_version_without_the_loss_is_told_apart(losses):
    scheduler = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
    del sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    with pytest.raises(ImportError, match="DiffusionNFTLoss: this version of verl-omni has none"):
        _ = verl_omni.DiffusionNFTLoss
    with pytest.raises(ImportError, match="DiffusionNFTLoss: this version of verl-omni has none"):
        verl_omni.install()
    assert scheduler.sample_previous_step is Theirs.sample_previous_step  # nothing has changed


def test_a_version_whose_step_calls_something_else_is_told_apart(losses):
    """There the method would be put in place, and nothing would call it."""
    bare = type("Bare", (diffusers.FlowMatchEulerDiscreteScheduler,), {})
    sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler = bare
    for call in (verl_omni.install, lambda: verl_omni.FlowMatchSDEDiscreteScheduler):
        with pytest.raises(ImportError, match="Bare.sample_previous_step: this version of verl-om"):
            call()
    assert not losses and not hasattr(bare, "sample_previous_step")


def test_a_registry_that_refuses_leaves_the_step(losses, monkeypatch):
    def register(name):
        raise ValueError(f"{name} is registered already")

    algorithms = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"]
    monkeypatch.setattr(algorithms, "register_diffusion_loss", register)
    scheduler = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
    with pytest.raises(ValueError, match="diffusion_nft is registered already"):
        verl_omni.install()
    assert scheduler.sample_previous_step is Theirs.sample_previous_step
