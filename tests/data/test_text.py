"""Plain text: which tokens a window has, and which windows a run gets."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qzo.data import text as module
from qzo.data.batches import collate
from qzo.data.encode import Encoded, Option, fingerprint
from qzo.data.permutation import beginning
from qzo.data.tasks import get_task
from qzo.data.text import cut, documents, read_windows
from qzo.errors import BadInput

WORDS = "a charming and often affecting journey".split()


@pytest.fixture(scope="module")
def around(tokenizer):
    """The tokenizer, which puts a BOS before a text and an EOS behind it."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def texts(count):
    """Documents of different lengths."""
    return [" ".join([*WORDS, *WORDS][: 2 + i * 7 % 9] + [str(i)]) for i in range(count)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("batch", [1, 100, 1 << 20])
def test_windows_are_those_of_the_joined_documents(around, batch, monkeypatch):
    monkeypatch.setattr(module, "BATCH", batch)
    given = texts(20)
    ids = [token for text in given for token in (around.bos_token_id, *around(text, add_special_tokens=False)["input_ids"], around.eos_token_id)]
    windows = cut(given, "here", around, 16)
    assert windows.ids.dtype == torch.int32 and windows.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert len(windows) == len(ids) // 16 > 3
    assert windows[1] == Encoded((tuple(ids[16:31]),), (Option(0, 0, tuple(ids[17:32])),), 0) == windows[1 - len(windows)]
    assert [one.rows[0][0] for one in windows] == ids[: len(windows) * 16 : 16]
    batch = collate([windows[0], windows[1]], 0)
    assert batch.tokens == 30 and batch.pair_mask.all() and batch.pair_token[1, 0].tolist() == ids[17:32]


def llama_like():
    """Words are joined by U+2581, which a text also begins with; merges may cross words, and one does."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,\n0123456789"))
    merges = [("▁", "a"), ("o", "f"), ("▁", "of"), ("▁of", "▁a"), ("e", "n"), ("▁", "t")]
    vocab = {piece: i for i, piece in enumerate([*letters, "▁a", "of", "▁of", "▁of▁a", "en", "▁t"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("make", [lambda around: around, lambda around: llama_like()], ids=["byte level", "llama"])
@pytest.mark.parametrize("text", ["and often of a journey of a kind .\n\n of a dull 12 , ten\n" * 40, "of.of.of\n" * 300], ids=["words", "no seam"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(around, make, text, monkeypatch):
    tokenizer = make(around)
    whole = tokenizer(text)["input_ids"]
    monkeypatch.setattr(module, "BATCH", 300)
    pieces = list(module._in_pieces(text, tokenizer))
    assert (len(pieces) > 5) == (" " in text)
    assert cut([text], "here", tokenizer, 2).ids.flatten().tolist() == whole[: len(whole) // 2 * 2]
    assert torch.equal(cut([text], "here", tokenizer, 8, 5).ids.flatten(), torch.tensor(whole[:40], dtype=torch.int32))


def test_of_a_limit_nothing_behind_it_is_read(tokenizer):
    def endless():
        for number, text in enumerate(texts(1000)):
            read.append(number)
            yield text

    read = []
    every = cut(texts(1000), "here", tokenizer, 16)
    assert torch.equal(cut(endless(), "here", tokenizer, 16, 3).ids, every.ids[:3])
    assert sum(map(len, tokenizer([texts(1000)[i] for i in read[:-1]])["input_ids"])) < 48 and read[-1] < 30


@pytest.mark.parametrize("split, streaming, drawn", [("train", False, True), ("train", True, False), ("validation", False, False)])
def test_limits_choose_windows_as_they_choose_examples(tokenizer, tmp_path, split, streaming, drawn):
    write(tmp_path / f"{split}.jsonl", [{"text": text} for text in texts(40)])
    every = read_windows(tmp_path, split, tokenizer, 16)
    found = read_windows(tmp_path, split, tokenizer, 16, 4, streaming)
    order = beginning(0, 0, len(every), "data/subset", 4) if drawn else range(4)
    assert list(found) == [every[i] for i in order] and (list(order) != [0, 1, 2, 3]) == drawn
    assert fingerprint(found) != fingerprint(list(every)[4:8])
    assert list(read_windows(tmp_path, split, tokenizer, 16, 10**6, streaming)) == list(every)


def test_where_text_is_read(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": "one", "id": 3}, {"text": " \n"}, {"text": ""}, {"text": "two"}])
    (folder / "train.txt").write_text("not this")
    (folder / "validation.txt").write_text("three\n\nfour\n")
    assert list(documents(folder, "train")) == list(documents(folder / "train.jsonl", "any")) == ["one", "two"]
    assert len(list(documents("builtin:sentiment/calibration.jsonl", "any"))) > 9
    assert list(documents(folder, "validation")) == list(documents(folder / "validation.txt", "any")) == ["three\n\nfour\n"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"validation.txt": "a"}, r"no train.jsonl and no train.txt in it \(it holds validation.txt\); expected one of them. Name another split"),
        ({"notes": "a"}, r"no train.jsonl and no train.txt in it \(it holds no such file\)"),
        ({"train.jsonl": '{"text": "a b"}\n{"body": "a"}\n'}, r"train.jsonl line 2 \(task text\): no field 'text'; expected one of its fields: body"),
        ({"train.jsonl": '{"text": ["a"]}\n'}, r"train.jsonl line 1 \(task text\): field 'text' is list"),
        ({"train.jsonl": "{\n"}, "train.jsonl line 1: not valid JSON"),
        ({"train.jsonl": ""}, "split train: 0 tokens; expected at least one window of 16"),
        ({"train.txt": ""}, "split train: 0 tokens; expected at least one window of 16"),
        ({"train.txt": "a dull , lifeless film ."}, "split train: [0-9]+ tokens; expected at least one window of 16. Give a longer text or a smaller"),
        ({"train.txt": b"\xff\xfe"}, "train.txt: cannot be read .*; expected a UTF-8 text file"),
    ],
)
def test_text_that_cannot_be_used(tokenizer, tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        read_windows(tmp_path, "train", tokenizer, 16)


def test_other_mistakes(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        read_windows(tmp_path / "absent.txt", "train", tokenizer, 16)
    with pytest.raises(BadInput, match="window: 1; expected at least 2"):
        cut(["a"], "here", tokenizer, 1)
    with pytest.raises(BadInput, match="task text: completion set; expected no such setting: it has no prompt"):
        get_task("text", completion="x")
    with pytest.raises(BadInput, match="Did you mean text"):
        get_task("texts")
