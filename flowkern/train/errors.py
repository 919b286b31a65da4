"""What ends a run, in words for the person who started it."""


class RunError(Exception):
    """One line: what happened, and what of the run is kept. Its cause is what was raised."""


def describe(error: BaseException) -> str:
    """An exception in one line; with its type, where the message alone says little."""
    message = " ".join(str(error).split())
    if isinstance(error, RunError | ValueError | OSError | FloatingPointError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
