"""transformers' own from_pretrained and save_pretrained on checkpoints of qzo, after `import qzo` and without further packages."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_formats import make_awq, make_compressed
from tiny_runs import edit_json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig
from transformers.quantizers import auto

import qzo
from qzo import register
from qzo.cli import main
from qzo.errors import BadInput
from qzo.model.load import load_model
from qzo.model.pretrained import CheckpointQuantizer

IDS = torch.arange(1, 25)[None]
CASES = {
    "gptq": None, "awq": (make_awq, {}), "awq but one": (make_awq, {"but": "down_proj"}), "compressed": (make_compressed, {"order": True}),
    "compressed sym": (make_compressed, {"bits": 8, "sym": True}),
}  # fmt: skip


def read(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(params=CASES)
def folder(request, llama16, llama4, tmp_path):
    make = CASES[request.param]
    return make[0](llama16, tmp_path / "model", **make[1])[0] if make else llama4


def test_it_is_the_model_that_qzo_loads(folder, capfd):
    theirs, ours = read(folder), load_model(str(folder), "cpu", "fp32").model
    assert torch.equal(logits(theirs), logits(ours)) and not theirs.training
    assert "MISSING" not in (said := "".join(capfd.readouterr())) and "UNEXPECTED" not in said
    layers, expected = qzo.prepare(theirs), qzo.prepare(ours)
    assert list(layers) == list(expected) and all(torch.equal(layers[name].scales, layer.scales) for name, layer in expected.items())


@pytest.mark.parametrize("reader", ["from_pretrained", "load_model"])
def test_a_tuned_model_is_saved_as_an_ordinary_checkpoint(reader, folder, tmp_path):
    model = read(folder) if reader == "from_pretrained" else load_model(str(folder), "cpu", "fp32").model
    scales = qzo.Scales(qzo.prepare(model), eps=0.03, lr=0.5)
    qzo.ZO([scales]).step(lambda: model(input_ids=IDS, labels=IDS).loss)
    model.save_pretrained(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    moved = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())}
    assert moved == {"weight_scale" if "weight_scale" in "".join(before) else "scales"}
    old, new = (json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path / "out"))
    assert new == old
    with torch.no_grad():
        for layer in scales.layers.values():
            layer.scales.copy_(layer.scales.half())
    for again in (read(tmp_path / "out"), load_model(str(tmp_path / "out"), "cpu", "fp32").model):
        assert torch.equal(logits(again), logits(model))


def test_embeddings_in_host_memory_are_saved_too(llama4, tmp_path):
    load_model(str(llama4), "cpu", "fp32", "embeddings").model.save_pretrained(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (llama4, tmp_path / "out"))
    assert set(before) == set(after) and torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(logits(read(tmp_path / "out")), logits(read(llama4)))


def test_an_export_generates(recipe, tmp_path):
    assert main(["tune", recipe]) == 0 and main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = read(tmp_path / "out")
    made = model.generate(**tokenizer("a great film .", return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=0)
    ours = load_model(str(tmp_path / "out"), "cpu", "fp32").model
    assert made.tolist() == ours.generate(**tokenizer("a great film .", return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("order", [("qzo", "transformers.quantizers.auto"), ("transformers.quantizers.auto", "qzo")])
def test_the_order_of_imports_does_not_matter(order):
    code = f"import {order[0]}, {order[1]}, sys; print(sys.modules['transformers.quantizers.auto'].AUTO_QUANTIZER_MAPPING['gptq'].__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "CheckpointQuantizer\n", result.stderr


def test_importing_qzo_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import qzo; print({n.split('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "{'qzo'}\n"


def test_what_transformers_can_read_by_itself_is_left_to_it(monkeypatch):
    there = {"optimum", "compressed_tensors", "accelerate"}
    monkeypatch.setattr(register, "find_spec", lambda name: name if name in there else None)
    tables = SimpleNamespace(AUTO_QUANTIZER_MAPPING={}, AUTO_QUANTIZATION_CONFIG_MAPPING={})
    register._register(tables)
    assert set(tables.AUTO_QUANTIZER_MAPPING) == set(tables.AUTO_QUANTIZATION_CONFIG_MAPPING) == {"gptq", "awq", "aqlm", *register.OWN}
    there |= {"gptqmodel", "aqlm"}
    tables.AUTO_QUANTIZER_MAPPING.clear()
    register._register(tables)
    assert set(tables.AUTO_QUANTIZER_MAPPING) == set(register.OWN)
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is CheckpointQuantizer and set(register.NEEDED) <= set(auto.AUTO_QUANTIZER_MAPPING)


def rename(folder, old, new):
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


NEWER = {
    "another version": (lambda f: edit(f, checkpoint_format="gptq_v3"), "gptq_v3"),
    "other bits": (lambda f: edit(f, bits=5), "bits 5"),
    "another name of the codes": (lambda f: rename(f, "up_proj.qweight", "up_proj.qweight2"), "no tensor model.layers.0.mlp.up_proj.qweight; expected every tensor"),
    "a tensor too many": (lambda f: rename(f, "model.norm.weight", "model.layers.0.mlp.up_proj.outliers"), "no tensor model.norm.weight"),
}  # fmt: skip


def edit(folder, **keys):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**config, **keys})


@pytest.mark.parametrize("case", NEWER)
def test_a_newer_format_is_an_error(case, llama4_copy):
    change, said = NEWER[case]
    change(llama4_copy)
    with pytest.raises(BadInput, match=said):
        read(llama4_copy)


def test_a_tensor_that_a_format_does_not_have_is_an_error(llama4_copy):
    tensors = load_file(llama4_copy / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.up_proj.outliers": torch.ones(3)}, llama4_copy / "model.safetensors")
    for reader in (read, lambda folder: load_model(str(folder), "cpu", "fp32")):
        with pytest.raises(BadInput, match=r"up_proj.outliers: a tensor that this version does not know.*newer qzo"):
            reader(llama4_copy)


def test_what_cannot_be_read_so_is_refused(llama4, llama16):
    with pytest.raises(BadInput, match="16 bits to quantize.*qzo quantize"):
        AutoModelForCausalLM.from_pretrained(llama16, quantization_config=GPTQConfig(bits=4))
    model, config = type(read(llama4)), AutoConfig.from_pretrained(llama4)
    with pytest.raises(BadInput, match="a state_dict"):
        model.from_pretrained(None, config=config, state_dict=load_file(llama4 / "model.safetensors"))
