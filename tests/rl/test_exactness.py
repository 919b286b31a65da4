"""The engine does what the plainest loop does: one sample, one network call, one loss at a time.

`naive` walks every sample alone, as the papers say, and knows neither trees nor batches. Here the
engine runs the same rollout, in float64 with the reference backend: its latents, rewards,
advantages and the gradients of its optimizer steps have to be the loop's to 1e-10.

P prompts, L images and C choices (trained steps, or points to match at) of each.
"""

import dataclasses
import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import naive
import pytest
import torch

from flowkern.rl.algorithms import names, recipe
from flowkern.rl.cost import network_calls
from flowkern.rl.plans import cost_of, plans_of
from flowkern.rollout import (
    Blocks,
    Deal,
    Source,
    batch,
    network_batches,
    prompt_ids,
    run,
    takes_part,
)
from flowkern.schedules import sd3_sigmas, shifted_sigmas

SHAPE, SEED, SLOTS, UNCOND = (2, 4, 4), 11, (0, 1, 2, 3), 4
CLIP, STRIDE, WEIGHTS = 1e-4, 0.3, {"likeness": 1.0, "tone": 2.0}


tensor = partial(torch.tensor, dtype=torch.float64)


class Network(torch.nn.Module):
    """Two layers; the noise level and the prompt are inputs."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(33, 24)
        self.prompt = torch.nn.Embedding(1 + UNCOND, 24)
        self.second = torch.nn.Linear(24, 32)
        self.calls = 0
        self.double()

    def forward(self, x_t, sigma, prompt):  # (B, *D), (B,), (B,)
        hidden = self.first(torch.cat([x_t.flatten(1), sigma[:, None]], 1)) + self.prompt(prompt)
        return self.second(torch.tanh(hidden)).view_as(x_t)

    def one(self, x, sigma, slot):
        """The same for one sample, as the loop calls it."""
        return self(x[None], tensor([sigma]), torch.tensor([slot]))[0]

    def of(self, slots):
        """The same for prompts counted from 0, as the engine calls it; the last is no prompt."""
        table = torch.cat([slots, torch.tensor([UNCOND])])

        def velocity(x_t, sigma, prompt, _):
            self.calls += len(x_t)
            return self(x_t, sigma, table[prompt])

        return velocity

    def take_gradient(self):
        """(weights,); and clear it."""
        gradient = torch.cat([p.grad.flatten() for p in self.parameters()])
        self.zero_grad()
        return gradient

    @torch.no_grad()
    def descend(self, gradient):
        """An optimizer step, far enough that some of what follows is clipped."""
        weights = torch.nn.utils.parameters_to_vector(self.parameters())
        moved = weights - STRIDE * torch.nn.functional.normalize(gradient, dim=0)
        torch.nn.utils.vector_to_parameters(moved, self.parameters())


def networks():
    """The weights that learn, under None, and the others that take part."""
    copies = "reference", "old", "ema", "sampling", "anchor", "teacher"
    return {None: Network(0), **{name: Network(1 + i) for i, name in enumerate(copies)}}


def score(image, slot):
    """Three rewards of one image."""
    target = torch.linspace(-1, 1, image.numel(), dtype=torch.float64).view(SHAPE).roll(slot, 2)
    likeness = -(image.double() - target).abs().mean()
    tone = float(image.double().mean().tanh())
    return {"likeness": float(likeness), "tone": tone, "apart": float(image.double().std())}


@dataclass
class Case:
    """An algorithm at a small size, and what the loop needs to know of it."""

    name: str
    options: dict
    ways: Callable
    """(sigmas, trained steps of every member) -> the walks of a prompt."""
    credit: dict
    """Options of naive.mixed and naive.advantages."""
    kl_coef: float = 0.0
    guard: bool = False
    threshold: float | None = None
    """Of Flow-DPPO's mask, in place of a clip range."""
    matching: Callable | None = None
    """(networks, x0, noise, sigma, slot, advantage) -> loss."""
    worth: Callable | None = None
    """(rewards of a prompt, move, member, step, steps) -> what it is worth, where moves are
    compared with those of their step, in place of images."""
    group_matching: Callable | None = None
    """(networks, [(x0, noise, sigma, slot, advantage)] of a group) -> loss of all of it."""
    best_of: int | None = None
    weights: dict = field(default_factory=lambda: WEIGHTS)
    teacher_scale: float | None = None
    """Of the guidance of a teacher, from which alone is learned."""
    kl_share: float | None = None
    """Of the images, those that have a KL; the good ones count by how far they are `apart`."""
    unit: float = 1.0  # what the package's advantages are multiplied by, over the loop's
    grid: Callable = sd3_sigmas
    iteration: int = 0

    @property
    def recipe(self):
        return recipe(self.name)(**self.options, prompts_per_rollout=len(SLOTS))

    @property
    def plans(self):
        return plans_of(self.recipe, sd3_sigmas, self.iteration, SEED)

    @property
    def needs_all(self):
        return self.recipe.objective(None).needs_all

    @property
    def few(self):
        """As many rows as a batch has at least, and 2 at least."""
        return self.recipe.group_size if self.recipe.objective(None).compares else 2


@dataclass
class Result:
    latents: torch.Tensor
    """(P, L, *D)"""
    rewards: torch.Tensor
    """(P, L), the first of them; advantage: (P, C)"""
    advantage: torch.Tensor
    gradients: torch.Tensor
    """(optimizer steps, weights)"""
    batches: list = field(default_factory=list)
    """The engine's: of every optimizer step and rank, the network calls of each batch."""
    clipped: list[int] = field(default_factory=list)
    """The engine's: clipped choices of every optimizer step."""
    calls: list[int] = field(default_factory=list)
    """The engine's: of all networks, in sampling and in every optimizer step."""


def by_name(scores, names):
    """{reward: (P, L) of it}"""
    return {name: [[one[name] for one in images] for images in scores] for name in names}


def engine(
    case, max_batch=1000, ranks=1, dtype=torch.float64, flat=(), failed=lambda *_: False, size=None
):
    """The package, with the parts of `ranks` processes one after another, `size` prompts of each at
    a time.

    flat: slots whose images all have the same rewards. failed: (slot, image) -> has it none?
    """
    algorithm, plans = case.recipe, case.plans
    nets = {name: net.to(dtype) for name, net in networks().items()}
    updates = algorithm.updates_per_rollout
    each = len(SLOTS) // updates // ranks  # prompts of a rank in an optimizer step
    # Every optimizer step sees the same prompts, however many ranks share them.
    slots = torch.tensor(SLOTS).view(updates, ranks, each).transpose(0, 1).flatten(1)
    order, uncond = slots.flatten().argsort(), slots.shape[1]

    rollouts, latents = [], []
    for mine in slots:
        velocity = nets[algorithm.sampler].of(mine)

        def walk(layout, source, velocity=velocity):
            guidance = algorithm.guidance(uncond)
            keep = {"keep_velocity": updates > 1, "keep_uncond": max(0, each - source.first)}
            return run(layout, velocity, source, max_batch, guidance, **keep, backend="reference")

        source = Source(SEED, prompt_ids(case.iteration, mine), SHAPE, dtype)
        blocks = Blocks(walk, source, Deal.dealt(plans, mine), size, each)
        latents += [leaves for _, leaves in blocks]
        rollouts.append(blocks.rollout)
    latents = torch.cat(latents)
    scores = [
        [score(image * (slot not in flat), slot) for image in images]
        for slot, images in zip(slots.flatten().tolist(), latents, strict=True)
    ]
    rewards = {name: tensor(table) for name, table in by_name(scores, scores[0][0]).items()}
    for row, slot in enumerate(slots.flatten().tolist()):
        for image in range(latents.shape[1]):
            if failed(slot, image):
                rewards["likeness"][row, image] = torch.nan
    if ranks == 1 and case.teacher_scale is None:
        spoil(rollouts[0], rewards["likeness"].isnan())
    credit, shape = algorithm.credit(), (ranks, uncond, -1)
    advantage = credit(rewards, case.weights, plans[0]).view(shape)
    kl_weight = credit.kl_weight(rewards, case.weights, plans[0])
    kl_weight = [None] * ranks if kl_weight is None else kl_weight.view(shape)

    objective = algorithm.objective_at(uncond)
    objective = dataclasses.replace(objective, backend="reference")
    gradients, batches, clipped, calls = [], [], [], [0]

    def count():
        calls.append(sum(net.calls for net in nets.values()) - sum(calls))

    count()
    for update, share in enumerate(torch.arange(uncond).view(updates, each)):
        is_on_policy = update == 0 and algorithm.sampler is None
        choices = max(1, int((~advantage[:, share].isnan()).sum())) / ranks
        batches.append([])
        clipped.append(0)
        for rank, rollout in enumerate(rollouts):
            velocity = {name: net.of(slots[rank]) for name, net in nets.items()}
            anchors = {name: velocity[name] for name in objective.anchors}
            how = objective.needs_all, objective.compares
            parts = network_batches(rollout.layout, advantage[:, share], rank, max_batch, *how)
            for site, prompt in parts:
                credited = advantage[rank], is_on_policy, kl_weight[rank]
                part = batch(rollout, site, share[prompt], *credited)
                out = objective(part, velocity[None], anchors)
                if not takes_part(rollout.layout, advantage[rank], site, share[prompt]):
                    out = out.nothing()
                (out.loss / choices / ranks).backward()
                said = out.statistics
                assert not is_on_policy or (said["ratio_mean"] == 1).all()
                is_clipped = said["pg_clipfrac_lower"] | said["pg_clipfrac_higher"]
                clipped[-1] += int(is_clipped.sum())
            batches[-1].append([len(site) for site, _ in parts])
        gradients.append(nets[None].take_gradient())
        nets[None].descend(gradients[-1])
        count()
    found = latents, rewards["likeness"], advantage.flatten(0, 1)
    return Result(*(x[order] for x in found), torch.stack(gradients), batches, clipped, calls[1:])


def spoil(rollout, is_failed):
    """What leads to failed images (P, L) alone becomes NaN, which whatever sees it would spread."""
    for prompt, which in enumerate(rollout.deal.of.tolist()):
        layout = rollout.deal.layouts[which]
        plan = layout.plan
        at = {node: bool(is_failed[prompt, leaf]) for node, leaf in plan.leaves.items()}
        for i in reversed(range(len(plan.nodes))):  # children come later
            parent = plan.nodes[i].parent
            at[parent] = at.get(parent, True) and at[i]
        kept = sorted({*plan.origins, *plan.trained})
        rollout.states[[i for i, node in enumerate(kept) if at[node]], prompt] = torch.nan
        if rollout.latents is not None:
            rollout.latents[prompt, is_failed[prompt]] = torch.nan


def loop(case, failed=lambda *_: False):
    """The naive loop, with the same split of the prompts into optimizer steps."""
    algorithm, plans, nets = case.recipe, case.plans, networks()
    network, updates = nets[None], algorithm.updates_per_rollout
    sampler, scale = nets[algorithm.sampler].one, algorithm.guidance_scale
    world = naive.World(sampler, SHAPE, SEED, case.iteration, scale, UNCOND)
    sigmas = case.grid(algorithm.num_inference_steps).tolist()
    ways = [case.ways(sigmas, trained_steps(plans[slot])) for slot in SLOTS]
    images, moves = zip(*(naive.sample(world, slot, ways[slot]) for slot in SLOTS), strict=True)
    scores = [[score(image, slot) for image in images[slot]] for slot in SLOTS]
    rewards, groups = by_name(scores, scores[0][0]), [way.group for way in ways[0]]
    for table in rewards.values():  # one that is missing takes the others along
        for slot in SLOTS:
            row = enumerate(table[slot])
            table[slot] = [math.nan if failed(slot, image) else r for image, r in row]
    if case.teacher_scale is not None:
        failed = lambda *_: False  # noqa: E731
    advantage = naive.mixed(
        {name: rewards[name] for name in case.weights}, case.weights, groups, **case.credit
    )
    has_kl = [[True] * len(groups)] * len(SLOTS)
    if case.kl_share:
        advantage = naive.by_distance(advantage, rewards["apart"])
        has_kl = naive.uncertain(rewards["likeness"], [rewards["tone"]], case.kl_share)
    if case.worth:
        steps = algorithm.num_inference_steps
        of_moves = {
            name: [
                [case.worth(table[slot], move, *key, steps) for key, move in moves[slot].items()]
                for slot in SLOTS
            ]
            for name, table in rewards.items()
            if name in case.weights
        }
        own = naive.mixed(of_moves, WEIGHTS, [step for _, step in moves[0]], **case.credit)

    def loss(slot, number, choice, a):
        if case.matching is None:
            if case.teacher_scale is not None:
                told = nets["teacher"].one, case.teacher_scale, algorithm.uncond_gradient
                return naive.distillation_loss(world, network.one, choice, *told)
            kl_coef = case.kl_coef * has_kl[slot][choice.images[0]]
            anchor = nets[getattr(algorithm, "anchor", "reference")].one
            options = CLIP, kl_coef, anchor, case.guard, case.threshold
            return naive.policy_loss(world, network.one, choice, a, *options)
        image, sigma = choice  # the noise over an image is its member's, of step `number`
        noise = world.noise(slot, image, number, "match")
        return case.matching(nets, images[slot][image], noise, sigma, slot, a)

    table, gradients = [], []
    for share in torch.tensor(SLOTS).view(updates, -1).tolist():
        taught = 0
        for slot in share:
            kept = naive.extremes(advantage[slot], case.best_of)
            # Those that are kept speak for all that have a reward.
            speaks_for = sum(a == a for a in advantage[slot]) / max(1, len(kept))
            table.append([])
            if case.group_matching:
                shares = algorithm.use_shared_noise
                groups_of, row = grouped(
                    plans[slot].points, shares, world, slot, images[slot], advantage[slot], failed
                )
                table[-1] += [case.unit * a for a in row]
                for group in groups_of:
                    taught += len(group)
                    case.group_matching(nets, group).backward()
                continue
            choices = plans[slot].points if case.matching else moves[slot].values()
            for number, choice in enumerate(choices):
                of = [choice[0]] if case.matching else choice.images
                of = [image for image in of if not failed(slot, image)]
                if not of or (case.worth and math.isnan(own[slot][number])):
                    table[-1].append(math.nan)
                    continue
                total = sum(advantage[slot][image] for image in of)
                a = naive.clamp(own[slot][number] if case.worth else total)
                a = a if case.teacher_scale is None else 0.0
                table[-1].append(a * case.unit * speaks_for if of[0] in kept else 0.0)
                if of[0] in kept:
                    taught += speaks_for
                    (speaks_for * loss(slot, number, choice, a)).backward()
        gradients.append(network.take_gradient() / taught)
        network.descend(gradients[-1])
    latents = torch.stack([torch.stack(row) for row in images])
    return Result(latents, tensor(rewards["likeness"]), tensor(table), torch.stack(gradients))


def grouped(points, shares, world, slot, images, advantage, failed):
    """The points of a prompt by noise level, without failed images, and all their advantages.

    shares: at a level all images have the noise of the first.
    """
    groups, row, first = {}, [], {}
    for number, (image, sigma) in enumerate(points):
        own = image, number
        noise = first.setdefault(sigma, own) if shares else own
        row.append(math.nan if failed(slot, image) else naive.clamp(advantage[image]))
        if not failed(slot, image):
            point = images[image], world.noise(slot, *noise, "match"), sigma, slot, row[-1]
            groups.setdefault(sigma, []).append(point)
    return groups.values(), row


# ---- the algorithms ----


def trained_steps(plan):
    """The steps that every member of a prompt trains: what chance, or a rule, has chosen."""
    ends = [plan.nodes[i] for i in plan.trained]
    members = range(1 + max((node.member for node in ends), default=-1))
    return [{node.depth - 1 for node in ends if node.member == m} for m in members]


shifted = partial(shifted_sigmas, shift=3.0)
SMALL = {"num_inference_steps": 5, "group_size": 3, "updates_per_rollout": 2, "clip_range": CLIP}
PLAIN = {"guidance_scale": 1.0, "kl_coef": 0.0}
GUIDED = {"guidance_scale": 2.5, "kl_coef": 0.05}
POPULATION, ALL_STD = {"eps": 1e-4}, {"eps": 1e-4, "all_std": True}
RISING = [0.3, 0.5, 0.7, 0.9, 1.1]
UNBIASED = {"eps": 1e-8, "unbiased": True, "mix": "mean"}


MIXED = {"num_inference_steps": 8, "window": 2, "window_iterations": 5}
EXAMPLE = Path(__file__).parents[2] / "examples/own_sampler.py"
OWN_SAMPLER = runpy.run_path(str(EXAMPLE))["precise"]


def policy(name, options, *rest, **more):
    return Case(name, SMALL | options, *rest, **more)


def drawn(*how):
    return lambda sigmas, _: naive.all_drawn(sigmas, 3, *how)


CASES = {
    "flow_grpo": policy("flow_grpo", GUIDED, drawn("flow_sde", 0.7), ALL_STD, kl_coef=0.05),
    "flow_grpo, one update": policy(
        "flow_grpo", PLAIN | {"updates_per_rollout": 1}, drawn("flow_sde", 0.7), ALL_STD
    ),
    "flow_grpo, a noise level for each step, undivided": policy(
        "flow_grpo", PLAIN | {"noise_level": RISING, "scale_rewards": False},
        drawn("flow_sde", RISING), ALL_STD | {"divided": False},
    ),
    "cps": policy(
        "flow_grpo", PLAIN | {"sde_type": "cps", "noise_level": 0.8}, drawn("cps", 0.8), ALL_STD
    ),
    "flow_grpo_fast": policy(
        "flow_grpo_fast", {"num_inference_steps": 8},
        lambda sigmas, steps: naive.window(sigmas, steps[0], 3, "cps", 0.8, True), ALL_STD,
    ),
    "flow_grpo_fast, a window for each prompt": policy(
        "flow_grpo_fast", GUIDED | {"num_inference_steps": 8, "window": 2,
        "window_per_prompt": True},
        lambda sigmas, steps: naive.window(sigmas, steps[0], 3, "cps", 0.8, True), ALL_STD,
        kl_coef=0.05,
    ),
    "flow_grpo_fast, branching for each prompt": policy(
        "flow_grpo_fast", {"num_inference_steps": 8, "branching": True, "window_per_prompt": True},
        lambda sigmas, steps: naive.window(sigmas, steps[0], 3, "cps", 0.8), ALL_STD,
    ),
    "flash_grpo": policy(
        "flash_grpo", PLAIN | {"num_inference_steps": 8},
        lambda sigmas, steps: naive.rectified(
            sigmas, steps[0], 3, 4, "dance_sde", [s * sigmas[1] for s in sigmas]
        ),
        ALL_STD,
    ),
    "flash_grpo, cps, guidance and KL": policy(
        "flash_grpo", GUIDED | {"num_inference_steps": 6, "timestep_fraction": 0.9,
        "sde_type": "cps", "noise_level": 0.8, "uncond_gradient": False},
        lambda sigmas, steps: naive.rectified(sigmas, steps[0], 3, 5, "cps", [0.8] * 6), ALL_STD,
        kl_coef=0.05, iteration=2,
    ),
    "flow_grpo_fast, branching": policy(
        "flow_grpo_fast", {"num_inference_steps": 8, "branching": True, "guidance_scale": 2.5},
        lambda sigmas, steps: naive.window(sigmas, steps[0], 3, "cps", 0.8), ALL_STD, iteration=2,
    ),
    **{f"flow_dppo{form}": Case(
        "flow_dppo",
        {"num_inference_steps": 8, "group_size": 3, "kl_mask_threshold": threshold} | more,
        lambda sigmas, steps: naive.window(sigmas, steps[0], 3, "flow_sde", 0.7, True),
        ALL_STD, threshold=threshold, kl_coef=more.get("kl_coef", 0.0), iteration=2,
    ) for form, threshold, more in (("", 3e-5, {}), (", guidance and KL", 3e-4, GUIDED))},
    **{f"gardo{form}": policy(
        "gardo",
        {"group_size": 4, "timestep_fraction": 0.5, "kl_share": 0.3, "auxiliary_rewards": ["tone"],
        "diversity_reward": "apart", "scale_rewards": divided} | more,
        lambda sigmas, _, m=more: naive.gardo(sigmas, 4, 2, "init_same_noise" in m),
        ALL_STD | {"divided": divided}, kl_coef=more["kl_coef"], weights={"likeness": 1.0},
        kl_share=0.3,
    ) for form, divided, more in (
        ("", False, GUIDED),
        (", noises apart, divided", True, PLAIN | {"init_same_noise": False, "kl_coef": 0.5}),
    )},
    **{f"diffusion_opd, noise {level}{form}": Case(
        "diffusion_opd", {
            "num_inference_steps": 5, "group_size": size, "noise_level": level,
            "guidance_scale": scale, "uncond_gradient": both, "teacher_guidance_scale": of_teacher,
        },
        lambda sigmas, _, size=size, level=level: naive.gardo(sigmas, size, 4, True, level),
        ALL_STD, teacher_scale=of_teacher,
    ) for form, size, level, scale, of_teacher, both in (
        ("", 1, 0.0, 1.0, 1.0, False),
        ("", 2, 0.7, 2.5, 1.5, False),
        (", both halves", 1, 0.0, 2.5, 1.0, True),
    )},
    "grpo_guard": policy(
        "grpo_guard", PLAIN, drawn("flow_sde", 0.7, lambda s, n: 1 / (s - n)), POPULATION,
        guard=True,
    ),
    "dance_grpo": policy(
        "dance_grpo", {}, lambda sigmas, steps: naive.dance_grpo(sigmas, steps), UNBIASED,
        grid=shifted,
    ),
    "dance_grpo, best and worst": policy(
        "dance_grpo", {"group_size": 8, "best_of": 2},
        lambda sigmas, steps: naive.dance_grpo(sigmas, steps), UNBIASED,
        grid=shifted, best_of=2,
    ),
    "mixgrpo": policy(
        "mixgrpo", MIXED,
        lambda sigmas, _: naive.window(sigmas, range(2, 4), 3, "flow_sde", 0.7),
        UNBIASED, grid=shifted, iteration=10,
    ),
    "mixgrpo, cps": policy(
        "mixgrpo", MIXED | {"sde_type": "cps", "noise_level": 0.8},
        lambda sigmas, _: naive.window(sigmas, range(2, 4), 3, "cps", 0.8),
        UNBIASED, grid=shifted, iteration=10,
    ),
    "mixgrpo, one's own": policy(
        "mixgrpo", MIXED | {"sde_type": OWN_SAMPLER, "noise_level": 1.2},
        lambda sigmas, _: naive.window(sigmas, range(2, 4), 3, "precise", 1.2),
        UNBIASED, grid=shifted, iteration=10,
    ),
    "mixgrpo_flash": policy(
        "mixgrpo_flash", {"num_inference_steps": 12, "window": 2, "window_iterations": 5},
        lambda *_: naive.flash(12, range(1, 3), 3, 0.4), UNBIASED, iteration=5,
    ),
    "mixgrpo_flash_star": policy(
        "mixgrpo_flash_star", {"num_inference_steps": 25},
        lambda *_: naive.flash(25, range(4), 3, 0.2), UNBIASED, iteration=200,
    ),
    "pref_grpo": policy(
        "pref_grpo", {"group_size": 4},
        lambda sigmas, steps: naive.dance_grpo(sigmas, steps, 0.7, "flow_sde"),
        {"eps": 1e-8, "unbiased": True, "mix": "sum", "by_wins": True}, grid=shifted,
    ),
    "tempflow_grpo": policy(
        "tempflow_grpo", GUIDED | {"num_seeds": 2},
        lambda sigmas, _: naive.tempflow(sigmas, 2, 3), POPULATION, kl_coef=0.05,
    ),
    **{f"g2rpo, {sizes}": policy(
        "g2rpo", {"num_inference_steps": 7, "branch_steps": 3, "granularities": sizes},
        lambda sigmas, _, sizes=sizes: naive.g2rpo(sigmas, 3, 3, sizes), UNBIASED | {"mix": "sum"},
        grid=shifted,
    ) for sizes in ([1, 2], [1, 2, 3])},
    "branch_grpo": policy(
        "branch_grpo", {"group_size": 4, "split_steps": [0, 2]},
        lambda sigmas, _: naive.tree(
            sigmas, {0: [0, 0, 2, 2], 2: range(4)}, "dance_sde", dict.fromkeys(range(4), 0.3)
        ),
        UNBIASED, grid=shifted, worth=naive.mean_reward,
    ),
    "tree_rpo": policy(
        "tree_rpo", {"num_inference_steps": 6, "group_size": 5, "window": 3, "noise_scales":
        [1.0, 0.8, 0.5], "window_iterations": 5},
        lambda sigmas, _: naive.tree(
            sigmas, {1: [0, 0, 0, 3, 3], 2: [0, 0, 2, 3, 4], 3: range(5)}, "flow_sde",
            {1: 0.7, 2: 0.7 * 0.8, 3: 0.35},
        ),
        UNBIASED, grid=shifted, worth=naive.mean_reward, iteration=5,
    ),
    "dense_grpo": policy(
        "dense_grpo", GUIDED | {"num_inference_steps": 4, "noise_level": [0.7, 0.9, 0.4, 0.5]},
        lambda sigmas, _: naive.dense(sigmas, 3, [0.7, 0.9, 0.4]),
        POPULATION, kl_coef=0.05, worth=naive.gain,
    ),
    "awm": Case(
        "awm", {"group_size": 2, "ref_coef": 0.2, "ema_coef": 0.7},
        lambda sigmas, _: naive.awm(sigmas, 2), ALL_STD, unit=1 / 5,
        matching=lambda nets, *point: naive.awm_loss(
            nets[None].one, *point, pulls=[(0.2, nets["reference"].one), (0.7, nets["ema"].one)]
        ),
    ),
    "awm, no anchors": Case(
        "awm", {"group_size": 2, "ref_coef": 0.0, "ema_coef": 0.0, "solver_order": 1},
        lambda sigmas, _: naive.awm(sigmas, 2, solver="ode"), ALL_STD, unit=1 / 5,
        matching=lambda nets, *point: naive.awm_loss(nets[None].one, *point),
    ),
    "awm, huber, elbo": Case(
        "awm", {
            "group_size": 2, "weighting": "huber", "ref_coef": 0.2, "ema_coef": 0.7,
            "kl_weight": "elbo", "kl_ema_weight": "elbo",
        },
        lambda sigmas, _: naive.awm(sigmas, 2), ALL_STD, unit=1 / 5,
        matching=lambda nets, x0, e, t, *of: naive.awm_loss(
            nets[None].one, x0, e, t, *of, weighting="huber", pulls=[
                (c * naive.elbo(t), nets[n].one) for c, n in ((0.2, "reference"), (0.7, "ema"))
            ],
        ),
    ),
    "awm, another power": Case(
        "awm", {
            "group_size": 2, "ghuber_power": 0.6, "ref_coef": 0.0, "ema_coef": 0.7,
            "global_std": False, "last_sigma_ratio": 0.0,
        },
        lambda sigmas, _: naive.awm(sigmas, 2, ratio=0), POPULATION, unit=1 / 5,
        matching=lambda nets, *point: naive.awm_loss(
            nets[None].one, *point, p=0.6, pulls=[(0.7, nets["ema"].one)]
        ),
    ),
    "dgpo": Case(
        "dgpo", {
            "num_inference_steps": 6, "group_size": 3, "beta_dpo": 3.0, "ref_coef": 0.1,
            "ref_guidance_scale": 3.0,
        },
        lambda sigmas, _: naive.nft(sigmas, 3), ALL_STD,
        group_matching=lambda nets, group: naive.dgpo_loss(
            nets[None].one, nets["reference"].one, nets["old"].one, group, 3, 3.0, 1e-3, 0.1,
            naive.guided(nets["reference"].one, 3.0, UNCOND),
        ),
    ),
    "dgpo, noises apart, over the copy": Case(
        "dgpo", {
            "num_inference_steps": 4, "trunc_steps": 2, "num_train_timesteps": 2, "group_size": 2,
            "beta_dpo": 4.0, "clip_range": 0.05, "ref_coef": 0.0, "use_shared_noise": False,
            "use_ema_ref": True, "global_std": False, "solver_order": 1,
        },
        lambda sigmas, _: naive.nft(sigmas, 2, solver="ode"), POPULATION,
        group_matching=lambda nets, group: naive.dgpo_loss(
            nets[None].one, nets["old"].one, nets["old"].one, group, 2, 4.0, 0.05
        ),
    ),
    "crd": Case(
        "crd", {"num_inference_steps": 4, "group_size": 3, "ref_coef": 0.3},
        lambda sigmas, _: naive.nft(sigmas, 3), ALL_STD, unit=1 / 5,
        group_matching=lambda nets, group: naive.crd_loss(
            nets[None].one, nets["old"].one, naive.guided(nets["reference"].one, 4.5, UNCOND),
            group, kl=0.3,
        ),
    ),
    "crd, plain": Case(
        "crd", {
            "num_inference_steps": 4, "group_size": 3, "ref_coef": 0.3, "crd_beta": 0.4,
            "adaptive_logp": False, "reward_adaptive_kl": False, "use_shared_noise": True,
            "last_sigma_ratio": 0.3, "ref_guidance_scale": 1.0,
        },
        lambda sigmas, _: naive.nft(sigmas, 3, ratio=0.3), ALL_STD, unit=1 / 5,
        group_matching=lambda nets, group: naive.crd_loss(
            nets[None].one, nets["old"].one, nets["reference"].one, group, 0.3, 0.4, 1.0, False
        ),
    ),
    "diffusion_nft, beta, uniform": Case(
        "diffusion_nft", {
            "num_inference_steps": 4, "group_size": 3, "ref_coef": 0.1, "nft_beta": 0.1,
            "weighting": "uniform", "global_std": False, "last_sigma_ratio": 0.0,
        },
        lambda sigmas, _: naive.nft(sigmas, 3, ratio=0), POPULATION, unit=1 / 5,
        matching=lambda nets, *point: naive.nft_loss(
            nets[None].one, nets["old"].one, *point, beta=0.1, adaptive=False,
            pulls=[(0.1, nets["reference"].one)],
        ),
    ),
    "diffusion_nft": Case(
        "diffusion_nft", {
            "num_inference_steps": 6, "group_size": 3, "ref_coef": 0.1, "ref_guidance_scale": 2.0,
        },
        lambda sigmas, _: naive.nft(sigmas, 3), ALL_STD, unit=1 / 5,
        matching=lambda nets, *point: naive.nft_loss(
            nets[None].one, nets["old"].one, *point,
            pulls=[(0.1, naive.guided(nets["reference"].one, 2.0, UNCOND))],
        ),
    ),
}  # fmt: skip


BY_REWARD = [name for name, case in CASES.items() if case.teacher_scale is None]


@cache
def whole(name):
    """In as few calls as can be, on one rank."""
    return engine(CASES[name])


def assert_equal(actual, expected, atol):
    for name in ("latents", "rewards", "advantage", "gradients"):
        found, wanted = (getattr(x, name).double() for x in (actual, expected))
        if not torch.allclose(found, wanted, rtol=0, atol=atol, equal_nan=True):
            off = (found - wanted).abs().flatten(1).amax(1).tolist()
            raise AssertionError(f"{name}: off by {off}, expected at most {atol}")


def test_every_algorithm_has_its_loop():
    assert {case.name for case in CASES.values()} == set(names())


@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_the_loop(name):
    found = whole(name)
    assert_equal(found, loop(CASES[name]), 1e-10)
    # What is compared is there: rewards differ, and off policy some choices are clipped, not all.
    assert (found.advantage != 0).any(1).all() or name not in BY_REWARD
    assert (found.gradients.norm(dim=1) > 1e-3).all()
    for clipped in found.clipped[1:]:
        assert 0 < clipped < found.advantage.numel() // len(found.gradients)
    case = CASES[name]
    if (found.advantage != 0).all() and not case.recipe.copies:  # nothing is left out
        sampled, trained = network_calls(case.recipe, cost_of(case.plans), case.iteration)
        assert found.calls == [sampled, *trained]


@pytest.mark.parametrize(
    "name", ["flow_grpo", "g2rpo, [1, 2]", "awm", "flow_grpo_fast, branching for each prompt"]
)
def test_any_max_batch_gives_the_same(name):
    """As few rows as there can be where a plan is of chains, of branches, or of points; on two
    ranks the next test has few rows of all.
    """
    rows_per_node = 1 if CASES[name].recipe.guidance_scale == 1 else 2
    for max_batch, size in ((rows_per_node, None), (3, 1)):
        found = engine(CASES[name], max_batch, size=size)
        assert_equal(found, whole(name), 1e-12)
        for (few,), (one,) in zip(found.batches, whole(name).batches, strict=True):
            assert max(few) <= max_batch and [sum(few)] == one


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_mean_of_their_gradients(name):
    found = engine(CASES[name], max_batch=3, ranks=2)
    assert_equal(found, whole(name), 1e-12)
    for (first, second), (one,) in zip(found.batches, whole(name).batches, strict=True):
        assert len(first) == len(second)
        assert max(first + second) <= 3 and sum(first) + sum(second) == sum(one)


@pytest.mark.parametrize("name", BY_REWARD)
def test_ranks_call_alike_where_one_has_nothing_to_learn(name):
    """All images of rank 1 have one reward. Its rows are left out where nothing else is learned
    from them, all but one a call.
    """
    case = CASES[name]
    of_rank_1 = (2, 3) if case.recipe.updates_per_rollout == 1 else (1, 3)
    found, expected = engine(case, case.few, 2, flat=of_rank_1), engine(case, flat=of_rank_1)
    assert (expected.advantage == 0).all(1).tolist() == [slot in of_rank_1 for slot in SLOTS]
    assert_equal(found, expected, 1e-12)
    for first, second in found.batches:
        assert len(first) == len(second) > 1
        assert sum(second) == (sum(first) if case.needs_all else len(first))


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].needs_all])
def test_a_rollout_that_teaches_nothing_is_one_call_per_rank(name):
    for ranks in (1, 2):
        found = engine(CASES[name], ranks=ranks, flat=SLOTS)
        assert (found.advantage == 0).all() and (found.gradients == 0).all()
        assert found.batches == [[[1]] * ranks] * len(found.gradients)


def lost(slot, image):
    """Of a prompt some, all but the first, all; of the last none."""
    return (image % 5 == 1, image > 0, True, False)[slot]


@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_REWARD])
def test_what_has_no_reward_is_learned_from_a_teacher(name):
    found = engine(CASES[name], failed=lost)
    torch.testing.assert_close(found.gradients, whole(name).gradients, rtol=0, atol=0)
    assert (found.advantage == 0).all()


@pytest.mark.parametrize("name", BY_REWARD)
def test_an_image_without_a_reward_is_as_if_it_had_never_been(name):
    """In statistics and gradients, those of KLs and of other anchors included; on any ranks."""
    case = CASES[name]
    expected = loop(case, lost)
    found = engine(case, failed=lost)
    found.latents = expected.latents  # they are spoilt
    assert_equal(found, expected, 1e-10)
    assert found.advantage.isnan().any() and found.gradients.isfinite().all()
    assert (found.gradients.norm(dim=1) > 1e-4).all()
    assert_equal(
        engine(case, case.few, 2, failed=lost),
        dataclasses.replace(found, latents=expected.latents),
        1e-10,
    )


@pytest.mark.parametrize("name", ["flow_grpo", "g2rpo, [1, 2]", "diffusion_nft"])
def test_a_rollout_without_rewards_has_a_gradient_of_zero(name):
    found = engine(CASES[name], 2, 2, failed=lambda *_: True)
    assert found.advantage.isnan().all() and (found.gradients == 0).all()


def test_states_that_are_drawn_again_in_float32_give_the_gradient():
    """In float32 the states of many siblings are not kept, but drawn again from their keys."""
    case, slots = CASES["tempflow_grpo"], torch.tensor(SLOTS)
    source = Source(SEED, prompt_ids(0, slots), SHAPE)
    assert run(case.plans[0], Network(0).float().of(slots), source, 1000).is_redrawn
    found, exact = engine(case, dtype=torch.float32), whole("tempflow_grpo")
    error = (found.gradients - exact.gradients).norm(dim=1) / exact.gradients.norm(dim=1)
    assert (error < 1e-5).all(), error
    assert found.clipped == exact.clipped
