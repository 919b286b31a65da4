"""Turns drawn in this process, by the very weights that are trained: a KV-cache loop of its own.

Equal prompts are prefilled once, so the G trajectories of a question cost one at their first turn;
rows are sorted by length and padded on the left; a row that ended leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkern.agent.engines import Generation, Sampling
from flowkern.checks import ConfigError, is_integer, shown
from flowkern.ops._common.philox import philox_normal


class TransformersEngine:
    """Answers `engines.Engine`, with a causal language model of transformers, adapted or not.

    Options: max_batch, how many rows are drawn together at most.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        model: nn.Module,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
    ) -> None:
        unknown = options.keys() - {"max_batch"}
        if unknown:
            raise ConfigError(f"agent.engine.{min(unknown)}: unknown key; known are max_batch")
        self.max_batch = options.get("max_batch", 256)
        if not is_integer(self.max_batch) or self.max_batch < 1:
            raise ConfigError(
                f"agent.engine.max_batch: got {shown(self.max_batch)}, expected an integer of at "
                "least 1"
            )
        self.model, self.calls = model, 0
        # Left out of the nucleus, a token has another probability here than in the trainer.
        self.is_exact = sampling is None or sampling.top_p == 1
        self.facts = ["turns are drawn in this process"]

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[Any] = [None] * len(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(order), self.max_batch):
                part = order[first : first + self.max_batch]
                rows = _Rows([list(prompts[i]) for i in part], [seeds[i] for i in part], sampling)
                self.calls += rows.run(self.model)
                for i, one in zip(part, rows.generations(), strict=True):
                    found[i] = one
        finally:
            self.model.train(was_training)
        return found

    def sync(self, model: nn.Module, directory: Path) -> None:
        """Nothing: the weights are those that are trained."""


class _Rows:
    """R turns that are drawn together."""

    def __init__(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> None:
        self.prompts, self.seeds, self.sampling = prompts, seeds, sampling
        self.stops = frozenset(sampling.stop_ids)
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.log_probs: list[list[float]] = [[] for _ in prompts]

    @torch.no_grad()
    def run(self, model: nn.Module) -> int:
        """Draw them; returns how many rows went through the network."""
        device = next(model.parameters()).device
        seeds = torch.tensor(self.seeds, dtype=torch.int64, device=device)
        alive = list(range(len(self.prompts)))
        logits, cache, mask = self._prefill(model, device)
        place = mask.sum(-1, keepdim=True)
        calls = len({tuple(prompt) for prompt in self.prompts})
        for step in range(self.sampling.max_new_tokens):
            token, log_prob = draw(logits, self.sampling, seeds, step)
            drawn, values = token.tolist(), log_prob.tolist()
            for row, one, value in zip(alive, drawn, values, strict=True):
                self.ids[row].append(one)
                self.log_probs[row].append(value)
            kept = [i for i, one in enumerate(drawn) if one not in self.stops]
            if not kept or step + 1 == self.sampling.max_new_tokens:
                break
            if len(kept) < len(alive):
                alive, index = [alive[i] for i in kept], torch.tensor(kept, device=device)
                cache.batch_select_indices(index)
                token, seeds, mask, place = (x[index] for x in (token, seeds, mask, place))
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            out = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
            )
            logits, cache, place = out.logits[:, -1], out.past_key_values, place + 1
            calls += len(alive)
        return calls

    def _prefill(self, model: nn.Module, device: torch.device) -> tuple[Tensor, Any, Tensor]:
        """Logits (R, V) of the first token, the cache, and the mask of the prompts (R, L)."""
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(prompt), len(places)) for prompt in self.prompts]
        width = max(map(len, places))
        ids = torch.zeros(len(places), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(places):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = out.logits[:, -1], out.past_key_values
        if len(places) < len(index):
            rows = torch.tensor(index, device=device)
            cache.batch_select_indices(rows)
            logits, mask = logits[rows], mask[rows]
        return logits, cache, mask

    def generations(self) -> list[Generation]:
        is_greedy = self.sampling.temperature == 0
        return [
            Generation(prompt, ids, None if is_greedy else values, _finish(ids[-1] in self.stops))
            for prompt, ids, values in zip(self.prompts, self.ids, self.log_probs, strict=True)
        ]


def _finish(is_stopped: bool) -> Any:
    return "stop" if is_stopped else "length"


def draw(logits: Tensor, sampling: Sampling, seeds: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """One token of each row of logits (R, V), and its log-probability in float32, (R,) each.

    By inversion of one uniform number, which follows from the row's seed (R,) and the step alone,
    so that a turn does not depend on what it is drawn together with.
    """
    if sampling.temperature == 0:
        log_p = logits.float().log_softmax(-1)
        token = log_p.argmax(-1)
        return token, log_p.gather(-1, token[:, None])[:, 0]
    log_p = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        log_p = _nucleus(log_p, sampling.top_p)
    normal = philox_normal((len(seeds), 1), 0, seeds, step).double()
    uniform = 0.5 * torch.erfc(-normal / math.sqrt(2))
    below = log_p.double().exp().cumsum(-1)
    token = torch.searchsorted(below, uniform * below[:, -1:], right=True)
    # At the very end, rounding may point behind the last token that can be drawn.
    last = (below < below[:, -1:]).sum(-1, keepdim=True)
    token = token.minimum(last)[:, 0]
    return token, log_p.gather(-1, token[:, None])[:, 0]


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Log-probabilities of the likeliest tokens that make up top_p together; the rest is -inf."""
    ordered, index = log_p.sort(-1, descending=True)
    p = ordered.double().exp()
    is_out = p.cumsum(-1) - p >= top_p  # never the first
    ordered = ordered.masked_fill(is_out, -torch.inf)
    return torch.empty_like(log_p).scatter_(-1, index, ordered).log_softmax(-1)
