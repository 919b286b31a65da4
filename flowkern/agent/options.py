"""Classes that a configuration names, built with its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from flowkern.checks import ConfigError
from flowkern.lookup import nearest

__all__ = ["built"]


def built(
    kind: type, options: Mapping[str, Any], key: str, client: Any = None, also: Sequence[str] = ()
) -> Any:
    """kind(**options), and with `client` where its constructor has a parameter of that name.

    also: keys that are known beside those of the constructor, for messages. Raises ConfigError
    naming `key`.OPTION for what is unknown, missing or refused.
    """
    parameters = inspect.signature(kind).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = dict(options)
    if client is not None and "client" in parameters:
        given.setdefault("client", client)
    for option in options:
        if option not in parameters and not takes_all:
            near = nearest(option, parameters)
            known = ", ".join([*parameters, *also])
            hint = f"did you mean '{key}.{near}'?" if near else f"known are {known or 'none'}"
            raise ConfigError(f"{key}.{option}: unknown key; {hint}")
    for option, parameter in parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and option not in given:
            raise ConfigError(f"{key}.{option}: missing, and has no default")
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:  # its own message begins with the option
        message = str(error)
        said = message.partition(":")[0].partition(".")[0]
        is_of_option = said in parameters or (takes_all and said.isidentifier())
        raise ConfigError(f"{key}{'.' if is_of_option else ': '}{message}") from error
