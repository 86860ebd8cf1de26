"""Snapshots: round trips, damage, interruption at any point, and a full disk."""

import hashlib
import json
import operator
import os
import resource
import shutil
import signal
import struct
import warnings

import pytest
import torch

from qzo import checkpoint
from qzo.checkpoint import newest_snapshot, state_hash, write_snapshot
from qzo.errors import RunFailed


def make_tensors(value=0.0):
    generator = torch.Generator().manual_seed(int(value))
    return {
        "a/scales": torch.randn(5, 3, generator=generator) + value,
        "b/scales": torch.randn(4, 6, generator=generator).t(),
        "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "scalar": torch.tensor(value, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }


def names(run):
    return sorted(os.listdir(run / "snapshots"))


def same(a, b):
    return state_hash(a) == state_hash(b)


def test_round_trip(tmp_path):
    tensors, meta = make_tensors(1.5), {"directions": 2, "text": "Größe", "by_step": {2: [1, None], 10: 0.1}}
    path = write_snapshot(tmp_path, 200, tensors, meta)
    assert path == tmp_path / "snapshots" / "step-000200"
    step, read, read_meta = newest_snapshot(tmp_path)
    assert step == 200 and read_meta == json.loads(json.dumps(meta))
    assert read.keys() == tensors.keys() and same(read, tensors)
    assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_manifest(tmp_path):
    path = write_snapshot(tmp_path, 7, make_tensors(), {"x": 1})
    manifest = json.loads((path / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("step", "tensors", "meta")} == {"step": 7, "tensors": 5, "meta": {"x": 1}}
    assert len(manifest["sha256"]) == 64
    assert sorted(os.listdir(path)) == ["manifest.json", "state.safetensors"]


def test_none_yet(tmp_path):
    assert newest_snapshot(tmp_path) is None


@pytest.mark.parametrize(("keep", "left"), [(1, [300]), (2, [200, 300]), (5, [0, 100, 200, 300])])
def test_keeps_the_newest(tmp_path, keep, left):
    for step in (0, 100, 200, 300):
        write_snapshot(tmp_path, step, make_tensors(step), {}, keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_order_is_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        write_snapshot(tmp_path, step, make_tensors(), {})
    assert newest_snapshot(tmp_path)[0] == 1_000_000


def test_at_most(tmp_path):
    for step in (100, 200):
        write_snapshot(tmp_path, step, make_tensors(step), {})
    assert [newest_snapshot(tmp_path, limit)[0] for limit in (100, 199, 200, None)] == [100, 100, 200, 200]
    assert newest_snapshot(tmp_path, 99) is None
    assert names(tmp_path) == ["step-000100", "step-000200"]


def test_the_same_step_again_and_later_ones_go(tmp_path):
    for step, value in ((100, 0), (200, 0), (100, 1)):
        write_snapshot(tmp_path, step, make_tensors(value), {})
    assert names(tmp_path) == ["step-000100"]
    assert same(newest_snapshot(tmp_path)[1], make_tensors(1))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 4
    path.write_bytes(data)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "state.safetensors", -1),
        lambda path: flip(path / "state.safetensors", 0),
        lambda path: os.truncate(path / "state.safetensors", 50),
        lambda path: (path / "state.safetensors").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: os.truncate(path / "manifest.json", 20),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_bytes(b"\xff"),
        lambda path: (path / "manifest.json").write_text("[" * 100_000),
        lambda path: replace(path / "manifest.json", '"note": 12', '"note": 13'),
        lambda path: path.rename(path.with_name("step-000250")),
        lambda path: (shutil.rmtree(path), path.write_text("a file")),
    ],
    ids=["tail", "head", "cut", "no-state", "no-manifest", "cut-manifest", "list", "no-utf8", "deep", "meta", "renamed",
         "file"],
)  # fmt: skip
def test_a_damaged_snapshot_is_passed_over(tmp_path, damage):
    for step in (100, 200):
        write_snapshot(tmp_path, step, make_tensors(step), {"note": 12})
    damage(tmp_path / "snapshots" / "step-000200")
    with pytest.warns(UserWarning, match="step-0002[05]0: damaged"):
        step, tensors, _ = newest_snapshot(tmp_path)
    assert step == 100 and same(tensors, make_tensors(100))


@pytest.mark.parametrize("call", ["save_file", "os.rename", "fsync_path"])
@pytest.mark.parametrize("after", range(5))
def test_interrupted_anywhere(tmp_path, monkeypatch, call, after):
    """A write that stops at any of its calls leaves a valid snapshot: the old one or the new one."""
    write_snapshot(tmp_path, 100, make_tensors(100), {})
    original = operator.attrgetter(call)(checkpoint)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(f"qzo.checkpoint.{call}", interrupted)
        try:
            write_snapshot(tmp_path, 200, make_tensors(200), {}, keep=1)
            stopped = False
        except KeyboardInterrupt:
            stopped = True
    assert stopped == (len(calls) > after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, tensors, _ = newest_snapshot(tmp_path)
    assert step == 200 if not stopped else step in (100, 200)
    assert same(tensors, make_tensors(step))
    write_snapshot(tmp_path, 300, make_tensors(300), {}, keep=1)
    assert names(tmp_path) == ["step-000300"]


def test_an_interrupted_removal_leaves_no_half_snapshot(tmp_path, monkeypatch):
    write_snapshot(tmp_path, 100, make_tensors(), {})

    def interrupted(path, **_):
        (path / "manifest.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, 200, make_tensors(), {}, keep=1)
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step-000200"]


def test_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(checkpoint, "fsync_path", lambda path: calls.append(("fsync", path.name)))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: calls.append(("rename", b.name)))
    write_snapshot(tmp_path, 100, make_tensors(), {})
    inside = [("fsync", name) for name in ("state.safetensors", "manifest.json", ".tmp-step-000100")]
    assert calls == [*inside, ("rename", "step-000100"), ("fsync", "snapshots")]


def test_only_the_writer_removes_temporary_folders(tmp_path):
    stale = tmp_path / "snapshots" / ".tmp-step-000200"
    write_snapshot(tmp_path, 100, make_tensors(), {})
    stale.mkdir()
    (stale / "state.safetensors").write_bytes(b"half")
    assert newest_snapshot(tmp_path)[0] == 100
    assert names(tmp_path) == [".tmp-step-000200", "step-000100"]
    write_snapshot(tmp_path, 150, make_tensors(), {})
    assert names(tmp_path) == ["step-000100", "step-000150"]


@pytest.mark.parametrize("limit", [0, 50, 4096])
def test_full_disk(tmp_path, limit):
    tensors = {"a": torch.ones(3000)}
    write_snapshot(tmp_path, 100, tensors, {})
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(RunFailed, match="step-000200: cannot be .*File too large.* Free some space"):
            write_snapshot(tmp_path, 200, tensors, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-000100"]
    assert newest_snapshot(tmp_path)[0] == 100


def test_full_disk_at_the_manifest(tmp_path, monkeypatch):
    write_snapshot(tmp_path, 100, make_tensors(), {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(RunFailed, match="No space left.*Free some space"):
        write_snapshot(tmp_path, 200, make_tensors(), {})
    assert names(tmp_path) == ["step-000100"]


def test_state_hash_is_frozen_and_sees_every_bit():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]], dtype=torch.int32)}
    told = b'["a", "torch.int32", [1, 1]]\n' + struct.pack("<i", 3) + b'["b", "torch.float32", [2]]\n'
    assert state_hash(tensors) == hashlib.sha256(told + struct.pack("<2f", 1, 2)).hexdigest()
    assert state_hash(dict(reversed(tensors.items()))) == state_hash(tensors)
    others = [
        {**tensors, "b": torch.tensor([1.0, 2.0000002])},
        {**tensors, "b": torch.tensor([[1.0, 2.0]])},
        {**tensors, "b": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"c": tensors["b"], "a": tensors["a"]},
        {"b": tensors["b"]},
    ]
    assert len({state_hash(other) for other in [tensors, *others]}) == 6


def test_state_hash_does_not_see_the_layout():
    square = torch.arange(12.0).reshape(3, 4)
    assert same({"a": square.t()}, {"a": square.t().contiguous()})
    assert not same({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})
