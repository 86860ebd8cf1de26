"""scripts/profile_bus: what it makes of a profile."""

import pytest
from tiny_scripts import script


def event(kind, name, begin, took, **args):
    return {"cat": kind, "name": name, "ts": begin, "dur": took, "args": args}


def test_copies_and_kernels_of_two_steps():
    events = [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0.0, 4000.0, bytes=6_000_000_000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 9000.0, 1000.0, bytes=2_000_000_000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 3000.0, 2000.0, bytes=1_000_000_000),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0.0, 9000.0, bytes=7),
        event("kernel", "matmul", 1000.0, 1000.0),
        event("kernel", "matmul", 1500.0, 1500.0),
        event("kernel", "update", 4000.0, 2000.0),
        event("cuda_runtime", "cudaMemcpyAsync", 0.0, 1.0),
        {"name": "process_name"},
    ]
    found = script("profile_bus").summed(events, 2)
    assert found == pytest.approx(
        {"gb_to_device": 4.0, "gb_to_host": 0.5, "ms_to_device": 2.5, "ms_to_host": 1.0, "ms_copies": 3.0, "ms_kernels": 2.0, "ms_both": 1.5}
    )


def test_it_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["profile_bus", "zeroqat-lite-w2a16", "model=x", "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        script("profile_bus").main()
    assert not list(tmp_path.iterdir())
