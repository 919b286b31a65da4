"""Pipeline directories: looked through before they are loaded, because the loaders make up what is
missing and import what is named.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

INDEX = "model_index.json"
LIBRARIES = {"diffusers", "transformers"}
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Any of these sets of files makes a tokenizer; without, transformers makes one of a few words."""
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # text_encoder_2's is tokenizer_2
NETWORK = "transformer"
CONFIGS = {"scheduler": "scheduler_config.json", TOKENIZER: "tokenizer_config.json"}
CONFIGS |= dict.fromkeys((NETWORK, "vae", ENCODER), "config.json")
"""By what a part's name begins with; transformers makes one up where it is not there."""
NAMES = {ENCODER: "model_type"} | dict.fromkeys(("scheduler", NETWORK, "vae"), "_class_name")
"""What is in each such file; one without is another's, or empty, and loaders take defaults: an
encoder of billions of weights, a grid that is not the model's."""
VARIANTS = (".fp16", ".bf16", ".non_ema")
"""Of files of weights, which are not read."""
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
    index = _read_object(file)
    if not isinstance(index.get("_class_name"), str):
        name = index.get("_class_name")
        raise ValueError(f"path: {file} has _class_name {name!r}, expected a pipeline class")
    return index


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"path: {file} holds a {type(found).__name__}, expected an object")
    return found


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


def check_index(path: str | Path, kind: type, optional: Sequence[str]) -> None:
    """Raise ValueError naming a part that pipelines of a class have and this one's index has not,
    or a network of other pipelines.

    optional: parts that may be null, a tokenizer with its encoder.
    """
    takes = inspect.signature(kind.__init__).parameters
    needs = [p.name for p in takes.values() if p.default is p.empty and p.name != "self"]
    index = read_index(path)
    there = components(index)
    for name in {NETWORK: None, **dict.fromkeys(needs)}:
        is_null = name in index and name.replace(TOKENIZER, ENCODER) not in there
        if name not in there and not (is_null and name in optional):
            raise ValueError(f"path: {str(Path(path) / INDEX)!r} has no {name}")
    network = str(there[NETWORK][-1])
    if network not in str(takes[NETWORK].annotation):
        raise ValueError(
            f"path: {str(Path(path) / INDEX)!r} has a {network}, which no {kind.__name__} has"
        )


def check_directory(path: str | Path, *, without: Sequence[str] = ()) -> None:
    """Raise ValueError or FileNotFoundError naming the component that lacks its files, or the file
    that is not whole.

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
        _check_part(name, entry[1], folder)


def _check_part(name: str, kind: str, folder: Path) -> None:
    """Of weights the headers, which tell how long a file is. kind: its class, in the index."""
    for beginning, config in CONFIGS.items():
        if name.startswith(beginning) and not (folder / config).is_file():
            raise FileNotFoundError(f"path: {str(folder)!r} has no {config}")
        if name.startswith(beginning):
            said, entry = _read_object(folder / config), NAMES.get(beginning)
            if not said or (entry and not isinstance(said.get(entry), str)):
                wanted = f"a {entry}" if entry else "a tokenizer's options"
                raise ValueError(f"path: {str(folder / config)!r} is not whole; expected {wanted}")
    for file in folder.glob("*config.json"):
        own = _read_object(file).get("_class_name", kind)
        if own != kind and name.startswith((NETWORK, "vae")):
            raise ValueError(f"path: {str(folder)!r} is a {own}, and its index has a {kind}")
    for file in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(_read_object(file).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"path: {str(folder)!r} lacks {shard}")
    for file in folder.glob("*.safetensors"):
        if any(variant in file.name for variant in VARIANTS):
            continue
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"path: {str(file)!r} is not whole: {error}") from None


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


def check_template(name: str, tokenizer: Any, conversation: Callable[[str], Any]) -> None:
    """Raise ValueError where a tokenizer's own template, of a pipeline that takes it, is none, or
    leaves the prompt out: every prompt's row would be the same.

    conversation: of a prompt; None where the pipeline does without.
    """
    prompt = "a red cat"
    turns = conversation(prompt)
    if turns is None:
        return
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # of jinja, too
        wrong = " ".join(str(error).split())
        raise ValueError(f"path: {name} has no chat template that serves: {wrong:.200}") from None
    if prompt not in text:
        raise ValueError(f"path: the chat template of {name} leaves the prompt out: {text!r:.80}")


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
        options["ignore_mismatched_sizes"] = True  # they are named below
        found[name], told = getattr(transformers, kind).from_pretrained(
            Path(path) / name, dtype=dtype, output_loading_info=True, **options
        )
        mismatched = [key for key, *_ in told["mismatched_keys"]]
        missing = sorted([*told["missing_keys"], *mismatched])
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
