"""qzo.prepare on models that transformers loaded in bitsandbytes' formats: the same logits, the same storage, saved as theirs."""

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from tiny_runs import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

import qzo
from qzo.errors import BadInput
from qzo.model.linear import QuantLinear

IDS = torch.arange(1, 25)[None]
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Rows of 128 and of 64: codes in place, and moved."""
    return make_model(tmp_path_factory.mktemp("live") / "model", intermediate_size=128)


def load(folder, **how):
    """On CPUs with bf16 instructions a forward would round absmax to bf16 for good: it may not."""
    quantization = {"quantization_config": BitsAndBytesConfig(**how)} if how else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **quantization).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_then_tuned_then_saved_as_theirs(kind, base, tmp_path):
    model = load(base, **KINDS[kind])
    # LLM.int8's own product rounds its inputs: its weights alone are compared.
    before = logits(load(base, **KINDS[kind]).dequantize() if kind == "int8" else model)
    layers = qzo.prepare(model)
    assert len(layers) == 7 and len({id(layer.scratch) for layer in layers.values()}) == 1
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-2 if kind == "int8" else 1e-5)
    assert qzo.prepare(model) == layers
    zo = qzo.ZO([qzo.Scales(layers, eps=0.05, lr=0.2)], seed=1)
    for _ in range(3):
        zo.step(lambda: model(IDS, labels=IDS).loss)
    tuned = logits(model)
    assert float((tuned - before).abs().max()) > 0.05
    model.save_pretrained(tmp_path / "out")
    ours = qzo.load_model(str(tmp_path / "out"), "cpu", "fp32")
    assert ours.layers.keys() == layers.keys()
    torch.testing.assert_close(logits(ours.model), tuned, rtol=0, atol=1e-4)
    theirs = load(tmp_path / "out")
    assert not any(isinstance(module, QuantLinear) for module in theirs.modules())
    torch.testing.assert_close(logits(theirs.dequantize() if kind == "int8" else theirs), tuned, rtol=0, atol=2e-2 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_stay_in_their_storage(kind, base):
    model = load(base, **KINDS[kind])
    down = model.model.layers[0].mlp.down_proj
    address, size = down.weight.data_ptr(), down.weight.numel() * down.weight.element_size()
    layer = qzo.prepare(model)["model.layers.0.mlp.down_proj"]
    assert layer.in_features == 128 and layer.codes.data_ptr() == address and layer.codes.nbytes == size


def test_the_noise_is_that_of_the_folder(base, tmp_path):
    """A run of `qzo tune` on a saved folder and a loop on the live model draw the same directions."""
    model = load(base, **KINDS["nf4"])
    model.save_pretrained(tmp_path / "nf4")
    held = {name: qzo.Scales(layers, 0.05, 0.2).info() for name, layers in (
        ("live", qzo.prepare(model)), ("folder", qzo.load_model(str(tmp_path / "nf4"), "cpu", "fp32").layers))}  # fmt: skip
    assert held["live"] == held["folder"]


def test_what_is_not_quantized_yet_or_was_rewritten_is_named(base):
    with pytest.raises(BadInput, match="prepare, 0: a Linear4bit whose weight is not quantized"):
        qzo.prepare(torch.nn.Sequential(Linear4bit(64, 64)))
    model = load(base, **KINDS["nf4"])
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BadInput, match="up_proj: weights that a forward on the CPU has rewritten.*right after from_pretrained"):
        qzo.prepare(model)


def test_trainer_and_accelerate_train_it(base, tmp_path):
    """The same steps as by hand, bit for bit."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    states = {}
    for way in ("hand", "trainer", "accelerate"):
        model = load(base, **KINDS["nf4"])
        layers = qzo.prepare(model)
        zo = qzo.ZO([qzo.Scales(layers, eps=0.05, lr=0.2)], seed=1)
        if way == "trainer":
            given = {"max_steps": 3, "per_device_train_batch_size": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "lr_scheduler_type": "constant"}
            qzo.ZOTrainer(model, TrainingArguments(str(tmp_path / "out"), **given), train_dataset=rows, optimizers=(zo, None)).train()
        else:
            step = Accelerator(cpu=True).prepare(zo).step if way == "accelerate" else zo.step
            for _ in range(3):
                step(lambda: model(IDS, labels=IDS).loss)
        states[way] = torch.cat([layer.scales.detach().flatten() for layer in layers.values()])
    assert torch.equal(states["hand"], states["trainer"]) and torch.equal(states["hand"], states["accelerate"])
