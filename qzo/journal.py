"""The journal of a run, version 1: a header, then one small record per step; append-only.

File, little-endian: magic 8 bytes, version u32, length u32 and bytes of the header (JSON, UTF-8), crc32 u32 of all
before it; then records of one size: step u32, flags u16, count u16, loss f32, directions x f32 projected gradients,
count x f32 applied coefficients, crc32 u32 of the record. `directions` and `count` stand in the header.
"""

import fcntl
import json
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self

import numpy as np

from qzo.disk import disk_error, fsync_path
from qzo.errors import BadInput, QzoError, RunFailed

FLAG_SKIPPED = 1
FLAG_CLIPPED = 2

_MAGIC = b"\x89QZO\r\n\x1a\n"  # as in PNG: a copy made in text mode, or to 7 bits, does not pass for the file
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
_SYNC_EVERY = 1.0  # seconds


@dataclass(frozen=True, eq=False)
class Record:
    """One step: mean loss (may be NaN), raw projected gradients f32 [directions], applied coefficients f32 [count]."""

    step: int
    flags: int
    loss: np.float32
    projected: np.ndarray
    coefs: np.ndarray


class Journal:
    """A journal open for appending. Only one process holds it at a time."""

    def __init__(self, path: Path, file: Any, data: bytes):
        self.path = path
        self.header, start = _decode_header(path, data)
        self.records, self._end = _decode_records(path, data, self.header, start)
        self._file, self._synced = file, monotonic()
        self._type = _record_type(self.header)

    @classmethod
    def create(cls, path: str | Path, header: dict[str, Any]) -> Self:
        """A new journal; the file appears at `path` whole or not at all.

        `header` is JSON without NaN or infinity and holds `directions` and `count`, both at least 1 (ValueError).
        Raises BadInput where the file exists, RunFailed where it cannot be written.
        """
        path, data = Path(path), _encode_header(header)
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _open_locked(temporary, path, os.O_CREAT)
            if path.exists():
                temporary.unlink()
                raise BadInput(str(path), "exists", "a new file", "Resume that run, or choose another output_dir.")
            os.ftruncate(file.fileno(), 0)
            _write_at(file.fileno(), data, 0)
            os.fsync(file.fileno())
            os.rename(temporary, path)
            fsync_path(path.parent)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise disk_error(path, error) from error
        return cls(path, file, data)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing journal, to go on with. A torn last record is cut off the file, with a warning.

        Raises BadInput where there is no file, RunFailed for a file that is damaged, newer, or held by another process.
        """
        path = Path(path)
        try:
            file = _open_locked(path, path)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            journal = cls(path, file, file.read())
            os.ftruncate(file.fileno(), journal._end)
        except RunFailed:
            file.close()
            raise
        except OSError as error:
            file.close()
            raise disk_error(path, error) from error
        return journal

    def append(self, record: Record) -> None:
        """Write the next record through to the system; it is on disk at most a second, or a `sync`, later.

        Raises ValueError for another step, dtype or shape than the next record has; RunFailed where the disk is full,
        with the file cut back to its last whole record.
        """
        if record.step != len(self.records):
            raise ValueError(f"step: given {record.step}, expected {len(self.records)}")
        row = _encode_record(record, self.header)
        try:
            _write_at(self._file.fileno(), row, self._end)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            raise disk_error(self.path, error) from error
        self._end += len(row)
        self.records.append(_record(np.frombuffer(row, self._type)[0]))
        if monotonic() - self._synced >= _SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """All records so far are on disk when this returns; RunFailed where they cannot be."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._synced = monotonic()

    def close(self) -> None:
        """Sync, and let go of the file. A second call does nothing."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and whole records of a journal, which is left as it is; errors as those of `Journal.open`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    header, start = _decode_header(path, data)
    return header, _decode_records(path, data, header, start)[0]


def _unreadable(path: Path, error: OSError) -> QzoError:
    if isinstance(error, FileNotFoundError):
        return BadInput(str(path), "no such file", "the journal of a run", "Check the path.")
    return disk_error(path, error)


def _open_locked(path: Path, shown: Path, flags: int = 0) -> Any:
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666), "r+b", buffering=0)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        do = "Wait for it to end, or choose another output_dir."
        raise RunFailed(str(shown), "another process is writing this journal", do=do) from error
    except OSError:
        pass  # a file system without locks
    return file


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _encode_header(header: Mapping[str, Any]) -> bytes:
    _sizes(header)
    text = json.dumps(header, allow_nan=False, ensure_ascii=False).encode("utf-8")
    data = _PREFIX.pack(_MAGIC, _VERSION, len(text)) + text
    return data + _CRC.pack(zlib.crc32(data))


def _decode_header(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    damaged = RunFailed(str(path), "the header is damaged", do="Restore the file from a copy.")
    if not data.startswith(_MAGIC[: len(data)]) or not data:
        raise RunFailed(str(path), "not a journal", "a file that qzo tune wrote", "Check the path.")
    if len(data) < _PREFIX.size:
        raise damaged
    _, version, length = _PREFIX.unpack_from(data)
    if version > _VERSION:
        do = "Use the version of qzo that wrote it, or a newer one."
        raise RunFailed(str(path), f"journal version {version}", f"version {_VERSION} or older", do)
    end = _PREFIX.size + length
    if len(data) < end + _CRC.size or _CRC.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        raise damaged
    try:
        header = json.loads(data[_PREFIX.size : end])
        _sizes(header)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    return header, end + _CRC.size


def _sizes(header: Any) -> tuple[int, int]:
    if not isinstance(header, Mapping):
        raise ValueError(f"header: given a {type(header).__name__}, expected a mapping")
    for key in ("directions", "count"):
        if type(header.get(key)) is not int or not 1 <= header[key] <= 65535:
            raise ValueError(f"header: {key} given {header.get(key)!r}, expected a whole number, 1 .. 65535")
    return header["directions"], header["count"]


def _record_type(header: Mapping[str, Any]) -> np.dtype:
    directions, count = _sizes(header)
    vectors = [("projected", "<f4", (directions,)), ("coefs", "<f4", (count,))]
    return np.dtype([("step", "<u4"), ("flags", "<u2"), ("count", "<u2"), ("loss", "<f4"), *vectors, ("crc", "<u4")])


def _encode_record(record: Record, header: Mapping[str, Any]) -> bytes:
    for key, size in zip(("projected", "coefs"), _sizes(header), strict=True):
        vector = getattr(record, key)
        if vector.dtype != np.float32 or vector.shape != (size,):
            raise ValueError(f"{key}: given {vector.dtype} {vector.shape}, expected float32 ({size},)")
    body = struct.pack("<IHH", record.step, record.flags, len(record.coefs))
    body += b"".join(np.asarray(part, "<f4").tobytes() for part in (record.loss, record.projected, record.coefs))
    return body + _CRC.pack(zlib.crc32(body))


def _record(row: np.void) -> Record:
    return Record(int(row["step"]), int(row["flags"]), row["loss"], row["projected"], row["coefs"])


def _decode_records(path: Path, data: bytes, header: dict[str, Any], start: int) -> tuple[list[Record], int]:
    """Whole records, and the offset where they end: before a torn last one."""
    kind = _record_type(header)
    size = kind.itemsize
    whole, torn = divmod(len(data) - start, size)
    for i, row in enumerate(np.frombuffer(data, kind, whole, start)):
        offset = start + i * size
        if zlib.crc32(data[offset : offset + size - _CRC.size]) != row["crc"]:
            if i == whole - 1 and not torn:
                whole, torn = i, size
                break
            raise RunFailed(str(path), f"record {i} is damaged", do="Restore the file from a copy.")
        if row["step"] != i or row["count"] != header["count"]:
            given = f"record {i} holds step {row['step']} and {row['count']} coefficients"
            raise RunFailed(str(path), given, f"step {i} and {header['count']}", "Restore the file from a copy.")
    if torn:
        warnings.warn(f"{path}: the last record (step {whole}) is torn and was dropped", stacklevel=4)
    return [_record(row) for row in np.frombuffer(data, kind, whole, start)], start + whole * size
