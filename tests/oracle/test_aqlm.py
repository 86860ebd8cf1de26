"""AQLM checkpoints against transformers with aqlm itself: what we read, tune and write, it reads the same."""

import json
import sys

import pytest
import torch
from round_trip import exports_hf, logits, our_logits, tune_and_export, untouched
from tiny_formats import make_aqlm
from tiny_runs import write_recipe
from tiny_scripts import script
from transformers.quantizers import auto
from transformers.utils import import_utils
from wheels import install, libraries

from qzo.cli import main
from qzo.errors import BadInput
from qzo.estimate import Shapes, Work, estimate
from qzo.model.load import load_model

KINDS = {"1x16": (1, 16), "2x8": (2, 8)}


@pytest.fixture(scope="session", autouse=True)
def library(pytestconfig, tmp_path_factory):
    folder = install(pytestconfig, tmp_path_factory, "aqlm-1.1.7")
    with libraries.used_by_transformers(folder, "aqlm", auto.AqlmHfQuantizer, auto.AqlmConfig):
        import_utils.is_aqlm_available.cache_clear()
        yield


def their_logits(folder) -> torch.Tensor:
    """aqlm's plain dequantization: its other kernels for a CPU are compiled by numba."""
    from aqlm import inference
    from aqlm.inference_kernels.dequantization import dequantize_gemm
    from transformers import AutoModelForCausalLM

    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(inference, "get_forward_pass_kernel", lambda codebooks, training: dequantize_gemm)
        m.setattr(inference.QuantizedLinear, "prepare_matmul_op", _plainly)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
        assert sum(type(module).__name__ == "QuantizedLinear" for module in model.modules()) > 6
        return logits(model)


def _plainly(self, input: torch.Tensor) -> None:
    """As QuantizedLinear does it, but codes stay in the order of the file."""
    from aqlm import inference

    kernel = inference.get_forward_pass_kernel(self.codebooks, False)
    self.gemv_op = self.gemm_op = inference._get_autograd_matmul_op(kernel, kernel)
    self.use_gemv_rule = lambda input: True


@pytest.fixture(params=KINDS)
def base(request, llama16, tmp_path):
    return make_aqlm(llama16, tmp_path / "base", *KINDS[request.param])


def test_reads_what_the_library_reads(base):
    folder, dense = base
    ours, theirs = our_logits(folder, "fp32"), their_logits(folder)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    loaded = load_model(str(folder), "cpu", "fp32")
    assert len(loaded.layers) == 7 * loaded.model.config.num_hidden_layers and theirs.std() > 0.1
    for name, layer in loaded.layers.items():
        torch.testing.assert_close(layer.weight(torch.float32), dense[f"{name}.weight"], rtol=1e-6, atol=1e-6)


def test_tunes_replays_and_is_written_back(base, sentiment, tmp_path, capsys):
    out = tune_and_export(base[0], sentiment, tmp_path, capsys)
    torch.testing.assert_close(our_logits(out, "fp32"), their_logits(out), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(their_logits(out), their_logits(base[0]), atol=1e-3)
    untouched(base[0], tmp_path)
    exports_hf(tmp_path)


def test_estimate_counts_codes_and_codebooks(base):
    loaded = load_model(str(base[0]), "cpu", "bf16")
    found = estimate(Shapes.of(loaded.folder, loaded.config), Work(1, 8, 1), Work(1, 8, 1), torch.bfloat16, "cpu").phases["load"]
    layers = loaded.layers.values()
    assert found["scales"] == sum(layer.scales.nbytes for layer in layers)
    books, plain = sum(layer.codebook.nbytes for layer in layers), sum(p.nbytes for n, p in loaded.model.named_parameters() if not n.endswith(".scales"))
    assert found["embeddings, norms, head"] == books + plain
    # Rows are counted in blocks of 128 columns.
    assert 0 <= found["codes"] - sum(layer.codes.nbytes for layer in layers) < found["codes"] / 2


@pytest.mark.parametrize("keys,said", [
    ({"nbits_per_codebook": 12}, "nbits_per_codebook 12"), ({"in_group_size": 16}, "in_group_size 16"), ({"out_group_size": 8}, "out_group_size 8"),
    ({"num_codebooks": "1"}, "num_codebooks '1'"), ({"num_codebooks": 4, "nbits_per_codebook": 8}, "num_codebooks 4"),
])  # fmt: skip
def test_other_shapes_of_codes_are_refused(keys, said, llama16, tmp_path):
    folder, _ = make_aqlm(llama16, tmp_path / "base", 2, 8)
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match=f"config.json.*{said}.*1 codebook of 16 bits or 2 of 8"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("keys,said", [
    (["method=quzo"], "method"), (["activations=int8", "method=quzo"], "activations"), (["method=quzo-lora"], None),
])  # fmt: skip
def test_only_scales_and_adapters_move(keys, said, llama16, sentiment, tmp_path, capsys):
    folder, _ = make_aqlm(llama16, tmp_path / "base", 2, 8)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, sentiment, steps=2, eps=0.01, lr=0.001, stacked=True)
    assert main(["tune", recipe, *keys]) == (2 if said else 0)
    assert said is None or f"recipe, {said}" in capsys.readouterr().err


def test_made_by_k_means(llama16, tmp_path, monkeypatch):
    """scripts/make_aqlm: near the 16-bit weights by what two codebooks of 256 can be, and read by aqlm as by us."""
    made = script("make_aqlm")
    monkeypatch.setattr(sys, "argv", ["make_aqlm", str(llama16), "-o", str(tmp_path / "out")])
    made.main()
    torch.testing.assert_close(our_logits(tmp_path / "out", "fp32"), their_logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    dense = dict(load_model(str(llama16), "cpu", "fp32").model.named_parameters())
    for name, layer in load_model(str(tmp_path / "out"), "cpu", "fp32").layers.items():
        weight = dense[f"{name}.weight"]
        assert float((layer.weight(torch.float32) - weight).norm() / weight.norm()) < 0.35, name
