"""The flowkern command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from flowkern import __version__
from flowkern.checks import ConfigError
from flowkern.cli import cost, demo, doctor, export, report, sample, serve_reward, train
from flowkern.cli.errors import said_of, say
from flowkern.extras import how_to_have
from flowkern.lookup import nearest
from flowkern.train.errors import RunError

COMMANDS = (train, demo, doctor, export, report, sample, serve_reward, cost)
"""In the order of `flowkern --help`: each adds its parser, whose `command` runs it."""
VALUED = ("config", "algorithm", "json", "card", "processes", *serve_reward.VALUED)
OPTIONS = ("help", "traceback", "estimate", *VALUED)  # which are no keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a configuration that cannot be used, 1
    anything else, 128 + a signal. `--help` and what cannot be parsed raise SystemExit, as argparse
    does.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    if given[0] not in commands and not given[0].startswith("-"):
        near = nearest(given[0], commands)
        hint = f"; did you mean {near!r}?" if near else ""
        _fail(f"got {given[0]!r}, expected one of {', '.join(commands)}{hint}")
    options = parser.parse_args(_as_overrides(given))
    # Importing transformers otherwise warns of image processors that no pipeline here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.command(options)
    except (RunError, ValueError, OSError, FloatingPointError, ImportError) as error:
        if options.traceback:
            raise
        say(said_of(error) + how_to_have(error))
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _as_overrides(arguments: Sequence[str]) -> list[str]:
    """`--key.path=value` and `--key.path value` of a configuration as `key.path=value`."""
    if arguments[0] not in ("train", "demo", "cost", "doctor", "serve-reward"):
        return list(arguments)
    options, out, rest = [], [], iter(arguments)
    for argument in rest:
        name = argument.removeprefix("--")
        is_key = argument.startswith("--") and name and name.partition("=")[0] not in OPTIONS
        if is_key and "=" not in name:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                _fail(f"--{name}: expected a value: --{name} VALUE, or {name}=VALUE")
            name = f"{name}={value}"
        if is_key or not argument.startswith("--"):
            out.append(name if is_key else argument)
            continue
        options.append(argument)
        if argument.removeprefix("--") in VALUED:
            options += [value for value in [next(rest, None)] if value is not None]
    return [*out[:1], *options, *out[1:]]  # argparse takes no options between arguments


def _fail(message: str, command: str = "flowkern") -> NoReturn:
    say(f"{message}; see {command} --help")
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _fail(message, self.prog)


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of its commands."""
    parser = _Parser(
        prog="flowkern",
        description="Reinforcement learning of flow-matching models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flowkern {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    for command in COMMANDS:
        command.add(commands, common)
    return parser, commands.choices
