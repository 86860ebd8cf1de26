"""Model folders of every family: the same logits as transformers gives, from 16 bits, GPTQ, shards and the hub's cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qzo.cli import main
from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.linear import QuantLinear
from qzo.model.load import load_model
from qzo.quantize import quantize_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
IDS = torch.arange(0, 250, 9).view(2, -1)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """family -> its tiny model rounded to 4 bits in groups of 32 (the inner width is 96)."""
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"{family}4") / "model"
            quantize_model(str(tiny(family)), made[family], "rtn", 4, 32, sym=False, format="gptq_v2", device="cpu")
        return made[family]

    return make


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def reference(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_folder(tiny, family):
    loaded, expected = load_model(str(tiny(family)), "cpu", "fp32"), reference(tiny(family))
    assert torch.equal(logits(loaded.model), logits(expected))
    assert not loaded.layers and loaded.config is None and not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_folder(tiny, quantized, family):
    loaded, expected = load_model(str(quantized(family)), "cpu", "fp32"), reference(tiny(family))
    tensors = [*loaded.model.named_parameters(), *loaded.model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    assert len(loaded.layers) == {"opt": 12}.get(family, 14)
    assert all(layer.scales.dtype == torch.float32 and layer.codes.dtype == torch.int32 for layer in loaded.layers.values())
    for name, layer in loaded.layers.items():
        linear = expected.get_submodule(name)
        assert (layer.bias is None) == (linear.bias is None), name
        if layer.bias is not None:
            assert torch.equal(layer.bias, linear.bias) and layer.bias.any()
        linear.weight.data.copy_(layer.weight(torch.float32))
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_missing_is_named(quantized, tmp_path):
    folder = shutil.copytree(quantized("qwen2"), tmp_path / "4")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.bias"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"{name}: no such tensor; expected .*config.json gives the layer a bias"):
        load_model(str(folder), "cpu", "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_quantized_equals_transformers(tiny, quantized, family):
    """Embeddings, norms, the head, and the rotary frequencies that no file holds."""
    loaded, expected = load_model(str(quantized(family)), "cpu", "fp32").model, reference(tiny(family))
    buffers, others = dict(expected.named_buffers()), dict(expected.named_parameters())
    assert buffers.keys() == {n for n, _ in loaded.named_buffers() if not isinstance(loaded.get_submodule(n.rpartition(".")[0]), QuantLinear)}
    assert (family == "opt") != any("rotary" in name for name in buffers)
    for name, value in buffers.items():
        assert torch.equal(loaded.get_buffer(name), value), name
    plain = [n for n in dict(loaded.named_parameters()) if n in others]
    assert any("norm" in name for name in plain) and any("embed" in name for name in plain)
    for name in plain:
        assert torch.equal(loaded.get_parameter(name), others[name]), name


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True), ("opt", True)])
def test_the_head_is_tied_where_the_config_says_so(tiny, quantized, family, tied):
    for folder in (tiny(family), quantized(family)):
        model = load_model(str(folder), "cpu", "fp32").model
        assert model.config.tie_word_embeddings == tied
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_everything_but_the_scales_has_the_dtype_asked_for(quantized, dtype):
    loaded = load_model(str(quantized("qwen2")), "cpu", dtype)
    kinds = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.endswith(".scales")} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not name.endswith(".scales")} == {loaded.dtype}
    assert logits(loaded.model).dtype == loaded.dtype


def sharded(source: Path, out: Path) -> Path:
    """The same folder, its tensors dealt to three shards with an index."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(part, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def test_shards_with_an_index(tiny, quantized, tmp_path):
    for number, folder in enumerate((tiny("mistral"), quantized("mistral"))):
        split = sharded(folder, tmp_path / str(number))
        whole, parts = (load_model(str(path), "cpu", "fp32") for path in (folder, split))
        assert torch.equal(logits(whole.model), logits(parts.model))
        assert len(set(parts.folder.tensors.values())) == 3


def test_other_safetensors_beside_the_model(quantized, tmp_path):
    """Some hub folders hold the weights a second time, under another name and other tensor names."""
    copy = shutil.copytree(quantized("llama"), tmp_path / "model")
    save_file({"x": torch.zeros(1)}, copy / "consolidated.safetensors")
    assert "x" not in load_model(str(copy), "cpu", "fp32").folder.tensors


def test_names_without_the_leading_model(quantized, tmp_path):
    copy = shutil.copytree(quantized("opt"), tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, copy / "model.safetensors")
    whole, base = (load_model(str(path), "cpu", "fp32") for path in (quantized("opt"), copy))
    assert torch.equal(logits(whole.model), logits(base.model)) and whole.layers.keys() == base.layers.keys()


def test_a_padding_token_that_the_model_has_no_embedding_for(quantized, tmp_path):
    """Often added to a tokenizer alone; rows are padded with another token then."""
    copy = shutil.copytree(quantized("llama"), tmp_path / "model")
    tokenizer = load_model(str(copy), "cpu", "fp32").tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "a"})
    assert tokenizer.pad_token_id == 256
    tokenizer.save_pretrained(copy)
    tokenizer = load_model(str(copy), "cpu", "fp32").tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < 256


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache laid out as the hub's, and no network: (id, folder) -> the folder in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path) -> Path:
        root, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        return shutil.copytree(folder, root / "snapshots" / commit)

    return put


def test_hub_id_from_the_cache(hub, quantized):
    cached = hub("org/tiny-gptq", quantized("llama"))
    loaded = load_model("org/tiny-gptq", "cpu", "fp32")
    assert loaded.folder.path == cached
    assert torch.equal(logits(loaded.model), logits(load_model(str(quantized("llama")), "cpu", "fp32").model))
    assert loaded.tokenizer()("abc")["input_ids"]


def test_a_folder_goes_before_a_hub_id(hub, quantized, tmp_path, monkeypatch):
    hub("org/tiny-gptq", quantized("llama"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quantized("qwen2"), tmp_path / "org" / "tiny-gptq")
    assert Folder("org/tiny-gptq").config["model_type"] == "qwen2"


def test_unknown_hub_id_offline(hub, tmp_path, capsys):
    with pytest.raises(BadInput, match="org/nothing: neither a folder here nor a model that the hub gives"):
        Folder("org/nothing")
    assert main(["quantize", "org/nothing", "-o", str(tmp_path / "out"), "--method", "rtn"]) == 2
    assert "Check the spelling, the network" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "./org/model", "/org/model", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_never_asked_for(name):
    with pytest.raises(BadInput, match="no such file or folder; expected a folder, or a hub id like org/name"):
        Folder(name)
