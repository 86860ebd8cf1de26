"""Which records are read, and how few of the others."""

import json
import sys

import pytest

from qzo.data import permutation as module
from qzo.data.permutation import beginning, permutation
from qzo.data.records import read_records
from qzo.data.tasks import get_task, load_examples
from qzo.errors import BadInput


@pytest.fixture
def lines(tmp_path):
    """20 good records, a blank line and a line that is none behind each of them; by number."""

    def write(broken=()):
        path = tmp_path / "train.jsonl"
        made = ["{" if i in broken else json.dumps({"sentence": str(i), "label": i % 2}) + "\n" for i in range(20)]
        path.write_text("\n".join(made))
        return path

    return write


def numbers(*arguments, **options):
    return [int(e.prompt.split()[0]) for e in load_examples(get_task("sst2"), *arguments, **options)]


@pytest.mark.parametrize("n, count, chunk", [(1000, 1, 7), (1000, 20, 64), (1000, 999, 250), (50, 50, 1 << 18), (5, 9, 2)])
def test_the_beginning_is_that_of_the_permutation(n, count, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert beginning(3, 1, n, "x", count) == list(permutation(3, 1, n, "x"))[:count]


SUBSET = [17, 3, 1, 13, 18]  # frozen, as in test_tasks.py


def test_of_a_file_only_the_chosen_lines_are_parsed(lines):
    path = lines(broken=[0, 19])
    assert numbers(path, "train", 5) == SUBSET
    with pytest.raises(BadInput, match="train.jsonl line 1: not valid JSON"):
        numbers(path, "train", 20)


def test_streaming_reads_the_first_records_and_nothing_behind_them(lines):
    path = lines(broken=[5])
    assert numbers(path, "train", 5, streaming=True) == [0, 1, 2, 3, 4]
    assert numbers(path, "validation", 5) == [0, 1, 2, 3, 4]
    with pytest.raises(BadInput, match="line 11: not valid JSON"):
        numbers(path, "train", 6, streaming=True)


def test_more_than_there_are(lines):
    for streaming in (False, True):
        assert numbers(lines(), "train", 99, streaming=streaming) == list(range(20))


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(BadInput, match="x.jsonl: cannot be read .Permission denied"):
        read_records(path, "train")


class Rows(list):
    """A hub dataset that counts what is read of it; streamed, it has neither a length nor places."""

    def __init__(self, streaming):
        super().__init__({"sentence": str(i), "label": 0} for i in range(20))
        self.streaming, self.read = streaming, []

    def __len__(self):
        assert not self.streaming
        return super().__len__()

    def __getitem__(self, index):
        assert not self.streaming
        self.read.append(index)
        return super().__getitem__(index)

    def __iter__(self):
        for index, row in enumerate(super().__iter__()):
            self.read.append(index)
            yield row


@pytest.fixture
def hub(monkeypatch):
    made = []

    class Datasets:
        @staticmethod
        def load_dataset(path, config, split, streaming=False):
            if split == "none":
                raise ConnectionResetError("reset\nby peer")
            made.append(Rows(streaming))
            return made[-1]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    return made


@pytest.mark.parametrize(
    "split, streaming, expected",
    [("train", False, SUBSET), ("train", True, [0, 1, 2, 3, 4]), ("validation", False, [0, 1, 2, 3, 4]), ("validation", True, [0, 1, 2, 3, 4])],
)
def test_of_the_hub_only_what_is_needed_is_read(hub, split, streaming, expected):
    assert numbers("owner/name", split, 5, streaming=streaming) == expected
    assert hub[0].read == expected


def test_what_the_hub_raises_is_one_line(hub):
    with pytest.raises(BadInput, match=r"owner/name: the hub's split none cannot be read \(reset by peer\)"):
        numbers("owner/name", "none", 5)
