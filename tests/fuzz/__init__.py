"""The fuzzer, which `python tests/fuzz` runs: random calls of every op against float64."""

from .checks import OPS, check_drawn, one_call, serving
from .inputs import Draw
from .steps import WEIGHTS

__all__ = ["OPS", "WEIGHTS", "Draw", "check_drawn", "one_call", "serving"]
