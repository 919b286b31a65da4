"""flowkern serve-reward: rewards for runs on other machines."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from errno import EADDRNOTAVAIL
from pathlib import Path
from socket import gaierror
from typing import TYPE_CHECKING, Any

from flowkern.checks import ConfigError
from flowkern.cli.train import OVERRIDE

if TYPE_CHECKING:
    from flowkern.rewards.remote.service import Served

VALUED = ("host", "port", "token-file", "token-env", "max-bytes", "max-batch")
"""Options of this command that have a value; others are a reward's own."""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "serve-reward",
        parents=[common],
        help="score images for runs on other machines",
        description="Load rewards, and score the images that runs send with kind: remote "
        "(docs/rewards.md), until Ctrl-C: what was asked for by then is answered first. "
        "Beside names, key=value is an option of every reward here, NAME.key=value of one.",
    )
    parser.add_argument(
        "arguments",
        metavar="NAME",
        nargs="+",
        help="a reward that is built in, or module:attribute, which is served as the attribute; or "
        "key=value, as in a configuration: device=cuda",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; another than this machine's own takes a token "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=8600, help="0: one that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="PATH", help="holds the token that clients send"
    )
    parser.add_argument("--token-env", metavar="NAME", help="or an environment variable does")
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        default=256 * 2**20,
        help="of a request, also when unpacked (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        default=32,
        help="images of one call of a reward: requests that wait are merged up to it "
        "(default: %(default)s)",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    for name, least, most in (("port", 0, 65535), ("max_bytes", 1, 2**40), ("max_batch", 1, 65536)):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if not least <= value <= most:
            raise ConfigError(f"{flag}: got {value}, expected {least} to {most}")
    token = _token(options)
    try:
        from flowkern.rewards.remote import server
    except ImportError as error:
        raise ConfigError(
            f"serve-reward needs {error.name}: pip install 'flowkern[train,serve]'"
        ) from error
    from flowkern.rewards.remote.protocol import Limits
    from flowkern.rewards.remote.service import Service

    if token is None and not server.is_this_machine(options.host):
        raise ConfigError(
            f"--host: {options.host} is open to other machines, which takes --token-file PATH or "
            "--token-env NAME"
        )
    try:
        listening = server.listen(options.host, options.port)  # refused before the loading
    except OSError as error:
        flag = "--host" if isinstance(error, gaierror) or error.errno == EADDRNOTAVAIL else "--port"
        why = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror
        raise OSError(f"{flag}: {options.host} port {options.port}: {why}") from None
    with listening:
        rewards = _rewards(options.arguments)
        limits = Limits(max_bytes=options.max_bytes)
        service = Service(rewards, limits, batch=options.max_batch)
        host, port = listening.getsockname()[:2]
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        who = "without a token" if token is None else "with the token"
        served = f"serving {', '.join(rewards)} at {place}, {who}"
        # Where a shell's background job ignores SIGINT, a server that took it just returns.
        with suppress(KeyboardInterrupt):
            server.serve(service, listening, token, lambda: print(served, flush=True))
        print("ended", flush=True)
    return 0


def _token(options: argparse.Namespace) -> str | None:
    """Raises ConfigError for one that is not there, or empty."""
    if options.token_file is not None and options.token_env is not None:
        raise ConfigError("--token-file: expected it or --token-env, not both")
    if options.token_file is not None:
        try:
            found = options.token_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            place = str(options.token_file)
            raise ConfigError(f"--token-file: cannot read {place!r}: {why}") from None
        where = f"--token-file: {options.token_file}"
    elif options.token_env is not None:
        if options.token_env not in os.environ:
            raise ConfigError(f"--token-env: the environment has no variable {options.token_env!r}")
        found = os.environ[options.token_env].strip()
        where = f"--token-env: the environment variable {options.token_env}"
    else:
        return None
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise ConfigError(f"{where}: expected a token: printable ASCII without spaces")
    return found


def _rewards(arguments: list[str]) -> dict[str, Served]:
    """Loaded as a training loads them; raises ConfigError naming reward.NAME and the option."""
    from flowkern.rewards.remote.service import Served
    from flowkern.train.fields import build
    from flowkern.train.reward_config import RewardConfig, Rewards
    from flowkern.train.scoring import load_rewards
    from flowkern.train.tree import parse

    tree: dict[str, dict[str, Any]] = {}
    for kind in (text for text in arguments if not OVERRIDE.match(text)):
        name = kind.rpartition(":")[2]
        if not name.strip():
            raise ConfigError(f"serve-reward: got {kind!r}, expected the name of a reward")
        if name in tree:
            raise ConfigError(f"{kind}: there is a reward of the name {name} already")
        tree[name] = {"kind": kind}
    if not tree:
        raise ConfigError("serve-reward: expected the name of a reward")
    for text in (text for text in arguments if OVERRIDE.match(text)):
        key, _, value = text.partition("=")
        name, dot, option = key.rpartition(".")
        if dot and name not in tree:
            raise ConfigError(f"{key}: got {name!r}, expected one of {', '.join(tree)}")
        if option in RewardConfig.model_fields:
            raise ConfigError(f"{key}: is the run's to say, in its configuration")
        for one in [name] if dot else tree:
            tree[one][option] = parse(value, key)
    found = load_rewards(build(Rewards, tree))
    return {
        name: Served(
            keyed.reward,
            tree[name]["kind"],
            {option: value for option, value in tree[name].items() if option != "kind"},
        )
        for name, keyed in found.items()
    }
