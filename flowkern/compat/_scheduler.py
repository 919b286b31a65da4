"""What a scheduler of diffusers is asked for: which step a timestep is."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.torch_private import assert_async


def step_index(scheduler, timestep: Tensor, device: torch.device) -> Tensor:
    """(B,) or (1,) step indices on `device`.

    Asking the scheduler costs one host synchronization per timestep on a GPU; where its look-up is
    diffusers' own, over timesteps that are known to be distinct, the same look-up is made on the
    device, with an assertion there that each timestep was found; on the CPU it is made of numbers.
    """
    timestep = torch.as_tensor(timestep).reshape(-1)
    look_up = getattr(type(scheduler), "index_for_timestep", None)
    stock = getattr(look_up, "__module__", "").startswith("diffusers.")
    if stock and scheduler.timesteps.device == timestep.device == device:
        if device.type == "cuda":
            found = timestep[:, None] == scheduler.timesteps[None, :]
            assert_async(found.any(1).all(), "timestep: not among the scheduler's timesteps")
            return found.int().argmax(1)
        times, wanted = scheduler.timesteps.tolist(), timestep.tolist()
        steps = {t: i for i, t in enumerate(times)}
        if len(steps) == len(times) and all(t in steps for t in wanted):
            return torch.tensor([steps[t] for t in wanted], dtype=torch.int64)
    asked = [_asked(scheduler, t) for t in timestep]
    return torch.tensor(asked, dtype=torch.int64, device=device)


def _asked(scheduler, timestep: Tensor) -> int:
    known = getattr(scheduler, "timesteps", None)
    try:
        index = int(scheduler.index_for_timestep(timestep))
    except IndexError:  # what FlowMatchEuler makes of one that it does not find
        index = None
    # UniPC and its relatives take the last step for it, without a word.
    if index is None or (known is not None and bool(known[index] != timestep)):
        among = "" if known is None else f" {[round(float(t), 4) for t in known]}"
        raise ValueError(
            f"timestep: expected one of the scheduler's{among}, got {float(timestep):g}"
        )
    return index
