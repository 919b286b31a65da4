"""The table of calls that tests and tools of the kernels go through: every verb, its directions."""

import copy

import torch

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

GRID = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)


class Arguments:
    """Of every verb, in memory that stays, as a CUDA graph needs it."""

    def __init__(self, device, batch=8, size=65_536, dtype=torch.float32):
        self.device, self.shape = device, (batch, size)
        self.rows = GRID[torch.arange(batch) % 9].to(device, torch.float32)
        ids = torch.arange(batch, device=device) * 977 + 5
        self.key = {"seed": 3, "sample_id": ids, "step": 4}
        self.noise, self.x, self.old, self.ref = (self.random(i, dtype) for i in range(4))
        self.v = (self.old.float() + 1e-3 * self.random(4)).to(dtype).requires_grad_()
        self.x_next = fk.sde_step(self.x, self.old, self.rows, **self.key, backend="reference")[0]
        self.advantage = torch.linspace(-1, 1, batch, device=device)
        self.sigma = torch.linspace(0.1, 0.9, batch, device=device)
        self.one = torch.ones((), device=device)
        self.of_samples = torch.linspace(-1, 2, batch, device=device)

    def random(self, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)  # the host's: the same on every device
        return torch.randn(self.shape, generator=generator).to(self.device, dtype)

    def renew(self, seed):
        with torch.no_grad():
            for i, x in enumerate((self.x, self.v, self.noise)):
                x.copy_(self.random(10 * seed + i))

    def to(self, device):
        """The same values on another device."""
        other = copy.copy(self)
        other.device, other.rows = device, self.rows.to(device)
        other.key = self.key | {"sample_id": self.key["sample_id"].to(device)}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved = value.detach().to(device, copy=True)
                setattr(other, name, moved.requires_grad_(value.requires_grad))
        return other

    def inputs(self):
        return [self.noise, self.x, self.old, self.ref, self.v, self.x_next]


def policy(p, backend, **more):
    given = {"x_next": p.x_next, "old_velocity": p.old} | more
    x_next, clip = given.pop("x_next"), {"clip_low": 0.5, "clip_high": 0.5}
    return fk.policy_loss(p.v, p.x, x_next, p.rows, p.advantage, **given, **clip, backend=backend)


def matching(p, backend, **more):
    return fk.matching_loss(p.v, p.x, p.sigma, p.advantage, **p.key, **more, backend=backend)


def trained(p, out):
    return (*out, *torch.autograd.grad(out.loss, p.v, p.one))


def replayed(p, backend):
    log_prob = fk.sde_log_prob(p.x, p.v, p.x_next, p.rows, backend=backend)
    return log_prob, *torch.autograd.grad(log_prob, p.v, p.of_samples)


# name: (call, launches): one per draw, at most two per direction of a loss.
VERBS = {
    "draw": (lambda p, b: fk.sde_step(p.x, p.v, p.rows, **p.key, backend=b), 1),
    "draw, noise given": (lambda p, b: fk.sde_step(p.x, p.v, p.rows, p.noise, backend=b), 1),
    "ode": (lambda p, b: fk.ode_step(p.x, p.v, p.rows, return_x0=True, backend=b), 1),
    "replay": (
        lambda p, b: (fk.sde_log_prob(p.x, p.v.detach(), p.x_next, p.rows, backend=b),),
        1,
    ),
    "replay, gradient": (replayed, 2),
    "policy": (lambda p, b: policy(p, b), 2),
    "policy, gradient": (lambda p, b: trained(p, policy(p, b)), 4),
    "policy, drawn again": (lambda p, b: trained(p, policy(p, b, x_next=None, **p.key)), 4),
    "policy, guard, KL": (
        lambda p, b: trained(p, policy(p, b, ratio="guard", velocity_ref=p.ref, kl_coef=0.04)),
        4,
    ),
    "matching": (lambda p, b: matching(p, b, old_velocity=p.old), 2),
    "matching, gradient": (lambda p, b: trained(p, matching(p, b, old_velocity=p.old)), 4),
    "matching, nft": (
        lambda p, b: trained(p, matching(p, b, objective="nft", velocity_ref=p.ref, ref_coef=0.1)),
        4,
    ),
    "add_noise": (lambda p, b: (fk.add_noise(p.x, p.sigma, **p.key, backend=b),), 1),
    "philox_normal": (lambda p, b: (fk.philox_normal(p.shape, **p.key, backend=b),), 1),
}

# What the noise of a stored state cannot be drawn again for.
FLOAT32_ALONE = {"policy, drawn again"}


def takes(verb, dtype):
    """Whether a verb takes states of this dtype."""
    return dtype == torch.float32 or verb not in FLOAT32_ALONE


def call(verb, p, backend):
    """The results, by this backend: every op has its kernel, a refusal is a failure."""
    return tuple(VERBS[verb][0](p, backend))
