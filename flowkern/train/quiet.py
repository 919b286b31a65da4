"""Libraries that say what they do: a run has its own bars, and says in a line what it loaded."""

from __future__ import annotations

import os
import sys
import warnings

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def quiet() -> None:
    """No bars of transformers and diffusers, none of their notes, and no warnings of what libraries
    will be; errors are raised as before. A download is shown on a terminal. Of several processes
    the first alone warns, and of what this package warns a line has no place in the code. What the
    environment says of verbosity holds.
    """
    import diffusers
    import huggingface_hub
    import transformers

    is_first = os.environ.get("RANK", "0") == "0"

    for library, name in ((transformers, "TRANSFORMERS"), (diffusers, "DIFFUSERS")):
        log = library.utils.logging
        if os.environ.get(f"{name}_VERBOSITY", "error") == "error":
            log.set_verbosity_error()
        log.disable_progress_bar()
    if not (is_first and sys.stderr.isatty()):
        huggingface_hub.utils.disable_progress_bars()
    for library in ("accelerate", "peft", "diffusers", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\b")
    if not is_first:
        warnings.simplefilter("ignore")
    warnings.formatwarning = _formatted


_others = warnings.formatwarning


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if category is UserWarning and os.path.abspath(filename).startswith(PACKAGE):
        return f"warning: {' '.join(str(message).split())}\n"
    return _others(message, category, filename, lineno, line)
