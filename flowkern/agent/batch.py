"""Turns as the trainer takes them: rows of token ids, one after the other without padding.

R rows, each a prompt and the turn that was drawn for it; M tokens of turns in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowkern.agent.rollout import Trajectory


class Padded(NamedTuple):
    """Some rows as one call of the network, padded on the right, where causal attention never
    looks."""

    input_ids: Tensor
    """(rows, L)."""
    row: Tensor
    """(m,) of the tokens of turns: their row here, and in `place` the position whose output says
    how likely they are."""
    place: Tensor
    target: Tensor
    """(m,): the tokens themselves."""
    token: Tensor
    """(m,): their places among the M."""


@dataclass(frozen=True)
class TurnBatch:
    """Rows in the order of trajectories and their turns; on the host."""

    ids: tuple[Tensor, ...]
    """(R) of (prompt + turn,)."""
    prompt: Tensor
    """(R,): the length of each prompt."""
    trajectory: Tensor
    """(R,): whose turn each row is."""
    sample_log_prob: Tensor
    """(M,) float32, of the sampler; nan where it said none."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> TurnBatch:
        """Of all turns that have a token."""
        ids, prompt, trajectory, log_probs = [], [], [], []
        for number, one in enumerate(trajectories):
            for turn in one.turns:
                drawn = turn.generation
                if drawn.ids:
                    ids.append(torch.tensor([*drawn.prompt_ids, *drawn.ids]))
                    prompt.append(len(drawn.prompt_ids))
                    trajectory.append(number)
                    log_probs += drawn.log_probs or [float("nan")] * len(drawn.ids)
        whole = torch.tensor(prompt, dtype=torch.int64), torch.tensor(trajectory, dtype=torch.int64)
        return cls(tuple(ids), *whole, torch.tensor(log_probs, dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> Tensor:
        """(R,): the tokens of each turn."""
        return torch.tensor([len(one) for one in self.ids], dtype=torch.int64) - self.prompt

    @property
    def row(self) -> Tensor:
        """(M,): the row of each token of a turn."""
        return torch.repeat_interleave(torch.arange(len(self)), self.length)

    def chunks(self, rows: Tensor, most: int) -> list[Tensor]:
        """These rows by length, as many calls of the network as need be, of `most` at most: rows of
        one length hardly need padding."""
        size = self.prompt[rows] + self.length[rows]
        return list(rows[size.argsort(stable=True)].split(most)) if len(rows) else []

    def padded(self, rows: Tensor) -> Padded:
        length, prompt = self.length, self.prompt
        first = length.cumsum(0) - length  # the place of each row's first token among the M
        ids = [self.ids[i] for i in rows.tolist()]
        counts = length[rows]
        row = torch.repeat_interleave(torch.arange(len(ids)), counts)
        within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        place = prompt[rows][row] + within
        input_ids = pad_sequence(ids, batch_first=True)
        target = input_ids[row, place]
        return Padded(input_ids, row, place - 1, target, first[rows][row] + within)
