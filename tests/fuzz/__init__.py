"""The fuzzer, which `python tests/fuzz` runs: random calls of every op against float64."""

from .checks import OPS, check, check_drawn, one_call, serving
from .inputs import Draw
from .steps import WEIGHTS
from .tokens import TOKENS

__all__ = ["OPS", "TOKENS", "WEIGHTS", "Draw", "check", "check_drawn", "one_call", "serving"]
