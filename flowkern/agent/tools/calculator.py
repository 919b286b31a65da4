"""Arithmetic by a walk over the syntax tree: no eval, and nothing that could take long."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from flowkern.agent.tools.output import ToolFailure

__all__ = ["Calculator", "calculate"]

CHARACTERS = 1_000
NODES = 500
BITS = 4_096
"""Of an integer: 1,233 digits, which Python still writes."""
LARGEST_FACTORIAL = 400

BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
# Signs that people write, as Python writes them.
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _factorial(n: Any) -> int:
    if not isinstance(n, int) or not 0 <= n <= LARGEST_FACTORIAL:
        raise ToolFailure(f"factorial takes whole numbers from 0 to {LARGEST_FACTORIAL}")
    return math.factorial(n)


def _comb(n: Any, k: Any) -> int:
    if not all(isinstance(value, int) and 0 <= value <= 1_000 for value in (n, k)):
        raise ToolFailure("comb takes whole numbers from 0 to 1,000")
    return math.comb(n, k)


def _round(value: Any, digits: int = 0) -> Any:
    rounded = round(value, min(max(int(digits), -1_000), 1_000))
    return int(rounded) if not digits and math.isfinite(rounded) else rounded


FUNCTIONS: dict[str, Callable] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": math.gcd,
    "factorial": _factorial,
    "comb": _comb,
    **{
        name: getattr(math, name)
        for name in "sqrt exp log log2 log10 sin cos tan asin acos atan degrees radians".split()
    },
}


class Calculator:
    """The tool; `calculate` is its work."""

    name = "calculator"
    in_caller = True
    """It is over in less time than a thread takes to start: its caps hold it."""

    def __call__(self, expression: str) -> str:
        """Evaluates one arithmetic expression, such as (3 + 4) * 2 ** 5 or sqrt(2) / 7.

        Args:
            expression: Numbers, + - * / // % **, parentheses, pi, e, and sqrt, abs, min, max,
                round, floor, ceil, log, exp, sin, cos, tan, gcd, comb, factorial.
        """
        return calculate(expression)


def calculate(expression: str) -> str:
    """The value of an expression, exact for whole numbers, else 15 digits.

    Raises ToolFailure for what is no arithmetic, has no real value, or is too large.
    """
    if len(expression) > CHARACTERS:
        raise ToolFailure(f"the expression has more than {CHARACTERS:,} characters")
    written = expression.strip().translate(SIGNS)
    if not re.search(r"[A-Za-z]", written):  # max(1,234) has two arguments
        written = THOUSANDS.sub("", written)
    try:
        tree = ast.parse(written, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolFailure(f"the expression is no arithmetic: {expression[:100]!r}") from error
    if sum(1 for _ in ast.walk(tree)) > NODES:
        raise ToolFailure(f"the expression has more than {NODES} parts")
    try:
        return _written(_value(tree.body))
    except ZeroDivisionError as error:
        raise ToolFailure("division by zero") from error
    except OverflowError as error:
        raise ToolFailure("the result is too large") from error
    except (TypeError, ValueError) as error:
        raise ToolFailure(f"{error}") from error
    except RecursionError as error:
        raise ToolFailure("the expression is nested too deeply") from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*map(_value, arguments)))
        case ast.BinOp(op=ast.BitXor()):
            raise ToolFailure("^ is not known; a power is **")
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ToolFailure(f"{name[:50]} is not known")
    raise ToolFailure(f"{type(node).__name__} is no arithmetic")


def _power(base: Any, exponent: Any) -> Any:
    is_whole = isinstance(base, int) and isinstance(exponent, int)
    if (
        is_whole
        and abs(base) > 1
        and exponent > 0
        and base.bit_length() * exponent > BITS + exponent
    ):
        raise ToolFailure("the result is too large")
    if is_whole and exponent < 0:
        return float(base) ** exponent
    return base**exponent


def _bounded(value: Any) -> Any:
    if isinstance(value, int):
        if value.bit_length() > BITS:
            raise ToolFailure("the result is too large")
    elif not isinstance(value, float) or not math.isfinite(value):
        raise ToolFailure("the result is no real number")
    return value


def _written(value: float) -> str:
    if isinstance(value, float) and (not value.is_integer() or abs(value) >= 2**53):
        return f"{value:.15g}"
    return str(int(value))
