"""autoawq 0.2.7's own packer and unpacker (scripts/bench_awq.py) as an independent reader and writer of AWQ gemm."""

import pytest
import torch
from round_trip import exports_hf, logits, our_logits, tune_and_export, untouched
from tiny_runs import make_model
from tiny_scripts import script
from wheels import install

from qzo.model.load import load_model

theirs = script("bench_awq")


@pytest.fixture(scope="session")
def awq(pytestconfig, tmp_path_factory):
    """gemm, packing and config modules of autoawq."""
    return theirs.load(install(pytestconfig, tmp_path_factory, "autoawq-0.2.7"))


@pytest.fixture(scope="module")
def made(awq, tmp_path_factory):
    """group size -> a folder as autoawq saves it."""
    base, folders = make_model(tmp_path_factory.mktemp("awq16") / "model", intermediate_size=96), {}

    def make(size):
        if size not in folders:
            folders[size] = theirs.write(awq, base, tmp_path_factory.mktemp("awq") / "model", size)
        return folders[size]

    return make


@pytest.mark.parametrize("size", [16, 32, -1])
def test_reads_what_autoawq_writes(awq, made, size):
    folder = made(size)
    model, loaded = theirs.read(awq, folder), load_model(str(folder), "cpu", "fp16")
    weights = theirs.weights(awq, model)
    assert loaded.layers.keys() == weights.keys() and len(weights) == 7 and loaded.config.version == "awq"
    for name, layer in loaded.layers.items():
        assert layer.zeros is not None and torch.equal(layer.weight(torch.float16), weights[name])
    assert torch.equal(our_logits(folder, "fp16"), logits(theirs.dense(awq, model)))


@pytest.mark.parametrize("size", [32, -1])
def test_autoawq_reads_what_export_writes(awq, made, size, sentiment, tmp_path, capsys):
    base = made(size)
    out = tune_and_export(base, sentiment, tmp_path, capsys)
    read = logits(theirs.dense(awq, theirs.read(awq, out)))
    assert torch.equal(our_logits(out, "fp16"), read)
    assert not torch.equal(our_logits(base, "fp16"), read)
    untouched(base, tmp_path)
    exports_hf(tmp_path)
