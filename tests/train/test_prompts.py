"""Prompt files: what is a line, what is a row, and what is refused."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flowkern.train.config import ConfigError, DataConfig
from flowkern.train.data import digest_of, prompts_of
from flowkern.train.distributed import share
from flowkern.train.prompts import Columns, draw_prompts, read_prompts
from flowkern.train.revision import with_data_pinned

ODD = "form\x0cfeed, sep\x1carator, line\u2028s, par\u2029s, next\x85line, \x0bv, lone\rreturn"


def read(path, name, data):
    path = path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_prompts(path, "data.test_prompts")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_newline_ends_a_line(tmp_path, mark, end):
    text = mark + end.join(["one", "", f" {ODD} ", "\x0c", "last"])
    assert [prompt["prompt"] for prompt in read(tmp_path, "a.TXT", text)] == ["one", ODD, "last"]
    lines = mark + end.join(['{"prompt": "one", "n": [1]}', " ", '{"prompt": "\u2028x\x85"}', ""])
    for name in ("a.jsonl", "a.ndjson", "a.JSONL"):
        expected = [{"prompt": "one", "n": [1]}, {"prompt": "\u2028x\x85"}]
        assert read(tmp_path, name, lines) == expected
    table = mark + end.join(["n,prompt", '1,"a, ""b""\nc"', "", f'2,"{ODD}"'])
    expected = [{"n": "1", "prompt": 'a, "b"\nc'}, {"n": "2", "prompt": ODD}]
    assert read(tmp_path, "a.Csv", table) == expected
    whole = mark + end.join(["[", '{"prompt": "one"},', '{"prompt": "two", "n": 2}]'])
    assert read(tmp_path, "a.json", whole) == [{"prompt": "one"}, {"prompt": "two", "n": 2}]


def test_lists_are_read_as_they_were_released(tmp_path):
    """HPDv2's train.json and test.json, HPSv2's benchmark, and the index of prepared embeddings."""
    pair = {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["1.jpg", "2.jpg"]}
    notes = [{"rank": [1, 2], "user_hash": "a"}]
    ranked = {"prompt": "a dog", "image_path": ["3.jpg"], "rank": [1], "raw_annotations": notes}
    assert read(tmp_path, "train.json", json.dumps([pair, ranked])) == [pair, ranked]
    benchmark = read(tmp_path, "anime.json", json.dumps(["a cat", 'a "dog"']))
    assert benchmark == [{"prompt": "a cat"}, {"prompt": 'a "dog"'}]
    index = [{"prompt_embed_path": "0.pt", "text_ids": "0.pt", "caption": "a cat"}]
    found = read(tmp_path, "videos2caption.json", json.dumps(index))
    assert found == [{"prompt": "a cat", **index[0]}]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"", "no prompts in it"),
    ("a.txt", b"\n \r\n", "no prompts in it"),
    ("a.json", b"[]", "no prompts in it"),
    ("a.csv", b"prompt\n", "no prompts in it"),
    ("a.txt", b"ok\n\xff\xfea\x00", "line 2: byte 0xff is no UTF-8 text"),
    ("a.txt", "caf\xe9".encode("latin-1"), "line 1: byte 0xe9 is no UTF-8 text"),
    ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: byte 0xff is no UTF-8 text"),
    ("a.txt", b"ok\nb\x00d", "line 2: a NUL is no text"),
    ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "line 2: got {'text': 'b'}, expected a string"),
    ("a.jsonl", b'{"prompt": null}', "line 1: got {'prompt': None}, expected a string"),
    ("a.jsonl", b'"a"', "line 1: got 'a', expected a string"),
    ("a.json", b'["a", 3]', "entry 2: got 3, expected a string"),
    ("a.jsonl", b'{"caption": 3}', r"line 1: got {'prompt': 3, 'caption': 3}, expected a string"),
    ("a.jsonl", b'{"caption": "b", "prompt": null}', "line 1: got .*, expected a string"),
    ("a.jsonl", b"\n\na prompt", "line 3: not JSON: Expecting value at column 1"),
    ("a.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
    ("a.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' is there twice"),
    ("a.jsonl", b'{"prompt": "\\ud800"}', r"line 1: '\\ud800' has half of a surrogate pair"),
    ("a.json", b'[{"prompt": "a"},\n{"prompt": b}]', "line 2: not JSON: Expecting value at column"),
    ("a.json", b'[{"prompt": "a"}, {}]', "entry 2: got {}, expected a string"),
    ("a.json", b'{"prompt": "a"}', "line 1: got {'prompt': 'a'}, expected a list"),
    ("a.csv", b"text\na", r"line 1: got columns \['text'\], expected a \"prompt\""),
    ("a.csv", b"prompt,prompt\na,b", r"line 1: got columns .*, each once"),
    ("a.csv", b"prompt,n\na,1\nb", "line 3: got 1 cells, expected 2"),
    ("a.csv", b'prompt\n"a', "line 2: unexpected end of data"),
    ("a.csv", b"prompt\n" + b"a" * 200_000, "line 2: field larger than"),
])  # fmt: skip
def test_files_that_hold_no_prompts_are_refused_by_key_file_and_line(tmp_path, name, data, message):
    with pytest.raises(ConfigError, match=rf"^data\.test_prompts: '\S*/{name}', {message}") as stop:
        read(tmp_path, name, data)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400


def test_paths_that_are_no_such_file_are_refused(tmp_path):
    for name in ("a", "a.txt.gz", "a.xlsx"):
        with pytest.raises(ConfigError, match=rf"/{name}', expected .txt, .jsonl, .* or .parquet"):
            read(tmp_path, name, b"a")
    (tmp_path / "folder.txt").mkdir()
    for name, reason in (("folder.txt", "Is a directory"), ("none.txt", "No such file")):
        with pytest.raises(ConfigError, match=f"^data.x: cannot read .*{name}': {reason}"):
            read_prompts(tmp_path / name, "data.x")
    with pytest.raises(ConfigError, match="directory, and the file is published at the shop$"):
        read_prompts(tmp_path / "none.txt", "data.x", "the shop")
    with pytest.raises(ConfigError, match="Is a directory$"):  # there, and no such file
        read_prompts(tmp_path / "folder.txt", "data.x", "the shop")


# ---- columns, parquet, data sets ----

ROWS = [{"text": "a cat", "n": 1, "tag": "x"}, {"text": "a dog", "n": 2, "tag": "y"}]


def mapped(path, prompt="text", metadata=None):
    return read_prompts(path, "data.train_prompts", columns=Columns(prompt, metadata))


def test_a_column_is_the_prompt_and_others_are_metadata(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text("text,n,tag\na cat,1,x\na dog,2,y\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        number = str if name == "a.csv" else int
        found = mapped(tmp_path / name)
        assert found[1] == {"n": number(2), "tag": "y", "prompt": "a dog"}
        found = mapped(tmp_path / name, metadata=["tag"])
        assert found == [{"tag": "x", "prompt": "a cat"}, {"tag": "y", "prompt": "a dog"}]
        for wrong in ({"prompt": "title"}, {"metadata": ["seed"]}):
            missing = "title" if "prompt" in wrong else "seed"
            with pytest.raises(ConfigError, match=rf"^data.train_prompts: .*{name}', .*{missing}"):
                mapped(tmp_path / name, **wrong)
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ConfigError, match="has lines and no columns; expected data.prompt_col"):
        mapped(tmp_path / "a.txt")


def test_parquet_has_the_same_prompts_and_no_bytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pixels = [{"bytes": b"\x89PNG", "path": "0.png"}] * 2
    rows = [row | {"image": image} for row, image in zip(ROWS, pixels, strict=True)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert mapped(tmp_path / "a.parquet") == mapped_rows(ROWS)
    assert mapped(tmp_path / "a.parquet", metadata=[]) == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    parquet.write_table(
        table.rename_columns(["caption", "n", "tag", "image"]), tmp_path / "b.parquet"
    )
    assert read_prompts(tmp_path / "b.parquet")[0]["prompt"] == "a cat"
    for rows, message in (
        ([{"prompt": "a"}, {"prompt": None}], "row 2: got {'prompt': None}, expected a string"),
        ([{"words": "a"}], r"got columns \['words'\], expected a \"prompt\""),
        ([{"prompt": "a"}][:0], "no prompts in it|expected a"),
    ):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
        with pytest.raises(ConfigError, match=f"^data.test_prompts: '.*/c.parquet', {message}"):
            read_prompts(tmp_path / "c.parquet", "data.test_prompts")
    with pytest.raises(ConfigError, match="^data.test_prompts: '.*/d.parquet', .*Parquet"):
        read(tmp_path, "d.parquet", b"no parquet at all")


def mapped_rows(rows):
    return [{"n": row["n"], "tag": row["tag"], "prompt": row["text"]} for row in rows]


def test_a_data_set_is_read_by_split_and_columns_and_has_a_digest(tmp_path, monkeypatch):
    """A directory in place of the hub's: what `datasets` does with either is the same then."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "set"
    place.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"prompt_column": "text", "metadata_columns": ["tag"]}
    data = DataConfig(train_prompts=str(place), test_prompts=str(place), **options)
    assert prompts_of(data, "train_prompts") == mapped(place / "train.jsonl", metadata=["tag"])
    assert prompts_of(data, "test_prompts") == [{"tag": "x", "prompt": "a cat"}]
    first = data.model_copy(update={"train_split": "train[:1]"})
    assert prompts_of(first, "train_prompts") == prompts_of(data, "test_prompts")
    digests = [digest_of(d, w) for d in (data, first) for w in ("train_prompts", "test_prompts")]
    assert digests[1] == digests[2] == digests[3] != digests[0]
    none = data.model_copy(update={"train_split": "dev"})
    with pytest.raises(ConfigError, match=r"^data.train_prompts: '[^']*/set', split 'dev': .*dev"):
        prompts_of(none, "train_prompts")
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("no cache, and no hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("flowkern.train.data.no_answer", lambda: None)
    hub = DataConfig(train_prompts="someone/prompts", revision="v2", dataset_config_name="short")
    assert hub.train_prompts == "someone/prompts", "no path"
    with pytest.raises(ConfigError, match="'someone/prompts', split 'train': .*no cache, and no h"):
        prompts_of(hub, "train_prompts")
    assert asked == [(("someone/prompts", "short"), {"split": "train", "revision": "v2"})]
    with monkeypatch.context() as patch:
        patch.setattr("flowkern.train.data.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"takes datasets: pip install 'flowkern\[data\]'"):
            prompts_of(hub.model_copy(update={"revision": "v3"}), "train_prompts")


def test_a_run_keeps_the_commit_of_its_data_set(tiny, tmp_path, monkeypatch):
    from accelerate import Accelerator
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr("flowkern.models.hub.no_answer", lambda: why)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def dataset_info(self, name, revision):
        asked.append((name, revision))
        return SimpleNamespace(sha="1" * 40)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)

    def pinned(*options):
        config = tiny("data.train_prompts=someone/prompts", *options)
        return with_data_pinned(config, Accelerator(cpu=True)).data.revision

    none, latest = "data.test_prompts=null", "train.resume_from_checkpoint=latest"
    why = None
    assert (
        pinned(none) == pinned("data.test_prompts=someone/prompts", "data.revision=v2") == "1" * 40
    )
    assert asked == [("someone/prompts", None), ("someone/prompts", "v2")]
    assert pinned("data.test_prompts=someone/others", "data.revision=v2") == "v2", "not of both"
    kept = {"train_prompts": "someone/prompts", "test_prompts": None, "revision": "2" * 40}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": kept}))
    pinned(none, latest)
    assert asked[2:] == [("someone/prompts", "2" * 40)], "of the run that is resumed"
    why = "the hub cannot be reached"
    (tmp_path / "datasets--someone--prompts/refs").mkdir(parents=True)
    (tmp_path / "datasets--someone--prompts/refs/v2").write_text("3" * 40)
    revisions = [pinned(none, *more) for more in ((), (latest,), ("data.revision=v2",))]
    assert revisions == [None, "2" * 40, "3" * 40] and len(asked) == 3


def test_without_the_hub_a_data_set_is_that_of_its_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("flowkern.train.data.no_answer", lambda: "the hub cannot be reached")
    table = datasets.Dataset.from_dict({"prompt": ["a"]})
    monkeypatch.setattr(type(table), "cache_files", [{"filename": "/cache/set/0.0.0/abc/x.arrow"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    of = partial(DataConfig, train_prompts="someone/prompts")
    assert prompts_of(of(revision="abc"), "train_prompts") == [{"prompt": "a"}]
    with pytest.raises(
        ConfigError, match="is in the cache of data sets as abc, data.revision is 'd"
    ):
        prompts_of(of(revision="def"), "train_prompts")


def test_options_of_a_data_set_are_refused_for_files():
    for name in ("train_split", "test_split", "revision", "dataset_config_name"):
        with pytest.raises(ValueError, match=f"{name}: got 'x', which a file of prompts has not"):
            DataConfig(train_prompts="some/train.txt", **{name: "x"})
    assert DataConfig(train_prompts="some/train.txt").train_prompts.endswith("/some/train.txt")


def test_groups_are_the_same_for_any_number_of_processes():
    """Of each optimizer step: the same prompts, and the same slots, whose noise they name."""
    for seed, iteration, updates in ((0, 0, 1), (3, 7, 2), (5, 2, 3)):
        drawn = draw_prompts(50, 24, seed, iteration)
        assert len({*drawn}) == 24
        steps = []
        for world in (1, 2, 4):
            slots = [share(24, rank, world, updates) for rank in range(world)]
            ranks = [mine.tensor_split(updates) for mine in slots]
            steps.append([{*torch.cat([r[i] for r in ranks]).tolist()} for i in range(updates)])
        assert steps[0] == steps[1] == steps[2]
        assert [drawn[slot] for part in steps[0] for slot in sorted(part)] == drawn
