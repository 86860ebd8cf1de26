"""First-order reconstruction: the function it differentiates is the prepared layer, its gradient is right, and what it changes and leaves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qzo.cli import main
from qzo.errors import BadInput, Interrupted, OutOfMemory
from qzo.model.files import Folder
from qzo.model.load import load_model, skeleton
from qzo.model.qat import FakeQuantLinear, Precision, prepare_layer, quantize_operands, refresh_layer
from qzo.model.smoothing import Site
from qzo.quantize import initialize as module
from qzo.quantize import inputs, quantize_model, reconstruct
from qzo.quantize.initialize import Initialization, initialize
from qzo.quantize.inputs import decoder_layers, first_inputs, run_layer
from qzo.quantize.reconstruct import Straight, relative_error

CPU = torch.device("cpu")
SHORT = {"samples": 12, "max_length": 32, "device": "cpu"}
# family, key heads of 4, OPT's norms come first, bits, group_size, activations, smoothing
CASES = [("llama", 4, True, 4, -1, 4, True), ("llama", 2, True, 4, 32, 8, True), ("llama", 2, True, 2, 40, 16, False), ("llama", 4, True, 2, -1, 4, False),
         ("opt", 4, True, 4, -1, 4, True), ("opt", 4, False, 2, 32, 4, True), ("opt", 4, True, 2, 32, 16, False), ("qwen3", 2, True, 4, -1, 4, True)]  # fmt: skip


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", 512)


def windows() -> torch.Tensor:
    return torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(0))


def saved(path: Path, family: str, heads: int, first: bool) -> Path:
    torch.manual_seed(5)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    own = {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": first} if family == "opt" else {
        "intermediate_size": 96, "num_key_value_heads": heads, "head_dim": 16}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **own))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def prepared(path: Path, precision: Precision, smoothing: bool):
    """The first layer with a quantizer away from where it begins, its inputs [24, 32, 64], their arguments, and the outputs of 16 bits."""
    model, folder = load_model(str(path), "cpu", "fp32").model, Folder(path)
    quantize_operands(model)
    network = skeleton(folder)
    quantize_operands(network)
    hidden, kwargs = first_inputs(network, folder, windows(), CPU, torch.float32)
    layer, hidden = decoder_layers(model)[1][0], torch.cat(hidden)
    wanted = run_layer(layer, hidden, kwargs[0])
    prepare_layer(layer, precision, smoothing)
    generator = torch.Generator().manual_seed(1)
    for part in layer.modules():
        if isinstance(part, FakeQuantLinear):
            for bound in (part.low, part.high):
                bound.data.copy_(2 + torch.rand(bound.shape, generator=generator))
            if part.span is not None:
                part.span.data.fill_(0.9)
        elif isinstance(part, Site):
            part.scale.data.copy_(0.5 + torch.rand(part.scale.shape, generator=generator))
            if part.shift is not None:
                part.shift.data.copy_(0.1 * torch.randn(part.shift.shape, generator=generator))
    refresh_layer(layer)
    return layer, hidden, kwargs[0], wanted


@pytest.mark.parametrize(("family", "heads", "first", "bits", "size", "activations", "smoothing"), CASES)
def test_the_function_is_the_layer(tmp_path, family, heads, first, bits, size, activations, smoothing):
    layer, hidden, kwargs, wanted = prepared(saved(tmp_path / "model", family, heads, first), Precision(bits, size, activations), smoothing)
    expected, before = run_layer(layer, hidden, kwargs), {name: value.clone() for name, value in layer.state_dict().items()}
    function = Straight(layer)
    out = function(hidden, kwargs)
    assert not torch.allclose(expected, wanted, rtol=1e-2, atol=0)
    assert torch.equal(out, expected)
    assert torch.equal(run_layer(layer, hidden, kwargs), expected)  # and the layer is itself again
    relative_error(out, wanted).mean().backward()
    leaves = function.logits + function.moves
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool(leaf.grad.any()) for leaf in leaves)
    assert len(function.logits) == (12 if family == "opt" else 14) and len(function.moves) == (9 if smoothing else 0)
    for leaf in leaves:
        leaf.data += 0.02 * leaf.grad.sign()
    function.store()
    moved = function(hidden, kwargs)
    assert torch.equal(moved, run_layer(layer, hidden, kwargs)) and not torch.equal(moved, expected)
    changed = {name.rpartition(".")[2] for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"low", "high"} | ({"scale", "shift"} if smoothing else set())


@pytest.mark.parametrize(("activations", "smoothing"), [(8, True), (16, False)])
def test_gradients_are_those_of_the_function_without_rounding(tmp_path, monkeypatch, activations, smoothing):
    """Only clipping remains, which is smooth but for its corners: finite differences along each leaf's gradient."""
    layer, hidden, kwargs, wanted = prepared(saved(tmp_path / "model", "llama", 2, True), Precision(3, 32, activations), smoothing)
    monkeypatch.setattr(reconstruct, "_straight", lambda x: x)
    function = Straight(layer)

    def lost() -> torch.Tensor:
        return relative_error(function(hidden, kwargs), wanted).double().mean()

    lost().backward()
    # Of q and k nothing is clipped: their s changes nothing.
    leaves = [leaf for leaf in function.logits + function.moves if leaf.grad.abs().max() > 1e-7]
    assert len(leaves) == 14 + (8 if smoothing else 0)
    for leaf in leaves:
        gradient, here, ends = leaf.grad, leaf.detach().clone(), []
        for sign in 1, -1:
            leaf.data = here + sign * 0.001 * gradient / gradient.abs().max()
            ends.append(float(lost().detach()))
        leaf.data = here
        assert ends[0] - ends[1] == pytest.approx(0.002 * float(gradient.square().sum() / gradient.abs().max()), rel=0.02)


def test_rounding_counts_as_identity_backwards():
    x = torch.tensor([-1e4 - 0.5, -2.5, -0.5, -0.3, 0.0, 0.49999997, 0.5, 1.5, 7.4, 3e6 + 0.25], requires_grad=True)
    y = reconstruct._straight(x)
    y.sum().backward()
    assert torch.equal(y, x.detach().round()) and torch.equal(x.grad, torch.ones(10))


def search(path: Path, what: Initialization) -> tuple[list[dict], list[float], list[str]]:
    states, errors, lines = [], [], []
    initialize(skeleton(Folder(path)), Folder(path), windows(), what, CPU, torch.float32,
               lambda _, state, error: (states.append(state), errors.append(error)), lines.append)  # fmt: skip
    return states, errors, lines


@pytest.mark.parametrize(("bits", "size", "activations", "smoothing", "share"), [(4, -1, 4, True, 0.85), (2, 32, 16, False, 0.95)])
def test_it_moves_a_quantizer_to_a_lower_error(tmp_path, bits, size, activations, smoothing, share):
    path, ends = saved(tmp_path / "model", "llama", 2, True), []
    for _ in range(2):
        layer, hidden, kwargs, wanted = prepared(path, Precision(bits, size, activations), smoothing)
        weights = {name: value.clone() for name, value in layer.named_parameters() if name.endswith(".weight")}

        def error() -> float:
            return float(relative_error(run_layer(layer, hidden, kwargs), wanted).mean())

        before, after, kept = reconstruct.reconstruct(layer, [*hidden.split(10)], [*wanted.split(10)], kwargs, CPU, 5, error)
        assert after == error() < share * before and 0 < kept <= 5, (before, after, kept)
        assert len(weights) == 9 and all(torch.equal(layer.get_parameter(name), value) for name, value in weights.items())
        ends.append(layer.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # the same again


def test_it_improves_on_the_search_and_weights_stay(tiny):
    settings = Precision(2, 32, 16), False, True, False
    (_, without, _), (states, found, lines) = (search(tiny("llama"), Initialization(*settings, reconstruct=epochs)) for epochs in (0, 12))
    assert found[0] < 0.98 * without[0], (found, without)  # of the first layer, whose inputs are the same
    assert sum("first-order, " in line and "of 12 epochs kept, error" in line for line in lines) == 2
    stored = load_file(tiny("llama") / "model.safetensors")
    weights = {f"model.layers.{i}.{name}": value for i, state in enumerate(states) for name, value in state.items() if name.endswith(".weight")}
    assert len(weights) == 14 and all(torch.equal(value, stored[name].float()) for name, value in weights.items())
    assert all(bool((value > 0).all()) for state in states for name, value in state.items() if name.endswith(".scale"))


def test_what_does_not_help_is_not_kept(tiny, monkeypatch):
    what = Initialization(Precision(2, 32, 8), True, True)
    expected, errors, _ = search(tiny("opt"), what)
    for rate in (1e3, float("nan")):
        monkeypatch.setattr(reconstruct, "LR_LOGITS", rate)
        monkeypatch.setattr(reconstruct, "LR_SITES", rate)
        states, found, lines = search(tiny("opt"), Initialization(Precision(2, 32, 8), True, True, reconstruct=1))
        assert [line for line in lines if "first-order, 0 of 1 epochs kept" in line] and found == errors
        assert all(torch.equal(a[name], b[name]) for a, b in zip(states, expected, strict=True) for name in a)


def test_latents_move_after_it(tiny):
    _, _, lines = search(tiny("llama"), Initialization(Precision(2, 32, 16), False, True, compensation=True, reconstruct=1))
    kinds = [next(word for word in ("clipping", "kept", "epoch", "compensation", "layer") if word in line) for line in lines]
    assert kinds == 2 * (4 * ["clipping"] + 2 * ["epoch"] + ["kept"] + 4 * ["compensation"] + ["layer"])


def test_an_interrupted_one_goes_on_to_the_same_bytes(tiny, calibration, tmp_path):
    arguments = {"method": "zeroqat", "activations": 4, "calibration": calibration, "reconstruct": 2, **SHORT}
    quantize_model(str(tiny("llama")), tmp_path / "whole", **arguments)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert config["reconstruction"] == 2 and load_model(str(tmp_path / "whole"), "cpu", "fp32").latent.to_dict() == config

    def stop(done: int, total: int, text: str) -> None:
        if done and "first-order" in text:
            raise Interrupted("here", 15, "")

    with pytest.raises(Interrupted):
        quantize_model(str(tiny("llama")), tmp_path / "out", progress=stop, **arguments)
    with pytest.raises(BadInput, match=r"begun with other settings \(reconstruction: 2 -> 1\)"):
        quantize_model(str(tiny("llama")), tmp_path / "out", **(arguments | {"reconstruct": 1}))
    quantize_model(str(tiny("llama")), tmp_path / "out", **arguments)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_it_nothing_goes_backwards(tiny, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "reconstruct", None)
    quantize_model(str(tiny("llama")), tmp_path / "out", "zeroqat", calibration=calibration, reconstruct=0, **SHORT)
    assert "reconstruction" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert load_model(str(tmp_path / "out"), "cpu", "fp32").latent.reconstruction == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--method", "gptq", "--reconstruct", "2"], "reconstruct: 2 with method gptq; expected method zeroqat"),
    (["--method", "int8", "--reconstruct", "-1"], "reconstruct: -1 with method int8; expected method zeroqat"),
    (["--method", "zeroqat", "--reconstruct", "-1"], "reconstruct: -1; expected a number of epochs, 0 for none"),
])  # fmt: skip
def test_refused(tiny, calibration, tmp_path, capsys, arguments, message):
    assert main(["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--calibration", calibration, *arguments]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_layer_that_does_not_fit(tiny, calibration, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Straight, "__call__", full)
    arguments = ["--method", "zeroqat", "--calibration", calibration, "--samples", "2", "--max-length", "16", "--device", "cpu"]
    assert main(["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), *arguments, "--reconstruct", "1"]) == 3
    said = capsys.readouterr().err
    assert "out of memory" in said and "or no reconstruct" in said and list(tmp_path.iterdir()) == []
