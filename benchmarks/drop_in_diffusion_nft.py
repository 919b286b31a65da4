"""DiffusionNFT's rows: a path of ten steps whose network has its answer ready."""

from __future__ import annotations

import plain_steps
from drop_in_scripts import inputs
from drop_ins import against

from flowkern.compat.diffusion_nft import run_sampling
from flowkern.schedules import sd3_sigmas


def second_order_path(device):
    v, x, _ = inputs(device, 2)
    sigmas = sd3_sigmas(10).float()

    def drop_in(v, x, sigmas):
        return (run_sampling(lambda z, sigma: v, x, sigmas, "dpm2", determistic=True)[0],)

    def published(v, x, sigmas):
        """Without the noise that both ends of their path draw for nothing."""
        x0_before = x - v
        x = (1 - sigmas[1]) * x0_before + sigmas[1] * x
        for index in range(1, 9):
            x, x0_before = plain_steps.second_order(v, x, x0_before, sigmas, index)
        return (x - sigmas[9] * v,)

    name = "diffusion_nft, dpm2, ten steps"
    return against(name, drop_in, published, (v, x, sigmas), waits=True)  # for the network


ROWS = [second_order_path]
