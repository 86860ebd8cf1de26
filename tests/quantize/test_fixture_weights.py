"""Checkpoints written by GPTQModel dequantize to GPTQModel's own weights."""

import pytest
from safetensors.torch import load_file

from qzo.model.load import load_model

FIXTURES = [
    "w2g32-asym-gptq", "w4g32-asym-gptq", "w4g32-asym-gptq_v2", "w4g64-sym-gptq", "w4g64-sym-gptq_v2",
    "w4g64-sym-desc_act-gptq", "w8g64-sym-gptq",
]  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_are_those_of_the_reference(shared, name):
    folder = shared / "models" / "gptq-fixtures"
    loaded = load_model(str(folder / name), "cpu", "fp32")
    reference = load_file(folder / "reference" / f"{name}.safetensors")
    assert len(reference) == 7
    for key, expected in reference.items():
        layer = loaded.layers[key.removesuffix(".weight")]
        difference = (layer.weight(layer.scales.dtype) - expected.float()).abs().max()
        assert float(difference) <= 2**-7 * float(expected.abs().max()), key


def test_every_fixture_is_read(shared):
    found = {p.name for p in (shared / "models" / "gptq-fixtures").iterdir() if (p / "config.json").exists()}
    assert found == set(FIXTURES)
