"""Encoded prompts: once per run, on the host or in a folder; encoders are freed."""

import gc
import multiprocessing
import shutil
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from flowkern.models import encoded, load_model, text
from flowkern.models.encoded import InFolder, InMemory
from flowkern.models.sd3 import SD3

DIGITS = Path(__file__).resolve().parents[2] / "assets/digits-sd3"
PROMPTS = ["the digit 3", "a handwritten seven", "the digit 3", ""]
PARTS = {"tokens": torch.arange(6.0).view(1, 2, 3), "mask": torch.tensor([[True, False]])}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def counted(model, monkeypatch):
    """The prompts that its pipeline is asked to encode."""
    asked, encode = [], model.pipeline.encode_prompt
    monkeypatch.setattr(
        model.pipeline, "encode_prompt", lambda **kw: asked.extend(kw["prompt"]) or encode(**kw)
    )
    return asked


@pytest.fixture
def loads(monkeypatch):
    """Of text encoders, by their directories' names."""
    found, load = [], text.load_encoders
    monkeypatch.setattr(
        text, "load_encoders", lambda at, dtype: found.append(at.name) or load(at, dtype)
    )
    return found


@pytest.mark.parametrize("where", ["host", "folder"])
def test_each_prompt_is_encoded_once_and_no_encoder_is_kept(where, monkeypatch, tmp_path):
    model = load_model(DIGITS)
    asked, folder = counted(model, monkeypatch), tmp_path / "rows" if where == "folder" else None
    expected = load_model(DIGITS).encode(PROMPTS).parts
    encoders = [
        weakref.ref(model.pipeline.components[f"text_encoder{n}"]) for n in ("", "_2", "_3")
    ]
    weights = [weakref.ref(p) for encoder in encoders for p in encoder().parameters()]
    model.prepare(PROMPTS, folder)
    gc.collect()
    assert len(encoders) == 3 and not any(ref() is not None for ref in (*encoders, *weights))
    assert asked == list(dict.fromkeys(PROMPTS))
    for _ in range(2):
        assert same(model.encode(PROMPTS).parts, expected)
    with pytest.raises(ValueError, match="prompts: 'the digit 8' is new, and the encoders are rel"):
        model.encode(["the digit 8"])
    if folder is None:
        return
    other = load_model(DIGITS)
    found = counted(other, monkeypatch)
    other.prepare([*PROMPTS, "the digit 8"], folder)
    assert found == ["the digit 8"] and same(other.encode(PROMPTS).parts, expected)


def test_a_row_is_the_same_whatever_is_asked_with_it():
    together = load_model(DIGITS).encode(PROMPTS)
    alone = [load_model(DIGITS).encode([prompt]) for prompt in PROMPTS[:2]]
    for row, one in enumerate(alone):
        assert same(together[[row]].parts, one.parts)


def test_a_file_is_of_all_that_its_row_was_made_by(tmp_path, monkeypatch):
    """Model, length, template, dtype, prompt, versions: whatever differs is made anew."""
    other = tmp_path / "other"
    shutil.copytree(DIGITS, other)
    (other / "tokenizer_3/more.txt").write_text("")
    folder, made = tmp_path / "rows", []

    def files(path=DIGITS, prompt="the digit 3", dtype=torch.float32, **options):
        model = load_model(path, dtype=dtype, **options)
        model.prepare([prompt], folder)
        return sum(file.is_file() for file in folder.glob("??/*"))

    for number, options in enumerate((
        {}, {"prompt": "the digit 4"}, {"path": other}, {"dtype": torch.bfloat16},
        {"max_sequence_length": 7},
    ), start=1):  # fmt: skip
        assert files(**options) == number, options
        assert files(**options) == number, "and is found again"
        made.append(options)
    monkeypatch.setattr(SD3, "template", "in other words: {}")
    assert files() == len(made) + 1
    monkeypatch.setattr("transformers.__version__", "0")
    assert files() == len(made) + 2
    copied = tmp_path / "copied"
    shutil.copytree(DIGITS, copied)
    assert files(path=copied) == len(made) + 2, "the same content is the same model"


def _without_encoders(directory):
    for folder in directory.glob("text_encoder*"):
        shutil.rmtree(folder)


def test_encoders_are_loaded_for_a_prompt_that_the_cache_lacks_and_for_nothing_else(
    loads, tmp_path
):
    """Then they may lack, too."""
    first, folder = tmp_path / "first", tmp_path / "rows"
    shutil.copytree(DIGITS, first)
    expected = load_model(DIGITS).encode(PROMPTS).parts
    loads.clear()

    def prepared(path=first, prompts=PROMPTS):
        model = load_model(path, text_encoders=False)
        assert model.pipeline.text_encoder is model.pipeline.text_encoder_3 is None
        model.prepare(prompts, folder)
        assert model.pipeline.text_encoder is None
        return model.encode(prompts).parts

    assert same(prepared(), expected) and loads == ["first"]
    assert same(prepared(), expected) and loads == ["first"]
    prepared(prompts=["the digit 8"])
    assert loads == ["first", "first"]
    shutil.copytree(first, tmp_path / "bare")
    _without_encoders(tmp_path / "bare")
    assert same(prepared(tmp_path / "bare"), expected) and loads == ["first", "first"]
    for refused in (
        lambda: prepared(tmp_path / "bare", ["the digit 9"]), lambda: load_model(tmp_path / "bare"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match="^path: .*/bare' lacks text_encoder/, which"):
            refused()
    with pytest.raises(FileNotFoundError, match="^path: .*/bare' lacks .* of 0 directories"):
        load_model(tmp_path / "bare", text_encoders=False).prepare(PROMPTS, tmp_path / "new")
    (first / "text_encoder/model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="^path: .*/first/.*safetensors' is not whole"):
        prepared()  # by its size and time another content, of which nothing is known
    with pytest.raises(FileNotFoundError, match="of 2 directories with this index .*, expected of"):
        prepared(tmp_path / "bare")


def test_files_are_told_apart_by_what_they_are_and_read_once(tmp_path, monkeypatch):
    model, folder, read = tmp_path / "model", tmp_path / "rows", []
    shutil.copytree(DIGITS, model)
    digest = encoded.hashlib.file_digest
    monkeypatch.setattr(
        encoded.hashlib, "file_digest", lambda f, kind: read.append(f.name) or digest(f, kind)
    )

    def content():
        read.clear()
        found = encoded.content_of(model, folder)
        return found, any("text_encoder" in name for name in read)

    first, is_read = content()
    assert is_read and content() == (first, False)
    weights = model / "text_encoder_2/model.safetensors"
    _flip(weights, -1)  # of the same size
    second, is_read = content()
    assert is_read and second != first and content() == (second, False)
    _flip(weights, -1)
    assert content() == (first, True)
    (model / "tokenizer/more.txt").write_text("")
    assert content()[0] not in (first, second)
    folder = tmp_path / "file"
    folder.write_text("")
    assert content() == content() and content()[1], "nothing is remembered where nothing can be"


def _flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def _put_another(file):
    (other,) = (f for f in file.parents[1].rglob("*") if f.is_file() and f != file)
    shutil.copy(other, file)


BREAK = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut to nothing": lambda file: file.write_bytes(b""),
    "a bit of its tensors": lambda file: _flip(file, -1),
    "a bit of its header": lambda file: _flip(file, 45),
    "a bit of its digest": lambda file: _flip(file, 0),
    "something else": lambda file: file.write_bytes(b"x" * 1000),
    "another's": _put_another,
}


@pytest.mark.parametrize("case", BREAK)
def test_a_broken_file_is_made_again_and_never_trusted(case, tmp_path):
    rows = InFolder(tmp_path, {"made by": "a test"})
    rows.put("another", 2, {"tokens": torch.zeros(1, 2, 3)})
    rows.put("a", 2, PARTS)
    file = rows._file("a", 2)
    assert same(rows.get("a", 2), PARTS) and rows.get("a", 3) is rows.get("b", 2) is None
    BREAK[case](file)
    assert rows.get("a", 2) is None
    rows.put("a", 2, PARTS)
    assert same(rows.get("a", 2), PARTS)


def _write_and_read(folder, parts, barrier, failed):
    torch.set_num_threads(1)  # a forked process has none of its parent's
    rows = InFolder(folder, {})
    barrier.wait()
    for turn in range(200):
        rows.put("a", 2, parts)
        found = rows.get("a", 2)
        if found is None or not same(found, parts):
            failed.value = turn + 1


def test_two_processes_share_a_folder(tmp_path):
    """A reader meets whole files only, however many write them."""
    context = multiprocessing.get_context("fork")
    barrier, failed = context.Barrier(2), context.Value("i", 0)
    parts = {"tokens": torch.arange(20_000.0).view(1, -1, 4)}
    arguments = (tmp_path, parts, barrier, failed)
    processes = [context.Process(target=_write_and_read, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and failed.value == 0
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 1, "nothing else stays"


def test_a_row_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoded.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        InFolder(tmp_path, {}).put("a", 2, PARTS)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_the_host_keeps_the_latest_unless_a_run_said_which_there_will_be(monkeypatch):
    rows = InMemory(2)
    for prompt in "abc":
        rows.put(prompt, 1, PARTS)
    assert rows.get("a", 1) is None and rows.get("b", 1) is rows.get("c", 1) is PARTS
    model = load_model(DIGITS)
    monkeypatch.setattr(model._encoded, "limit", 1)
    model.prepare(PROMPTS)
    assert len(model.encode(PROMPTS)) == len(PROMPTS)


def test_mistakes_are_named(monkeypatch, tmp_path):
    model = load_model(DIGITS)
    made = SD3(model.pipeline)
    with pytest.raises(ValueError, match="prompt_cache: the model was made in memory"):
        made.prepare(PROMPTS, tmp_path)
    monkeypatch.setattr(text.os, "sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="prompt_cache: 3 encoded prompts are 0 GB, and this mach"):
        model.prepare(PROMPTS)
