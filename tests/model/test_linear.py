"""The buffer that all quantized layers of a model share; what a layer of levels does not compute."""

import pytest
import torch
from qzo_kernels.ops_noisy import CodeNoise
from tiny_formats import make_4bit

from qzo.errors import BadInput
from qzo.model.linear import Scratch
from qzo.model.load import load_model


def test_scratch_is_made_once_for_the_largest_layer():
    scratch = Scratch()
    for elements in (10, 400, 30):
        scratch.reserve(elements)
    assert scratch._buffer is None
    first = scratch.like(torch.zeros(1, dtype=torch.float16))
    assert first.numel() == 800 and first.dtype == torch.uint8
    assert scratch.like(torch.zeros(1, dtype=torch.bfloat16)) is first
    assert scratch.like(torch.zeros(1)).numel() == 1600
    assert scratch.like(torch.zeros(1, dtype=torch.float16)).numel() == 1600


def test_a_model_has_one_scratch_that_stays(llama4):
    loaded = load_model(str(llama4), "cpu", "fp32")
    layers = list(loaded.layers.values())
    assert len({id(layer.scratch) for layer in layers}) == 1
    assert len({layer.in_features * layer.out_features for layer in layers}) > 1
    addresses = set()
    for layer in layers:
        layer(torch.ones(1, layer.in_features))
        addresses.add(layer.scratch._buffer.data_ptr())
    assert len(addresses) == 1
    assert layers[0].scratch._buffer.numel() == 4 * max(layer.in_features * layer.out_features for layer in layers)


def test_levels_of_a_table_are_no_grid(llama16, tmp_path):
    folder, _ = make_4bit(llama16, tmp_path / "model")
    layer = load_model(str(folder), "cpu", "fp32").layers["model.layers.0.self_attn.q_proj"]
    layer.noise = CodeNoise(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1), 5, 4)
    with pytest.raises(ValueError, match="q_proj: codes of a codebook with 8-bit activations or noise on codes"):
        layer(torch.ones(1, 64))
    layer.noise, layer.activations = None, "int8"
    with pytest.raises(ValueError, match="q_proj: codes of a codebook"):
        layer(torch.ones(1, 64))
    with pytest.raises(BadInput, match="activations: int8 with NF4, FP4 or AQLM weights"):
        load_model(str(folder), "cpu", "fp32", activations="int8")
