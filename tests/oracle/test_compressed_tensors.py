"""compressed-tensors itself as writer, and transformers' loading of its folders as reader, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from round_trip import exports_hf, logits, our_logits, tensors_of, tune_and_export, untouched
from safetensors.torch import load_file
from tiny_runs import make_model
from transformers import AutoConfig, AutoModelForCausalLM
from wheels import install, libraries

from qzo.model.load import load_model

# bits, strategy, group size, symmetric, dtype of the model and its scales
CASES = {
    "4 groups sym": (4, "group", 32, True, torch.float16),
    "4 groups asym": (4, "group", 16, False, torch.bfloat16),
    "4 channel asym": (4, "channel", None, False, torch.float16),
    "8 groups asym": (8, "group", 32, False, torch.float16),
    "8 channel sym": (8, "channel", None, True, torch.bfloat16),
}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(scope="module", autouse=True)
def library(pytestconfig, tmp_path_factory):
    with libraries.compressed_tensors(install(pytestconfig, tmp_path_factory, "compressed-tensors-0.20.0")):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> a folder as compressed-tensors saves it."""
    base, folders = make_model(tmp_path_factory.mktemp("ct16") / "model", intermediate_size=96), {}

    def make(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("ct") / "model"
            libraries.write_compressed(base, folders[case], *CASES[case])
        return folders[case]

    return make


def their_logits(folder, dtype, dequantize=True):
    """Through transformers and compressed-tensors; dequantize: weights are unpacked as they are read."""
    from transformers import CompressedTensorsConfig

    # Without it, transformers 5.23 takes no packed zero points.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval())


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_library_writes(case, made):
    folder, (bits, strategy, size, sym, dtype) = made(case), CASES[case]
    ours = our_logits(folder, NAMES[dtype])
    assert torch.equal(ours, their_logits(folder, dtype))
    loaded = load_model(str(folder), "cpu", "fp32")
    assert len(loaded.layers) == 7 and loaded.config.group_size == (size or -1)
    assert all((layer.zeros is None) == sym and layer.bits == bits for layer in loaded.layers.values())
    if sym:
        assert torch.equal(logits(loaded.model), their_logits(folder, torch.float32, dequantize=False))


@pytest.mark.parametrize("case", CASES)
def test_the_library_reads_what_export_writes(case, made, sentiment, tmp_path, capsys):
    base, dtype = made(case), CASES[case][-1]
    out = tune_and_export(base, sentiment, tmp_path, capsys)
    theirs = their_logits(out, dtype)
    assert torch.equal(our_logits(out, NAMES[dtype]), theirs)
    assert not torch.equal(our_logits(base, NAMES[dtype]), theirs)
    untouched(base, tmp_path)
    exports_hf(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, cols", [(40, 100), (33, 64)])
def test_unpacks_the_library_s_words(rows, cols, bits):
    """Sizes that fill no word: the library's packing along both axes, its offset, against ours."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from qzo_kernels.pack import unpack_codes

    torch.manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, cols), dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_to_int32(codes, bits), bits, cols).int() - half, codes.int())
    zeros = pack_to_int32(codes, bits, packed_dim=0)
    assert torch.equal(unpack_codes(zeros.t().contiguous(), bits, rows).t().int() - half, codes.int())


def test_what_is_left_out_stays_dense(made):
    assert "lm_head.weight" in tensors_of(made("4 groups sym"))


@pytest.fixture(scope="module")
def older(pytestconfig, tmp_path_factory):
    """older(verb, *paths) runs reordered.py."""
    folder = install(pytestconfig, tmp_path_factory, "compressed-tensors-0.9.4")

    def run(*arguments):
        command = [sys.executable, str(Path(__file__).with_name("reordered.py")), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)})
        assert done.returncode == 0, done.stderr

    return run


def test_activation_order(older, sentiment, tmp_path, capsys):
    """weight_g_idx, which the library wrote until 2026: the older one packs the base and unpacks the export."""
    base = make_model(tmp_path / "model", intermediate_size=96)
    plain = AutoConfig.from_pretrained(base)
    older("compress", base)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": "group"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**document, "quantization_config": how}))
    out = tune_and_export(base, sentiment, tmp_path, capsys)
    for folder in (base, out):
        older("decompress", folder, tmp_path / "unpacked.safetensors")
        unpacked, loaded = load_file(tmp_path / "unpacked.safetensors"), load_model(str(folder), "cpu", "fp16")
        assert len(loaded.layers) == 7
        for name, layer in loaded.layers.items():
            assert layer.perm is not None and torch.equal(layer.weight(torch.float16), unpacked[f"{name}.weight"])
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.float16).eval()
        model.load_state_dict(unpacked)
        # Columns in another order are summed in another order.
        torch.testing.assert_close(our_logits(folder, "fp16"), logits(model), rtol=0, atol=0.03)
    exports_hf(tmp_path)
