"""train.optimizer: what each one steps to, keeps and goes on with."""

import io
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from flowkern.checks import ConfigError
from flowkern.train import optimizer
from flowkern.train.config import TrainConfig, to_dict
from flowkern.train.loop import Loop
from flowkern.train.optimizer import make_optimizer, make_schedule, restore, set_rate
from flowkern.train.run_directory import dump, refuse_other_run

KINDS = ["adamw", "adamw_fused", "adamw_8bit"]
STEPS = 20


@pytest.fixture(params=KINDS)
def kind(request):
    """Where it is installed."""
    if request.param == "adamw_8bit":
        pytest.importorskip("torchao")
    return request.param


@dataclass
class Trained:
    """A network under an optimizer of this kind, with a schedule that moves its rate."""

    kind: str

    def __post_init__(self):
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
        options = {"lr_scheduler": "linear", "learning_rate": 1e-2, "steps": 2 * STEPS}
        config = TrainConfig(optimizer=self.kind, **options)
        self.optimizer = make_optimizer(list(self.network.parameters()), config)
        self.schedule = make_schedule(self.optimizer, config)
        self.done = 0

    def go(self, steps=STEPS):
        for _ in range(steps):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(self.done))
            (self.network(x) - x.flip(1)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            set_rate(self.schedule, self.done)
        return self

    def resumed(self, kind=None):
        """Through a file, as a checkpoint is read."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        again = Trained(kind or self.kind)
        again.network.load_state_dict(self.network.state_dict())
        restore(again.optimizer, again.schedule, state, self.done)
        again.done = self.done
        return again

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    @property
    def size(self):
        """Bytes of the moments."""
        return sum(map(_bytes, (v for one in self.optimizer.state.values() for v in one.values())))


def _bytes(value):
    if hasattr(value, "__tensor_flatten__"):
        return sum(getattr(value, name).nbytes for name in value.__tensor_flatten__()[0])
    return value.nbytes


def test_it_learns_as_adamw_does(kind):
    """8 bits: two moments of 128 numbers stay as they are, as tensors below 4,096 do."""
    right, ours = Trained("adamw"), Trained(kind)
    begin = right.weights
    right.go(), ours.go()
    off = ((ours.weights - right.weights).norm() / (right.weights - begin).norm()).item()
    assert off <= {"adamw": 0, "adamw_fused": 1e-5, "adamw_8bit": 0.05}[kind]
    share = ours.size / right.size
    assert share == 1 if kind != "adamw_8bit" else 0.25 < share < 0.4
    assert ours.optimizer.param_groups[0].get("fused") == {"adamw_fused": True}.get(kind)
    assert float(ours.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 / 2)


def test_a_resume_goes_on_bit_for_bit(kind):
    straight = Trained(kind).go()
    resumed = straight.resumed()
    assert torch.equal(resumed.go(3).weights, straight.go(3).weights)


@pytest.mark.parametrize("before, after", [("adamw", "adamw_fused"), ("adamw_fused", "adamw")])
def test_one_goes_on_with_the_others_moments(before, after):
    straight = Trained(before).go()
    resumed = straight.resumed(after)
    torch.testing.assert_close(resumed.go(3).weights, straight.go(3).weights, rtol=0, atol=1e-6)
    assert bool(resumed.optimizer.param_groups[0]["fused"]) == (after == "adamw_fused")


def test_what_it_is_not_for_is_refused(tiny, monkeypatch):
    eight = "train.optimizer=adamw_8bit"
    with pytest.raises(ConfigError, match="^train.optimizer: got adamw_8bit, which is for lora=nu"):
        Loop(tiny(eight))
    with pytest.raises(ConfigError, match="^train.optimizer: got 'sgd', expected one of adamw, "):
        tiny("train.optimizer=sgd")
    monkeypatch.setattr(optimizer, "EXTRA", "no_such_package")
    with pytest.raises(ConfigError, match=r"needs no_.*: pip install 'flowkern\[no_such_package\]"):
        Loop(tiny(eight, "lora=null"))


@pytest.mark.parametrize(
    "before, after, is_refused",
    [("adamw", "adamw_fused", False), ("adamw", "adamw_8bit", True), ("adamw_8bit", "adamw", True)],
)
def test_a_resume_takes_another_kernel_and_no_other_bits(before, after, is_refused, tiny, tmp_path):
    """Before the moments are looked at."""
    tree = to_dict(tiny(f"train.optimizer={before}", "lora=null"))
    (tmp_path / "config.yaml").write_text(dump(tree))
    tree["train"]["optimizer"] = after
    if is_refused:
        with pytest.raises(ConfigError, match=f"optimizer: got '{after}', but .* has '{before}', "):
            refuse_other_run(tmp_path, tree)
    else:
        assert refuse_other_run(tmp_path, tree) == {"train.optimizer": (before, after)}
