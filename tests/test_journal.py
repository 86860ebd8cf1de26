"""The journal on disk: round trips bit for bit, and every way in which a file can be cut or flipped."""

import json
import os
import struct
import warnings
import zlib

import numpy as np
import pytest

from qzo.errors import BadInput, RunFailed
from qzo.journal import FLAG_CLIPPED, FLAG_SKIPPED, Journal, Record, read_journal

HEADER = {"directions": 2, "count": 4, "seed": 7, "model": "kleine Größe"}
SIZE = 4 + 2 + 2 + 4 + 2 * 4 + 4 * 4 + 4


def make_record(step, rng, flags=0):
    projected, coefs = rng.standard_normal(2).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    return Record(step, flags, np.float32(rng.standard_normal()), projected, coefs)


def bits(record):
    parts = (record.loss, record.projected, record.coefs)
    return record.step, record.flags, *(np.asarray(part, "<f4").tobytes() for part in parts)


def write(path, count, header=HEADER):
    rng = np.random.default_rng(0)
    records = [make_record(step, rng, step % 3) for step in range(count)]
    with Journal.create(path, header) as journal:
        for record in records:
            journal.append(record)
    return [bits(record) for record in records]


def with_header(text, version=1):
    data = struct.pack("<8sII", b"\x89QZO\r\n\x1a\n", version, len(text)) + text
    return data + struct.pack("<I", zlib.crc32(data))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_round_trip(tmp_path, count):
    written = write(tmp_path / "runs" / "journal.bin", count)
    header, records = read_journal(tmp_path / "runs" / "journal.bin")
    assert header == HEADER
    assert [bits(record) for record in records] == written
    assert os.listdir(tmp_path / "runs") == ["journal.bin"]


def test_layout_is_the_documented_one(tmp_path):
    """Read with struct alone: the format is frozen."""
    path = tmp_path / "journal.bin"
    with Journal.create(path, {"directions": 1, "count": 1}) as journal:
        journal.append(Record(0, FLAG_CLIPPED, np.float32(1.5), np.float32([-2]), np.float32([0.25])))
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"\x89QZO\r\n\x1a\n", 1)
    assert json.loads(data[16 : 16 + length]) == {"directions": 1, "count": 1}
    assert struct.unpack_from("<I", data, 16 + length)[0] == zlib.crc32(data[: 16 + length])
    record = data[20 + length :]
    assert struct.unpack("<IHHfffI", record) == (0, 2, 1, 1.5, -2.0, 0.25, zlib.crc32(record[:-4]))


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0x80000000])
def test_strange_losses_keep_their_bits(tmp_path, pattern):
    value = np.array([pattern], "<u4").view("<f4")
    with Journal.create(tmp_path / "j", HEADER) as journal:
        journal.append(Record(0, FLAG_SKIPPED, value[0], np.repeat(value, 2), np.zeros(4, np.float32)))
        in_memory = journal.records[0]
    for record in (in_memory, read_journal(tmp_path / "j")[1][0]):
        assert record.flags == FLAG_SKIPPED
        assert np.asarray(record.loss).view("<u4") == pattern
        assert (record.projected.view("<u4") == pattern).all()


def test_append_after_open_goes_on(tmp_path):
    written = write(tmp_path / "j", 3)
    extra = make_record(3, np.random.default_rng(5))
    with Journal.open(tmp_path / "j") as journal:
        assert journal.header == HEADER and len(journal.records) == 3
        journal.append(extra)
        assert len(journal.records) == 4
    assert [bits(record) for record in read_journal(tmp_path / "j")[1]] == [*written, bits(extra)]


def test_every_append_is_in_the_file_at_once(tmp_path):
    rng = np.random.default_rng(0)
    with Journal.create(tmp_path / "j", HEADER) as journal:
        for step in range(3):
            journal.append(make_record(step, rng))
            assert len(read_journal(tmp_path / "j")[1]) == step + 1


def test_records_do_not_alias_the_caller(tmp_path):
    record = make_record(0, np.random.default_rng(0))
    with Journal.create(tmp_path / "j", HEADER) as journal:
        before = bits(record)
        journal.append(record)
        record.coefs[:] = 0
        assert bits(journal.records[0]) == before


def test_cut_at_every_byte(tmp_path):
    """Any prefix of a journal opens to its whole records, or is refused; the reader leaves the file as it is."""
    whole = tmp_path / "whole"
    written = write(whole, 3)
    data = whole.read_bytes()
    start = len(data) - 3 * SIZE
    path = tmp_path / "cut"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        if length < start:
            for read in (read_journal, Journal.open):
                with pytest.raises(RunFailed, match="not a journal|header is damaged"):
                    read(path)
            assert path.stat().st_size == length
            continue
        kept, torn = divmod(length - start, SIZE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [bits(record) for record in read_journal(path)[1]] == written[:kept]
            assert path.stat().st_size == length
            Journal.open(path).close()
        assert path.stat().st_size == start + kept * SIZE
        assert [f"step {kept}" in str(warning.message) for warning in caught] == [True, True] * bool(torn)


def test_open_goes_on_after_a_torn_record(tmp_path):
    written = write(tmp_path / "j", 3)
    os.truncate(tmp_path / "j", (tmp_path / "j").stat().st_size - 5)
    extra = make_record(2, np.random.default_rng(9))
    with pytest.warns(UserWarning, match="torn"), Journal.open(tmp_path / "j") as journal:
        journal.append(extra)
    assert [bits(record) for record in read_journal(tmp_path / "j")[1]] == [*written[:2], bits(extra)]


def test_a_flipped_bit_never_passes(tmp_path):
    """One bit in every byte: the header and the middle are refused, the last record is dropped."""
    path = tmp_path / "j"
    written = write(path, 3)
    data = path.read_bytes()
    start = len(data) - 3 * SIZE
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        record = (i - start) // SIZE
        if record == 2:
            with pytest.warns(UserWarning, match=r"step 2\) is torn"):
                assert [bits(r) for r in read_journal(path)[1]] == written[:2]
        else:
            text = "journal|header is damaged" if i < start else f"record {record} is damaged"
            with pytest.raises(RunFailed, match=text):
                read_journal(path)
            with pytest.raises(RunFailed, match=text):
                Journal.open(path)
            assert path.stat().st_size == len(data)


def test_damage_before_a_torn_record_is_in_the_middle(tmp_path):
    path = tmp_path / "j"
    write(path, 3)
    data = path.read_bytes()
    path.write_bytes(data[: -SIZE - 9] + b"\xaa" + data[-SIZE - 8 : -5])
    for read in (read_journal, Journal.open):
        with pytest.raises(RunFailed, match="record 1 is damaged"):
            read(path)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a journal"),
        (b"PK\3\4" + bytes(100), "not a journal"),
        (with_header(b'{"directions": 1, "count": 1}', version=2), "journal version 2; expected version 1 or older"),
        (with_header(b'{"directions": 1, "count": 1}', version=0xFFFFFFFF)[:20], "journal version 4294967295"),
        (with_header(b"[1]"), "header is damaged"),
        (with_header(b"{"), "header is damaged"),
        (with_header(b"\xff"), "header is damaged"),
        (with_header(b"[" * 100_000), "header is damaged"),
        (with_header(b'{"directions": 0, "count": 1}'), "header is damaged"),
        (with_header(b'{"directions": true, "count": 1}'), "header is damaged"),
    ],
    ids=["empty", "zip", "newer", "newer-cut", "list", "no-json", "no-utf8", "deep", "no-directions", "bool"],
)
def test_refuses(tmp_path, data, text):
    path = tmp_path / "j"
    path.write_bytes(data)
    for read in (read_journal, Journal.open):
        with pytest.raises(RunFailed, match=text) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == data


def test_refuses_steps_out_of_order(tmp_path):
    path = tmp_path / "j"
    write(path, 3)
    data = path.read_bytes()
    path.write_bytes(data[: -2 * SIZE] + data[-SIZE:])
    for read in (read_journal, Journal.open):
        with pytest.raises(RunFailed, match="record 1 holds step 2"):
            read(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"step": 1}, "step: given 1, expected 0"),
        ({"projected": np.zeros(3, np.float32)}, "projected"),
        ({"projected": np.zeros(2, np.float64)}, "projected: given float64"),
        ({"coefs": np.zeros((2, 2), np.float32)}, "coefs"),
    ],
)
def test_append_refuses_other_records(tmp_path, changes, text):
    record = vars(make_record(0, np.random.default_rng(0))) | changes
    with Journal.create(tmp_path / "j", HEADER) as journal, pytest.raises(ValueError, match=text):
        journal.append(Record(**record))
    assert read_journal(tmp_path / "j")[1] == []


@pytest.mark.parametrize("header", [{}, {"directions": 1, "count": 0}, {**HEADER, "floor": float("-inf")}])
def test_create_refuses_a_header(tmp_path, header):
    with pytest.raises(ValueError):
        Journal.create(tmp_path / "j", header)
    assert os.listdir(tmp_path) == []


def test_create_keeps_an_existing_run(tmp_path):
    write(tmp_path / "j", 2)
    data = (tmp_path / "j").read_bytes()
    with pytest.raises(BadInput, match="output_dir"):
        Journal.create(tmp_path / "j", HEADER)
    assert (tmp_path / "j").read_bytes() == data and os.listdir(tmp_path) == ["j"]


def test_missing_file(tmp_path):
    for read in (read_journal, Journal.open):
        with pytest.raises(BadInput, match="no such file"):
            read(tmp_path / "none")


def test_a_folder_is_no_journal(tmp_path):
    for read in (read_journal, Journal.open):
        with pytest.raises(RunFailed, match="Is a directory"):
            read(tmp_path)


def test_one_writer_at_a_time(tmp_path):
    with Journal.create(tmp_path / "j", HEADER):
        with pytest.raises(RunFailed, match="another process"):
            Journal.open(tmp_path / "j")
        assert read_journal(tmp_path / "j")[0] == HEADER
    Journal.open(tmp_path / "j").close()


def test_synced_at_most_a_second_later(tmp_path, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr("qzo.journal.monotonic", lambda: now[0])
    journal = Journal.create(tmp_path / "j", HEADER)
    monkeypatch.setattr("qzo.journal.os.fsync", lambda _: synced.append(now[0]))
    rng = np.random.default_rng(0)
    for step in range(12):
        now[0] += 0.25
        journal.append(make_record(step, rng))
    assert synced == [101.0, 102.0, 103.0]
    journal.sync()
    assert len(synced) == 4
    journal.close()
    journal.close()
    assert len(synced) == 5
