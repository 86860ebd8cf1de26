"""Windows of calibration text: which tokens, and what is said about a file that will not do."""

import json

import pytest
import torch

from qzo.errors import BadInput
from qzo.quantize.calibration import load_windows


class Letters:
    """A tokenizer: the letter's place in the alphabet, and 0 before each document."""

    def __call__(self, text: str, verbose: bool) -> dict:
        return {"input_ids": [0, *(ord(letter) - 96 for letter in text)]}


def write(path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text, "more": 1}) + "\n\n" for text in texts))
    return str(path)


def test_windows_are_spread_evenly_over_the_documents(tmp_path):
    file = write(tmp_path / "a.jsonl", "abcdef", "ghi", "jklmnopqrstu")  # 7 + 4 + 13 tokens: 8 windows of 3
    every = load_windows(file, Letters(), 8, 3, 99)
    assert every.dtype == torch.int64
    assert every.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 0, *range(10, 22)]
    assert torch.equal(load_windows(file, Letters(), 4, 3, 99), every[[0, 2, 4, 6]])
    assert torch.equal(load_windows(file, Letters(), 3, 3, 99), every[[0, 2, 5]])


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefg")
    assert load_windows(str(tmp_path / "a.txt"), Letters(), 2, 4, 99).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_too_short_says_how_many_tokens(tmp_path):
    file = write(tmp_path / "a.jsonl", "abcdef", "ghi")
    with pytest.raises(BadInput, match=r"11 tokens; expected 20 \(4 windows of 5\).*samples=2"):
        load_windows(file, Letters(), 4, 5, 99)
    with pytest.raises(BadInput, match="smaller max_length"):
        load_windows(file, Letters(), 1, 12, 99)


def test_refusals_name_the_place(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"prompt": "b", "answer": 1}\n')
    with pytest.raises(BadInput, match=r"a.jsonl line 2: the fields prompt, answer; .*text"):
        load_windows(str(file), Letters(), 1, 2, 99)
    file.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(BadInput, match="line 2"):
        load_windows(str(file), Letters(), 1, 2, 99)
    file.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(BadInput, match="line 2: not valid JSON"):
        load_windows(str(file), Letters(), 1, 2, 99)
    with pytest.raises(BadInput, match="jsonl"):
        load_windows(str(tmp_path), Letters(), 1, 2, 99)
    with pytest.raises(BadInput, match="no such file"):
        load_windows(str(tmp_path / "absent.jsonl"), Letters(), 1, 2, 99)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match="UTF-8"):
        load_windows(str(tmp_path / "b.txt"), Letters(), 1, 2, 99)
    with pytest.raises(BadInput, match="token 26; expected tokens below the model's vocabulary size of 26"):
        load_windows(write(tmp_path / "c.jsonl", "abcxyz"), Letters(), 1, 2, 26)
