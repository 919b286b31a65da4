"""What ends a run, in words for the person who started it."""


class RunError(Exception):
    """One line: what happened, and what of the run is kept. Its cause is what was raised."""


GONE = "Connection closed by peer", "Connection reset by peer", "remote process exited"
"""What gloo and NCCL say of one, among much else."""


def describe(error: BaseException) -> str:
    """An exception in one line; with its type, where the message alone says little."""
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and any(said in message for said in GONE):
        return "another process has ended, and says why; this one waited for it"
    if isinstance(error, RunError | ValueError | OSError | FloatingPointError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
