"""Packed checkpoints: by transformers, saved again, in half precision, in host memory; and refused by name when damaged or newer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_latent import IDS, apart, calibration, latent, logits  # noqa: F401
from transformers import AutoModelForCausalLM

import qzo
from qzo.errors import BadInput
from qzo.latent_export import write_folder
from qzo.model.load import load_model

CASES = [("llama", 4, -1, 4), ("opt", 6, -1, 6), ("qwen3", 4, -1, 8), ("qwen2", 2, 32, 16)]
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(latent, tmp_path_factory):  # noqa: F811
    """case -> a packed checkpoint. Not to be written to."""
    made = {}

    def make(*case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("packed") / "model"
            write_folder(load_model(str(latent(*case)), "cpu", "fp32"), str(made[case]), "packed")
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_reads_and_saves_it(folder, case, tmp_path, capfd):
    path = folder(*case)
    ours, theirs = load_model(str(path), "cpu", "fp32"), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    said = "".join(capfd.readouterr())
    assert "MISSING" not in said and "UNEXPECTED" not in said
    with torch.no_grad():
        assert torch.equal(theirs(IDS, use_cache=False).logits, logits(ours))
        scales = qzo.Scales(qzo.prepare(theirs), eps=0.03, lr=0.5)
        qzo.ZO([scales]).step(lambda: theirs(input_ids=IDS, labels=IDS).loss)
        theirs.save_pretrained(tmp_path / "out")
        again = load_model(str(tmp_path / "out"), "cpu", "fp32")
        assert torch.equal(logits(again), theirs(IDS, use_cache=False).logits) and not torch.equal(logits(again), logits(ours))
    before, after = (load_file(one / "model.safetensors") for one in (path, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    assert {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())} == {"scales"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bfloat16_it_is_near_the_fake_quantized_model(folder, latent, case):  # noqa: F811
    fake, found = load_model(str(latent(*case)), "cpu", "bf16"), load_model(str(folder(*case)), "cpu", "bf16")
    assert {layer.bias.dtype for layer in found.layers.values() if layer.bias is not None} <= {torch.bfloat16}
    exact = logits(load_model(str(latent(*case)), "cpu", "fp32"))
    # Both round what lies between Linears, and no two roundings of a token on a coarse grid are the same: as near as the dtype lets either be.
    assert apart(logits(found), exact) < max(0.02, 1.3 * apart(logits(fake), exact))


def test_transformers_does_not_take_a_latent_checkpoint_for_its_16_bit_model(latent):  # noqa: F811
    with pytest.raises(BadInput, match="a latent checkpoint of ZeroQAT; expected a quantized checkpoint. Load it with qzo.load_model"):
        AutoModelForCausalLM.from_pretrained(latent("llama", 4, -1, 4))


def test_embeddings_in_host_memory(folder):
    path = str(folder("llama", 4, -1, 4))
    assert torch.equal(logits(load_model(path, "cpu", "fp32", "embeddings")), logits(load_model(path, "cpu", "fp32")))


def config(**keys):
    def edit(path):
        document = json.loads((path / "config.json").read_text())
        document["quantization_config"] |= keys
        (path / "config.json").write_text(json.dumps(document))

    return edit


def put(name, change=None):
    def edit(path):
        tensors = load_file(path / "model.safetensors")
        old = tensors.pop(name)
        save_file(tensors | ({} if change is None else {name: change(old).contiguous()}), path / "model.safetensors")

    return edit


def more(name):
    def edit(path):
        save_file(load_file(path / "model.safetensors") | {name: torch.zeros(3)}, path / "model.safetensors")

    return edit


INNER = "model.layers.0.mlp.down_proj"
DAMAGE = {
    "newer": (config(version=2), "version 2 of qzo_packed; expected version 1"),
    "no version": (config(version=None), "version None of qzo_packed"),
    "bits": (config(bits=16), "bits 16; expected 2, 3, 4, 6 or 8"),
    "other bits": (config(bits=8), "qzeros: shape"),
    "group": (config(group_size=48), "group_size 48 with activations of 4 bits; expected a multiple of 32"),
    "activations": (config(activations=None), "activations None; expected 4, 6, 8 or 16"),
    "no span": (put(f"{Q}.span"), f"no tensor {Q}.span"),
    "span": (put(f"{Q}.span", torch.zeros_like), f"{Q}.span: values that no input grid has"),
    "half": (put(f"{Q}.span", torch.Tensor.half), f"{Q}.span: torch.float16 of shape .1.; expected torch.float32"),
    "no divisor": (put(f"{INNER}.divisor"), f"no tensor {INNER}.divisor"),
    "divisor": (put(f"{INNER}.divisor", torch.Tensor.neg), f"{INNER}.divisor: values that no input grid has; expected finite numbers, positive"),
    "shift": (put(f"{INNER}.shift", lambda t: t / 0), f"{INNER}.shift: values that no input grid has"),
    "short shift": (put(f"{INNER}.shift", lambda t: t[1:]), rf"{INNER}.shift: torch.float32 of shape \[95\]; expected torch.float32 of shape \[96\]"),
    "scales": (put(f"{Q}.scales", lambda t: t / 0), f"{Q}.scales: infinities or NaN"),
    "codes": (put(f"{Q}.qweight", lambda t: t[1:]), f"{Q}.qweight: shape"),
    "smoothing": (config(smoothing=None), "smoothing None; expected true or false"),
    "no shift": (lambda path: [put(f"{INNER}.{key}")(path) for key in ("shift", "divisor")], f"no tensor {INNER}.shift"),
    "no norm bias": (put("model.layers.1.post_attention_layernorm.bias"), "no tensor model.layers.1.post_attention_layernorm.bias"),
    "no norm": (put("model.layers.0.input_layernorm.weight"), "no tensor model.layers.0.input_layernorm.weight"),
    "norm": (put("model.layers.0.input_layernorm.bias", lambda t: t[1:]), r"input_layernorm.bias: shape \[63\]; expected \[64\]"),
    "unknown": (more(f"{Q}.rotation"), f"{Q}.rotation: a tensor that this version does not know"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_refused(folder, case, tmp_path):
    path = shutil.copytree(folder("llama", 4, -1, 4), tmp_path / "model")
    damage, says = DAMAGE[case]
    damage(path)
    with pytest.raises(BadInput, match=says):
        load_model(str(path), "cpu", "fp32")
