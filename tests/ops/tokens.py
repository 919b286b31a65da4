"""Problems of the token loss for its tests: drawn, solved by a backend, compared with float64."""

from typing import NamedTuple

import pytest
import torch

import flowkern as fk
from flowkern.ops.token_loss import chunks

native = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)


@pytest.fixture
def gemms_of_16_bits(monkeypatch):
    """Also on a CPU that takes float32 for them."""
    monkeypatch.setattr(chunks, "gemm_dtype", lambda device, dtype: dtype)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0, "temperature": 1.3, "entropy_coef": 0.02},
    "kl": {"kl_coef": 0.1},
    "entropy": {"entropy_coef": 0.05, "bias": False},
    "dual clip": {"dual_clip": 1.1, "clip_high": 0.3},
    "correction": {"is_cap": 1.2, "clip_low": 1.0},
    "chunks": {"budget_bytes": 1, "kl_coef": 0.1},
    "all": {"kl_coef": 0.1, "entropy_coef": 0.05, "is_cap": 2.0, "dual_clip": 1.3, "softcap": 9.0},
}
FLOATING = ("old_log_prob", "advantage", "token_weight", "ref_log_prob", "sample_log_prob")
STATISTICS = ("log_prob", "ratio", "kl", "entropy")


class Solved(NamedTuple):
    out: fk.TokenLoss
    gradients: tuple  # of hidden, weight, bias


class Tokens:
    """Random tokens whose old policy is near; `options` go to the loss."""

    def __init__(self, m, hidden, vocabulary, dtype=torch.float32, seed=0, scale=2.0, **options):
        g = torch.Generator().manual_seed(seed)
        normal = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
        self.hidden = normal(m, hidden).to(dtype)
        self.weight = (scale * normal(vocabulary, hidden) / hidden**0.5).to(dtype)
        self.bias = normal(vocabulary).mul(0.1).to(dtype) if options.pop("bias", True) else None
        self.ids = torch.randint(vocabulary, (m,), generator=g)
        self.ids[-1:] = vocabulary - 1
        self.head = {k: options[k] for k in ("temperature", "softcap") if k in options}
        lp = self.log_prob("reference", torch.float64)
        near = lambda: (lp + 0.3 * normal(m)).float()  # noqa: E731
        self.options = {
            "old_log_prob": near(),
            "advantage": normal(m),
            "token_weight": torch.rand(m, generator=g) / max(1, m),
        }
        if options.get("kl_coef"):
            self.options["ref_log_prob"] = near()
        if "is_cap" in options:
            self.options["sample_log_prob"] = near()
        self.options |= options

    def log_prob(self, backend=None, dtype=None, **options):
        to = lambda x: x if x is None or dtype is None else x.to(dtype)  # noqa: E731
        given = to(self.hidden), to(self.weight), self.ids, to(self.bias)
        return fk.linear_log_prob(*given, **self.head, backend=backend, **options)

    def solve(self, backend=None, dtype=None, **change):
        """The loss and its gradients; with dtype float64 all is in it."""
        dtype = dtype or self.hidden.dtype
        inputs = [
            None if x is None else x.to(dtype).clone().requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
        ]
        options = self.options | change
        if dtype == torch.float64:
            is_float = lambda k: options.get(k) is not None and k in FLOATING  # noqa: E731
            options = {k: v.double() if is_float(k) else v for k, v in options.items()}
        hidden, weight, bias = inputs
        out = fk.linear_policy_loss(hidden, weight, self.ids, bias=bias, backend=backend, **options)
        out.loss.backward()
        return Solved(out, tuple(None if x is None else x.grad for x in inputs))

    def ulp(self):
        """Of the largest logit, in float32."""
        bias = 0 if self.bias is None else self.bias.double()
        z = (self.hidden.double() @ self.weight.double().t() + bias).abs()
        z = z.max().float() / self.options.get("temperature", 1.0) if z.numel() else torch.zeros(())
        return float(torch.nextafter(z, z + 1) - z)

    def terms(self, out):
        """Part of what cancels in the gradients: a slope is g (1 - p), where p may be near 1."""
        if not len(self.ids):
            return 1.0, 1.0, 1.0
        slope = self.options["token_weight"] * (1 + out.ratio * self.options["advantage"].abs())
        of = slope.max() * self.weight.abs().max(), (slope[:, None] * self.hidden).abs().max()
        return [float(x / 30) for x in (*of, slope.max())]

    def truth(self, **change):
        return self.solve("reference", torch.float64, **change)


def eager(p):
    """(log_prob, gradients) as in training scripts: logits in the head's dtype, then float32."""
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None]
    logits = torch.nn.functional.linear(p.hidden if not inputs else inputs[0], *inputs[1:]).float()
    options = dict(p.options)
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    all_lp = torch.log_softmax(logits / options.get("temperature", 1.0), -1)
    lp = all_lp.gather(1, p.ids[:, None])[:, 0]
    r, a = (lp - options["old_log_prob"]).exp(), options["advantage"]
    loss = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2))
    if "ref_log_prob" in options:
        drift = options["ref_log_prob"] - lp
        loss = loss + options["kl_coef"] * (drift.exp() - drift - 1)
    loss = loss + options.get("entropy_coef", 0.0) * (all_lp.exp() * all_lp).sum(1)
    loss = (options["token_weight"] * loss).sum()
    return lp.detach(), torch.autograd.grad(loss, inputs)


def relative(made, true, least=1e-30):
    """The largest error against the largest value, or `least`."""
    if true is None or true.numel() == 0:
        return 0.0
    largest = true.double().abs().max().clamp_min(least)
    return float((made.double() - true.double()).abs().max() / largest)


def errors(solved, truth, least=(1e-30,) * 3):
    """name -> error: of statistics relative, but to 1 at least; of gradients, to `least`."""
    found = {"loss": float((solved.out.loss.double() - truth.out.loss).detach().abs())}
    for name in STATISTICS:
        made, true = (getattr(x.out, name).double() for x in (solved, truth))
        error = (made - true).abs() / true.abs().clamp_min(1)
        found[name] = float(error.max()) if len(made) else 0.0
    gradients = zip(solved.gradients, truth.gradients, least, strict=True)
    for name, three in zip(("hidden", "weight", "bias"), gradients, strict=True):
        found[name] = relative(*three)
    return found
