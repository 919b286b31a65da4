"""Pipeline directories: looked through before they are loaded, because the loaders make up what is
missing and import what is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
LIBRARIES = {"diffusers", "transformers"}
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Any of these sets of files makes a tokenizer; without, transformers makes one of a few words."""
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


def check_directory(path: str | Path) -> None:
    """Raise ValueError or FileNotFoundError naming the component that lacks its files."""
    for name, entry in components(read_index(path)).items():
        if entry[0] not in LIBRARIES or len(entry) != 2:
            raise ValueError(
                f"path: model_index.json has {name} from {entry[0]!r}, expected one of "
                f"{', '.join(sorted(LIBRARIES))}"
            )
        folder = Path(path) / name
        if not folder.is_dir():
            raise FileNotFoundError(f"path: {str(path)!r} lacks {name}/, which its index names")
        if name.startswith("tokenizer"):
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


def check_vocabularies(pipeline: Any) -> None:
    """`check_vocabulary` of every tokenizer: that of text_encoder_2 is tokenizer_2."""
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            encoder = name.replace("tokenizer", "text_encoder", 1)
            check_vocabulary(name, part, pipeline.components.get(encoder))


def loaded_apart(path: str | Path, dtype: Any) -> dict[str, Any]:
    """The parts of a directory that are given to the pipeline's own loader: its text encoders, and
    None for each that is null in the index, without which that loader fails.

    Raises ValueError where a file of an encoder lacks a tensor: the pipeline's own loader draws it
    by lot, with a warning at most.
    """
    import transformers

    found: dict[str, Any] = {}
    for name, entry in read_index(path).items():
        if entry == [None, None]:
            found[name] = None
        elif name.startswith("text_encoder") and isinstance(entry, list) and entry:
            options = {"local_files_only": True, "use_safetensors": True}
            found[name], told = getattr(transformers, entry[1]).from_pretrained(
                Path(path) / name, dtype=dtype, output_loading_info=True, **options
            )
            missing = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
            if missing:
                raise ValueError(
                    f"path: the weights of {name} lack {missing[0]}, or have another shape"
                )
    return found
