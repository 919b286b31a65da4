"""Noise schedules and step coefficients: scalars only, computed in float64.

x_t = (1 - sigma) x0 + sigma e,   velocity = e - x0,   sigma = 1 is noise, sigma = 0 is the image.

Every sampler of the family is one affine Gaussian step over an edge sigma -> sigma_next, with
dt = sigma_next - sigma < 0:

    mean     = a x_t + b velocity (+ sum_j history_weight_j x0_prediction_j)
    x_next   = mean + std noise
    log_prob = mean_D(-k (x_next - mean)^2) + c

so a sampler is a row of coefficients here, and never a kernel of its own. One of yours is a
function that gives rows (`own.Sampler`).
"""

from flowkern.schedules.coefficients import COLUMNS, MAX_HISTORY, Coefficients
from flowkern.schedules.device import device_coefficients
from flowkern.schedules.edges import edge_coefficients, step_coefficients
from flowkern.schedules.formulas import KINDS
from flowkern.schedules.grids import flux_sigmas, sd3_sigmas, shifted_sigmas
from flowkern.schedules.multistep import multistep_coefficients
from flowkern.schedules.own import Sampler

__all__ = [
    "COLUMNS",
    "KINDS",
    "MAX_HISTORY",
    "Coefficients",
    "Sampler",
    "device_coefficients",
    "edge_coefficients",
    "flux_sigmas",
    "multistep_coefficients",
    "sd3_sigmas",
    "shifted_sigmas",
    "step_coefficients",
]
