"""Prompt files: what is a line, what is a row, and what is refused."""

import json

import pytest

from flowkern.train.config import ConfigError
from flowkern.train.prompts import read_prompts

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
    for name in ("a", "a.txt.gz", "a.parquet"):
        with pytest.raises(ConfigError, match=rf"/{name}', expected .txt, .jsonl, .* or .csv"):
            read(tmp_path, name, b"a")
    (tmp_path / "folder.txt").mkdir()
    for name, reason in (("folder.txt", "Is a directory"), ("none.txt", "No such file")):
        with pytest.raises(ConfigError, match=f"^data.x: cannot read .*{name}': {reason}"):
            read_prompts(tmp_path / name, "data.x")
    with pytest.raises(ConfigError, match="directory, and the file is published at the shop$"):
        read_prompts(tmp_path / "none.txt", "data.x", "the shop")
    with pytest.raises(ConfigError, match="Is a directory$"):  # there, and no such file
        read_prompts(tmp_path / "folder.txt", "data.x", "the shop")
