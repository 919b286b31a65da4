"""Models of the Hugging Face hub, OWNER/NAME: which commit a revision is, and its directory in the
hub's cache. With HF_HUB_OFFLINE, or without a network, the cache alone is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flowkern.models.directory import ENCODER, INDEX, components, read_index

# Other forms of the same weights; nothing here reads pickles.
UNREAD = "*.bin *.pt *.pth *.ckpt *.msgpack *.h5 *.onnx* *.gguf *.fp16* *.bf16* *.non_ema*".split()


def commit_of(name: str, revision: str | None = None, index: str = INDEX) -> str:
    """The commit that a branch or a tag is, or that the id's main branch is.

    index: a file that such a model has: a pipeline's, or config.json of a network of transformers.

    Raises FileNotFoundError, of one line that begins with path or revision, where the hub, or its
    cache where the hub is not asked, has no such model.
    """
    return file_of(name, revision, index).parent.name


def directory_of(name: str, commit: str, *, has_encoders: bool = True) -> Path:
    """The directory of a commit in the hub's cache, with the parts that its index names, or without
    its text encoders; what is not there yet is downloaded. Raises as `commit_of`.
    """
    from huggingface_hub import snapshot_download

    parts = components(read_index(file_of(name, commit).parent))
    parts = [part for part in parts if has_encoders or not part.startswith(ENCODER)]
    wanted = [INDEX, *(f"{part}/*" for part in parts)]
    options = {"revision": commit, "allow_patterns": wanted, "ignore_patterns": UNREAD}
    return Path(_asked(name, commit, partial(snapshot_download, name, **options)))


def file_of(name: str, revision: str | None, file: str = INDEX) -> Path:
    """A file of a revision, in the hub's cache. Raises as `commit_of`."""
    from huggingface_hub import hf_hub_download

    ask = partial(hf_hub_download, name, file, revision=revision)
    return Path(_asked(name, revision, ask, file))


def folder_of(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """The directory, in the hub's cache, of a revision's files that `wanted` names: the first is
    a file that there must be, the others are patterns. Raises as `commit_of`.
    """
    from huggingface_hub import snapshot_download

    commit = commit_of(name, revision, wanted[0])
    options = {"revision": commit, "allow_patterns": list(wanted)}
    return Path(_asked(name, commit, partial(snapshot_download, name, **options), wanted[0]))


def data_commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set is; None where neither the hub says it nor, of one
    that is named, the hub's cache. Who reads the data set says why.
    """
    from huggingface_hub import HfApi, constants

    if no_answer() is not None:
        cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs"
        noted = cached / str(revision)
        return noted.read_text().strip() if revision is not None and noted.is_file() else None
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # of the transport, too
        return None


def no_answer() -> str | None:
    """Why the hub gives no answer at all; None: it gives one.

    One question: huggingface_hub asks a host that is not there six times, in 23 s, and says each.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the transport that huggingface_hub has chosen
        said = " ".join(str(error).split()) or type(error).__name__
        return f"the hub cannot be reached: {said:.200}"
    return None


def _asked(name: str, revision: str | None, ask: Callable[..., str], index: str = INDEX) -> str:
    from huggingface_hub import constants, errors

    kinds = {INDEX: "pipeline", "config.json": "model of transformers"}
    kind = kinds.get(index, f"model with {index}")
    why = no_answer()
    try:
        return ask(local_files_only=why is not None)
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"path: {name!r} asks for consent at {constants.ENDPOINT}/{name}, and then for a login "
            "here: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"path: {name!r} is no directory here and no model of the hub; a private one asks for "
            "a login: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"revision: {name!r} has no {revision!r}; expected a branch, a tag or a commit"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = why or "the hub cannot be reached"
        at = f"the hub's cache, {constants.HF_HUB_CACHE!r}"
        cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
        if revision is not None and any(cached.glob(f"*/{index}")):
            raise FileNotFoundError(
                f"revision: {revision!r} of {name!r} is not whole in {at}, and {why}"
            ) from None
        raise FileNotFoundError(
            f"path: {name!r} is no directory here and no {kind} in {at}, and {why}"
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"path: {name!r} has no {index}: it is no {kind}") from None
    except errors.HfHubHTTPError as error:
        raise OSError(f"path: {name!r}: {' '.join(str(error).split()):.300}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the transport: a connection that breaks on the way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"path: {name!r}: the hub: {said:.300}") from error
