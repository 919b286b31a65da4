"""Pipeline directories: looked through before they are loaded, because the loaders make up what is
missing and import what is named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

INDEX = "model_index.json"
LIBRARIES = {"diffusers", "transformers"}
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Any of these sets of files makes a tokenizer; without, transformers makes one of a few words."""
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # text_encoder_2's is tokenizer_2
SPARE_ROWS = 0.9  # an encoder's table is rounded up, T5's from 32,100 to 32,128


def read_index(path: str | Path) -> dict[str, Any]:
    """A pipeline directory's model_index.json.

    Raises FileNotFoundError where there is none, ValueError where it is no such index.
    """
    file = Path(path) / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"path: {str(path)!r} has no {INDEX}; expected a pipeline directory as diffusers' "
            "save_pretrained writes it, or the id of one on the hub, OWNER/NAME"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {file} is not JSON: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"path: {file} holds a {type(index).__name__}, expected an object")
    if not isinstance(index.get("_class_name"), str):
        name = index.get("_class_name")
        raise ValueError(f"path: {file} has _class_name {name!r}, expected a pipeline class")
    return index


def components(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The parts that an index names, and where each is from; without those that are null."""
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry not in ([None, None], [])
    }


def text_encoders(path: str | Path) -> list[str]:
    """Those that an index names."""
    return [name for name in components(read_index(path)) if name.startswith(ENCODER)]


def check_directory(path: str | Path, *, without: Sequence[str] = ()) -> None:
    """Raise ValueError or FileNotFoundError naming the component that lacks its files.

    without: components that may lack them.
    """
    for name, entry in components(read_index(path)).items():
        if entry[0] not in LIBRARIES or len(entry) != 2:
            raise ValueError(
                f"path: model_index.json has {name} from {entry[0]!r}, expected one of "
                f"{', '.join(sorted(LIBRARIES))}"
            )
        folder = Path(path) / name
        if name in without:
            continue
        if not folder.is_dir():
            raise FileNotFoundError(f"path: {str(path)!r} lacks {name}/, which its index names")
        if name.startswith(TOKENIZER):
            if not any(all((folder / f).is_file() for f in files) for files in TOKENIZERS):
                wanted = ", or ".join(" and ".join(files) for files in TOKENIZERS)
                raise FileNotFoundError(
                    f"path: {str(folder)!r} has no vocabulary; expected {wanted}"
                )


def check_vocabulary(name: str, tokenizer: Any, encoder: Any) -> None:
    """Raise ValueError where a tokenizer was not made for its encoder.

    Its ids number at most the encoder's rows, and at least nine tenths of them.
    """
    if tokenizer is None or encoder is None:
        return
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, which has no length
    ids, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
    if not SPARE_ROWS * rows <= ids <= rows:
        raise ValueError(
            f"path: {name} has {ids} words and its encoder {rows} rows; expected the tokenizer "
            "that the encoder was trained with"
        )


def check_whole(pipeline: Any) -> None:
    """Raise ValueError naming a weight that no file had."""
    for name, part in pipeline.components.items():
        for weight, value in getattr(part, "named_parameters", dict)() or ():
            if value.is_meta:
                raise ValueError(f"path: the weights of {name} lack {weight}")


def left_out(path: str | Path) -> dict[str, None]:
    """What the pipeline's own loader is given as None: its text encoders, which are loaded apart;
    what is null in the index, without which that loader fails; and a tokenizer whose encoder is.
    """
    index = read_index(path)
    found = [name for name, entry in index.items() if entry == [None, None]]
    found += [name.replace(ENCODER, TOKENIZER, 1) for name in found if name.startswith(ENCODER)]
    return dict.fromkeys(name for name in (*found, *text_encoders(path)) if name in index)


def load_encoders(path: str | Path, dtype: Any) -> dict[str, nn.Module]:
    """The text encoders of a directory, by their names.

    Raises FileNotFoundError or ValueError, of one line that begins with path, where one is not
    there or not whole: the pipeline's own loader draws what a file lacks by lot, with a warning at
    most.
    """
    import transformers

    check_directory(path)
    found: dict[str, nn.Module] = {}
    for name in text_encoders(path):
        kind = read_index(path)[name][1]
        options = {"local_files_only": True, "use_safetensors": True}
        found[name], told = getattr(transformers, kind).from_pretrained(
            Path(path) / name, dtype=dtype, output_loading_info=True, **options
        )
        missing = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
        if missing:
            raise ValueError(
                f"path: the weights of {name} lack {missing[0]}, or have another shape"
            )
    return found


def cannot_be_loaded(path: str | Path, error: Exception, keys: Sequence[str] = ("path",)) -> str:
    """What is wrong with a directory, in a line that begins with one of `keys`: loaders raise of
    every kind, some without a word of the file.
    """
    message = " ".join(str(error).split())
    if message.startswith(tuple(f"{key}: " for key in keys)):
        return message
    return f"path: {str(path)!r} cannot be loaded: {type(error).__name__}: {message}"
