"""The one table of calls: every public verb, with the argument sets that all techniques take.

A technique (launches, layouts, transforms, ...) parametrizes over `take`, which leaves out only
what it gives a reason for, and adds what is its own: a predicate, an expected number. So a new op
is its rows here, and the values of arguments that no other op has; test_calls.py holds both ends.
"""

import copy
import inspect
import math
from functools import cached_property

import torch

import flowkern as fk
from flowkern.schedules import Coefficients, multistep_coefficients, sd3_sigmas, step_coefficients

GRID = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)
GIVEN = object()  # an argument that is made by its name; what else stands in a row is a setting
KEY = dict.fromkeys(("seed", "sample_id", "step"), GIVEN)
NOISE, OLD, ROW, HISTORY = ({n: GIVEN} for n in ("noise", "old_velocity", "row", "history"))
GUIDED = {"velocity_uncond": GIVEN, "guidance_scale": 4.5}
KL = {"velocity_ref": GIVEN, "kl_coef": 0.1}
ANCHORS = {"velocity_ref": GIVEN, "velocity_ema": GIVEN, "ref_coef": 0.3, "ema_coef": 0.7}
MEAN, ROUNDED = {"return_mean": True}, {"round_dtype": GIVEN}
DRAWN, REDRAWN = KEY | {"x_next": None}, NOISE | {"x_next": None}
GUARD, NFT, EACH = {"ratio": "guard"}, {"objective": "nft"}, {"reduction": "none"}
OF_EACH = ANCHORS | {"ref_coef": GIVEN, "ema_coef": GIVEN}
NO_WEIGHT = {"nft_beta": 1.5, "weighting": "uniform", "reduction": "sum"}
UNIFORM = {"weighting": "uniform", "reduction": "sum", "clip_low": 0.5, "clip_high": 0.5}
WEIGHTS = {"step_weight": GIVEN, "velocity_ref": GIVEN, "kl_coef": GIVEN}

# verb: (few rows, for techniques that compile, at seconds each, too; more, where a call is cheap).
# Of the few the first stands for the verb. Arguments without a default are always given.
TABLE = {
    "sde_step": (
        {"": KEY, "noise given": NOISE},
        {
            "guided, history": NOISE | GUIDED | HISTORY,
            "mean": KEY | MEAN,
            "rounded": KEY | ROUNDED,
            "guided, history, mean, rounded": NOISE | GUIDED | HISTORY | MEAN | ROUNDED,
        },
    ),
    "ode_step": (
        {"": {"return_x0": True}, "guided, order 3": {"return_x0": True} | GUIDED | HISTORY},
        {},
    ),
    "sde_log_prob": ({"": {}}, {"guided": GUIDED, "mean": MEAN, "guided, mean": GUIDED | MEAN}),
    "policy_loss": (
        {
            "": OLD,
            "on policy": {},
            "siblings": OLD | ROW,
            "drawn again": OLD | DRAWN,
            "guard, KL": OLD | KL | GUARD,
        },
        {
            "on policy, KL": {"velocity_ref": GIVEN, "kl_coef": GIVEN} | EACH,
            "on policy, guard": GUARD,
            "recorded": {"old_log_prob": GIVEN},
            "weights, one edge": OLD | WEIGHTS | EACH | {"c_rows": GRID[3]},
            "guided": OLD | GUIDED,
            "guided, KL": OLD | GUIDED | KL,
            "guided, KL, drawn again": OLD | GUIDED | KL | DRAWN,
            "guard, drawn again": OLD | GUARD | DRAWN,
            "guard, noise given": OLD | GUARD | REDRAWN | {"reduction": "sum"},
            "siblings, all": OLD | ROW | GUIDED | WEIGHTS | DRAWN,
        },
    ),
    "matching_loss": (
        {"": OLD | KEY, "nft, on policy, KL": NFT | KEY | {"velocity_ref": GIVEN, "ref_coef": 0.1}},
        {
            "noise given": OLD | NOISE,
            "siblings": OLD | KEY | ROW,
            "anchors": OLD | NOISE | ANCHORS | EACH,
            "siblings, anchors": NOISE | ROW | ANCHORS,
            "on policy": NOISE,
            "uniform, anchor of no weight": OLD | NOISE | {"velocity_ref": GIVEN} | UNIFORM,
            "t": OLD | KEY | {"weighting": "t"} | EACH,
            "nft": NFT | OLD | NOISE,
            "nft, on policy": NFT | NOISE | {"reduction": "sum"},
            "nft, all": NFT | OLD | KEY | ROW | ANCHORS,
            "t2, of each": OLD | KEY | {"weighting": "t2"} | OF_EACH,
            "huber": OLD | NOISE | {"weighting": "huber"},
            "ghuber, another power": OLD | NOISE | {"ghuber_power": 0.6} | EACH,
            "nft, beta": NFT | OLD | KEY | {"nft_beta": 0.3} | OF_EACH,
            "nft, beta, uniform": NFT | OLD | NOISE | ROW | ANCHORS | NO_WEIGHT,
        },
    ),
    "rescaled_guidance": ({"": GUIDED}, {}),
    "add_noise": ({"": KEY}, {"noise given": NOISE}),
    "philox_normal": ({"": {"stream": "match"}}, {}),
}
# In these kernels differentiate; in one of the others forward mode may.
LEARNED = dict.fromkeys(
    ("sde_log_prob", "policy_loss", "matching_loss", "rescaled_guidance"), "velocity"
)
LIKE_THE_VELOCITY = {"old_velocity", "velocity_uncond", "velocity_ref", "velocity_ema"}
LATENTS = ["x_t", "velocity", "x_next", "noise", "x0", *sorted(LIKE_THE_VELOCITY), "history"]
OF_SAMPLES = {"x_next", "noise", "x0"}  # the other latents: of velocity rows
SOLVERS = {
    "c_rows": multistep_coefficients((0.9, 0.8, 0.7), 2, sde=True),
    "m_rows": multistep_coefficients((0.9, 0.8, 0.7, 0.6), 3),
}
PER_SAMPLE = {  # values from the first sample to the last
    "advantage": (-1, 1),
    "sigma": (0.1, 0.9),
    "step_weight": (0.5, 2),
    "kl_coef": (0.1, 0.3),
    "ref_coef": (0.2, 0.6),
    "ema_coef": (0.9, 0.1),
}


class Call:
    """A row of the table."""

    def __init__(self, verb, name, given, is_few=False, is_first=False):
        self.verb, self.name, self.is_few, self.is_first = verb, name, is_few, is_first
        self.function = getattr(fk, verb)
        parameters = inspect.signature(self.function).parameters.values()
        required = {p.name: GIVEN for p in parameters if p.default is p.empty}
        self.given = required | given
        if verb == "policy_loss":  # what is clipped has no gradient to compare
            self.given |= {"clip_low": 0.9, "clip_high": 9.0}
        self.learned = LEARNED.get(verb)
        self.op = self.function.__module__.split(".")[2].replace("_common", "noise")

    def __str__(self):
        return f"{self.verb}, {self.name}".removesuffix(", ")

    def but(self, name=None, **given):
        """The same call with more given, or another setting."""
        return Call(self.verb, name or self.name, self.given | given)

    def has(self, *names):
        """Whether all of them are given."""
        return all(self.given.get(name) not in (None, 0.0) for name in names)


CALLS = [
    Call(verb, name, given, is_few=rows is few, is_first=rows is few and name == next(iter(few)))
    for verb, (few, more) in TABLE.items()
    for rows in (few, more)
    for name, given in rows.items()
]
BY_NAME = {str(call): call for call in CALLS}
ONE_OF_EACH = ("seconds each: one row of a verb", lambda call: not call.is_first)
FEW = ("a second each, to compile", lambda call: not call.is_few)


class Taken(list):
    """The calls of a technique; `left_out`: the reason of each other one."""


def take(*reasons):
    """Every call but those that a reason is for: (words, whether it holds for a call)."""
    for words, holds in reasons:
        assert words and any(map(holds, CALLS)), f"a reason for nothing: {words!r}"
    taken = Taken(call for call in CALLS if not any(holds(call) for _, holds in reasons))
    taken.left_out = {
        call: [words for words, holds in reasons if holds(call)]
        for call in CALLS
        if call not in taken
    }
    return taken


def _keeps_nothing(call):
    if call.verb == "policy_loss":
        return not (call.has("old_velocity") or call.has("old_log_prob"))
    return call.given.get("objective") == "nft" and call.has("old_velocity")


# Losses of float32 that keep their residual for the backward pass; and with samples that are
# clipped and have none to multiply.
KEEPING = take(
    ("is no loss", lambda call: not call.verb.endswith("_loss")),
    ("has siblings", lambda call: call.has("row")),
    ("reads no latent forward, or has two residuals", _keeps_nothing),
)
KEEPING.append(BY_NAME["policy_loss"].but(name="clipped"))
# Native kernels keep the residual, but where they keep the mean.
REPLAYS = [c for c in CALLS if c.verb == "sde_log_prob" and not c.has("return_mean")]


def twice(p, backend):
    """Backward twice: the residual becomes the gradient once, with the bits of the other way."""
    if p.call.name == "clipped":
        velocity, old, x_next = (p[name] for name in ("velocity", "old_velocity", "x_next"))
        x_next[-1] = torch.copysign(x_next[-1] + torch.inf, (old - velocity)[-1]).detach()  # b < 0
    out = p.call.function(**p.arguments, backend=backend)
    result = out if isinstance(out, torch.Tensor) else out.loss
    kept = result.grad_fn.kept
    first, again = (
        torch.autograd.grad(result, p[p.call.learned], p.weight, retain_graph=True)[0]
        for _ in range(2)
    )
    assert kept.data_ptr() == first.data_ptr() != again.data_ptr()
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    if p.call.name == "clipped":
        assert out.clipped_high[-1] and not first[-1].any() and first[:-1].isfinite().all()


class Problem:
    """The arguments of a call by their names, in memory that stays, as a CUDA graph needs it, and
    the gradient that comes in.

    batch: velocity rows; with `row` made there are two samples to each. size: of a latent.
    """

    def __init__(self, call, batch=3, size=(40,), dtype=torch.float32, velocity=None, device="cpu"):
        self.call, self.batch, self.device = BY_NAME.get(call, call), batch, device
        self.seed = 0  # of values
        given = self.call.given
        row = given.get("row")
        self.samples = batch if row is None else 2 * batch if row is GIVEN else len(row)
        self.size = (size,) if isinstance(size, int) else size
        # States that are drawn again have no other dtype.
        self.state = torch.float32 if given.get("x_next", GIVEN) is None else dtype
        self.of_velocity = velocity or dtype
        self.arguments = {n: self.made(n) if v is GIVEN else v for n, v in given.items()}
        for name, value in self.arguments.items():
            if isinstance(value, Coefficients):
                self.arguments[name] = value.to(device, torch.float32)
        is_scalar = "reduction" in inspect.signature(self.call.function).parameters
        is_scalar &= given.get("reduction") != "none"
        like = (self.samples, *(self.size if self.call.op == "guidance" else ()))
        weight = torch.linspace(-1, 2, math.prod(like)).reshape(like)
        weight = torch.ones(()) if is_scalar else weight
        self.weight = weight.to(device)
        self.more_weights = []  # of what is differentiable beside the first result: the mean
        if self.call.learned and self.call.has("return_mean"):
            shape = self._shape_of("velocity")
            of_mean = self._values(shape, len(LATENTS)) / max(1, math.prod(shape[1:]))
            self.more_weights = [of_mean.to(device)]
        if self.call.learned:
            self[self.call.learned].requires_grad_()

    def __getitem__(self, name):
        return self.arguments[name]

    def made(self, name):
        """An argument by its name: the same values on every device, wherever it occurs."""
        if name in PER_SAMPLE:
            return torch.linspace(*PER_SAMPLE[name], self.samples).to(self.device)
        if name in LATENTS:
            return self._latent(name)
        return getattr(self, f"_{name}")()

    def _shape_of(self, name):
        return (self.samples if name in OF_SAMPLES else self.batch, *self.size)

    def _dtype_of(self, name):
        if name == "noise" and self.call.learned:
            return torch.float32
        return self.of_velocity if "velocity" in name else self.state

    def _latent(self, name):
        shape, number = self._shape_of(name), LATENTS.index(name)
        x = self._values(shape, number)
        if name == "history":
            count = SOLVERS["m_rows" if "m_rows" in self.call.given else "c_rows"].num_history
            earlier = [x, *(self._values(shape, number + j) for j in range(1, count))]
            return [h.to(self.device, self.state) for h in earlier]
        if name == "velocity":  # near the old one
            x = self._values(shape, LATENTS.index("old_velocity")) + 0.01 * x
        elif name == "x_next":  # near the state that it comes from
            from_x = self._values(self._shape_of("x_t"), LATENTS.index("x_t"))
            x = from_x[self._row_of_samples()] + 0.3 * x
        return x.to(self.device, self._dtype_of(name))

    def _values(self, shape, number):
        """Standard normals that come again and again: to draw them all would take longest."""
        count = torch.Size(shape).numel()
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        x = torch.randn(min(count, 65_521), generator=generator)
        return x.repeat(-(-count // max(1, len(x))))[:count].view(shape)

    def _c_rows(self):
        rows = GRID[torch.arange(self.samples) % 9]
        return SOLVERS["c_rows"] if "history" in self.call.given else rows

    def _m_rows(self):
        return SOLVERS["m_rows"] if "history" in self.call.given else self._c_rows()

    def _row(self):
        """Siblings apart, and a row without samples."""
        return torch.arange(self.samples, device=self.device).flip(0) % max(1, self.batch - 1)

    def _row_of_samples(self):
        row = self.call.given.get("row")
        return self._row().cpu() if row is GIVEN else slice(None) if row is None else row

    def _old_log_prob(self):
        x_t, old = (self.made(name)[self._row_of_samples()] for name in ("x_t", "old_velocity"))
        x_next, rows = self.made("x_next"), self.made("c_rows").to(self.device, torch.float32)
        return fk.sde_log_prob(x_t, old, x_next, rows, backend="reference")

    def _patch(self):
        """Two rows and two columns, where that is what they can be parted into."""
        return tuple(2 - n % 2 for n in (1, 1, *self.size[1:])[-2:])

    def _shape(self):
        return self.samples, *self.size

    def _round_dtype(self):
        return torch.float16 if self.state == torch.float16 else torch.bfloat16

    def _seed(self):
        return 2**64 - 5

    def _sample_id(self):
        return torch.arange(self.samples, device=self.device) * (2**33 + 977) - 5

    def _step(self):
        return 4

    @cached_property
    def latents(self):
        """The names of arguments that have the shape of latents; of a history that of the first."""
        found = {n: v[0] if isinstance(v, list) else v for n, v in self.arguments.items()}
        return [n for n, v in found.items() if isinstance(v, torch.Tensor) and v.ndim > 1]

    def run(self, backend=None, learn=True, **change):
        """All results, and the gradient where kernels make one."""
        arguments = self.arguments | change
        out = self.call.function(**arguments, backend=backend)
        out = tuple(out) if isinstance(out, tuple) else (out,)
        if learn and self.call.learned:
            weights = [self.weight, *self.more_weights]
            learned = arguments[self.call.learned]
            out += torch.autograd.grad(out[: len(weights)], learned, weights)
        return out

    def changed(self, change):
        """The same call with `change` of every tensor."""

        def of(value):
            if isinstance(value, torch.Tensor):
                return change(value.detach()).requires_grad_(value.requires_grad)
            if isinstance(value, Coefficients):
                return Coefficients(change(value.table), value.num_history)
            return list(map(of, value)) if isinstance(value, list) else value

        other = copy.copy(self)
        other.arguments = {name: of(value) for name, value in self.arguments.items()}
        other.weight, other.more_weights = of(self.weight), of(self.more_weights)
        return other

    def double(self):
        return self.changed(lambda x: x.double() if x.is_floating_point() else x)

    def to(self, device):
        """The same values on another device, or once more on this one."""
        other = self.changed(lambda x: x.to(device, copy=True))
        other.device = device
        return other

    def renew(self, seed):
        """Other values in the same memory."""
        self.seed = seed
        listed = lambda x: x if isinstance(x, list) else [x]  # noqa: E731
        with torch.no_grad():
            for name in (n for n in (*LATENTS, "old_log_prob") if self.call.given.get(n) is GIVEN):
                for x, y in zip(listed(self[name]), listed(self.made(name)), strict=True):
                    x.copy_(y)
