"""The one search that goes backwards, on a CUDA device: its sums have one order, so that a quantization that was stopped ends in the same bytes."""

import pytest

from qzo.quantize import quantize_model, reconstruct

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("bits", "activations", "helps"), [(2, 16, True), (4, 4, False)])
def test_the_same_bytes_again(tmp_path, monkeypatch, bits, activations, helps):
    search, reached = reconstruct.reconstruct, []

    def noted(layer, hidden, wanted, kwargs, device, *rest):
        x = hidden[0][:1].to(device)
        expected = reconstruct.run_layer(layer, x, kwargs)
        assert float((reconstruct.Straight(layer)(x, kwargs) - expected).norm() / expected.norm()) < 0.05
        reached.append(search(layer, hidden, wanted, kwargs, device, *rest))
        return reached[-1]

    monkeypatch.setattr("qzo.quantize.initialize.reconstruct", noted)
    monkeypatch.setattr(reconstruct, "LR_LOGITS", 3e-2)  # there are few windows
    (tmp_path / "texts.txt").write_text(" ".join(f"word{i} of {i % 7}" for i in range(2000)))
    for name in ("a", "b"):
        quantize_model("builtin:tiny-llama", tmp_path / name, "zeroqat", bits=bits, activations=activations, calibration=str(tmp_path / "texts.txt"),
                       samples=8, max_length=64, device="cuda", reconstruct=4)  # fmt: skip
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not helps or any(kept and after < start for start, after, kept in reached)
