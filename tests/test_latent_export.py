"""Latent checkpoints as packed, GPTQ and latent folders: read back, compared with the fake-quantized model, tuned again."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_latent import apart, calibration, latent, logits, one_thread, tiny  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

from qzo.cli import main
from qzo.errors import BadInput
from qzo.latent_export import regrid, verify_folder, write_folder
from qzo.model.load import load_model
from qzo.model.packing import packed
from qzo.model.qat import FoldedNorm

CASES = [("llama", 4, -1, 4), ("qwen3", 4, -1, 8), ("opt", 6, -1, 6), ("opt", 4, 32, 4), ("qwen2", 2, 32, 16), ("opt", 3, 64, 16)]


def moved(path):
    """A latent checkpoint whose weights have moved on its frozen grid, as a run leaves it."""
    loaded = load_model(str(path), "cpu", "fp32")
    generator = torch.Generator().manual_seed(1)
    for fake in loaded.fakes.values():
        weight = fake.weight.data.float()
        step = float(fake.step.mean())
        fake.weight = nn.Parameter(weight + step * torch.randn(weight.shape, generator=generator), requires_grad=False)
        fake.refresh_offset()
    return loaded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_by_the_command_line(latent, case, tmp_path, capsys):  # noqa: F811
    source, out = latent(*case), tmp_path / "out"
    assert main(["export", str(source), "-o", str(out)]) == 0
    assert "reloaded: codes equal; on one input outputs of parts differ by " in capsys.readouterr().out
    fake, found = load_model(str(source), "cpu", "fp32"), load_model(str(out), "cpu", "fp32")
    assert found.config.width == case[1] and found.config.activations == case[3] and not found.fakes and found.latent is None
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "qzo_packed", "version": 1, "bits": case[1], "group_size": case[2], "activations": case[3],
        "smoothing": case[3] < 16, "compensation": fake.latent.compensation}  # fmt: skip
    for name, layer in found.layers.items():
        expected = packed(fake.fakes[name]).parts()
        assert all(torch.equal(packed(layer).parts()[key], value) for key, value in expected.items()), name
    norms = [module for module in found.model.modules() if isinstance(module, FoldedNorm)]
    assert len(norms) == (0 if case[0] == "opt" or case[3] == 16 else 4) and all(norm.bias.any() for norm in norms)
    difference = apart(logits(found), logits(fake))
    assert difference < (1e-6 if case[3] == 16 else 0.05)  # a last bit may change the code of a token, and of all that follows
    kept = {name.rpartition(".")[2] for name in load_file(out / "model.safetensors")}
    assert not kept & {"low", "high", "factor", "move", "scale"}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_weights_that_moved_on_a_frozen_grid(latent, case, tmp_path):  # noqa: F811
    loaded, ids = moved(latent(*case)), torch.arange(1, 20)[None]
    grids = {name: (fake.step.clone(), fake.zero.clone()) for name, fake in loaded.fakes.items()}
    assert not all(torch.equal(fake.grid()[0], fake.step) for fake in loaded.fakes.values())
    for format in ("packed", "zeroqat"):
        write_folder(loaded, str(tmp_path / format), format)
        checked = verify_folder(loaded, str(tmp_path / format), format, ids)
        assert checked["codes"] <= 1e-5 and checked["parts"] < 2e-6 and checked["layers"] < 1e-3
    again = load_model(str(tmp_path / "zeroqat"), "cpu", "fp32")
    assert again.latent == loaded.latent
    exact = 0
    for name, fake in again.fakes.items():
        step, zero = grids[name]
        assert torch.equal(fake.weight, loaded.fakes[name].weight) and fake.weight.dtype == torch.float32 and torch.equal(fake.zero, zero)
        torch.testing.assert_close(fake.step, step, rtol=1.3e-7, atol=0)
        exact += int((fake.step == step).sum())
    assert exact > 0.7 * sum(step.numel() for step, _ in grids.values())
    assert apart(logits(again), logits(loaded)) < 1e-3 < apart(logits(load_model(str(latent(*case)), "cpu", "fp32")), logits(loaded))


def test_a_latent_folder_of_itself_is_the_same(latent, tmp_path):  # noqa: F811
    source = latent("llama", 4, -1, 4)
    assert main(["export", str(source), "-o", str(tmp_path / "out"), "--format", "zeroqat"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert (source / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


def test_regrid_leaves_a_fresh_grid_alone(latent):  # noqa: F811
    loaded = load_model(str(latent("opt", 3, 64, 16)), "cpu", "fp32")
    for fake in loaded.fakes.values():
        factor, move = regrid(fake)
        assert factor is fake.factor.data or torch.equal(factor, fake.factor) and torch.equal(move, fake.move)


@pytest.mark.parametrize("case", CASES[4:], ids=str)
def test_gptq_is_read_by_the_ordinary_loader(latent, tiny, case, tmp_path, capsys):  # noqa: F811
    source, out = latent(*case), tmp_path / "out"
    assert main(["export", str(source), "-o", str(out), "--format", "gptq_v2"]) == 0
    assert "gptq_v2, 0 steps applied\nreloaded: codes equal" in capsys.readouterr().out
    fake, found = load_model(str(source), "cpu", "fp32"), load_model(str(out), "cpu", "fp32")
    assert found.config.version == "gptq_v2" and not found.config.sym and found.latent is None
    plain = AutoModelForCausalLM.from_pretrained(tiny(case[0]), dtype=torch.float32).eval()
    for name, layer in found.layers.items():
        expected = packed(fake.fakes[name])
        assert torch.equal(packed(layer).codes, expected.codes) and torch.equal(packed(layer).zero, expected.zero)
        assert torch.equal(layer.scales, expected.step.half().float())
        plain.get_submodule(name).weight.data.copy_(layer.weight(torch.float32))
    assert apart(logits(found), plain(torch.arange(0, 240, 4)[None], use_cache=False).logits.float()) < 1e-6
    assert apart(logits(found), logits(fake)) < 5e-3
    tensors, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} <= {"qweight", "qzeros", "scales", "g_idx", "bias", "weight"}
    assert all(torch.equal(tensors[name], before[name]) for name in tensors.keys() & before.keys())
    assert json.loads((out / "quantize_config.json").read_text())["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(("case", "format", "says"), [
    (("llama", 4, -1, 4), "gptq_v2", "gptq_v2 with activations of 4 bits; expected weights alone"),
    (("llama", 4, -1, 4), "hf", "--format: hf; expected one of packed, gptq_v2, zeroqat"),
    (("llama", 6, 32, 16), "gptq_v2", "gptq_v2 with codes of 6 bits"),
])  # fmt: skip
def test_refused_formats(latent, case, format, says, tmp_path, capsys):  # noqa: F811
    assert main(["export", str(latent(*case)), "-o", str(tmp_path / "out"), "--format", format]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_replayed_steps_of_a_folder_are_refused(latent):  # noqa: F811
    from qzo.latent_export import load_latent_source

    with pytest.raises(BadInput, match="step 3 of a model folder; expected the folder of a run"):
        load_latent_source(str(latent("llama", 4, -1, 4)), to=3)


def test_a_damaged_export_is_noticed(latent, tmp_path):  # noqa: F811
    from safetensors.torch import save_file

    from qzo.errors import RunFailed

    loaded, ids, out = load_model(str(latent("llama", 4, -1, 4)), "cpu", "fp32"), torch.arange(1, 20)[None], tmp_path / "out"
    write_folder(loaded, str(out), "packed")
    tensors = load_file(out / "model.safetensors")
    for name, change in (("model.layers.1.mlp.up_proj.qweight", lambda t: t + 1), ("model.layers.1.input_layernorm.bias", lambda t: t + 1)):
        save_file(tensors | {name: change(tensors[name])}, out / "model.safetensors")
        with pytest.raises(RunFailed, match="up_proj: codes, steps or zeros that differ|input_layernorm: an output that differs by"):
            verify_folder(loaded, str(out), "packed", ids)
    save_file(tensors, out / "model.safetensors")
    assert verify_folder(loaded, str(out), "packed", ids)["codes"] == 0


def test_a_code_that_a_last_bit_moved_is_no_damage(latent, tmp_path, monkeypatch):  # noqa: F811
    """factor cannot give every Δ: one code of a coarse grid, and with it its Linear's output, may come out otherwise."""
    from safetensors.torch import save_file

    from qzo import latent_export
    from qzo.errors import RunFailed

    loaded, ids, out = moved(latent("qwen2", 2, 32, 16)), torch.arange(1, 20)[None], tmp_path / "out"
    write_folder(loaded, str(out), "zeroqat")
    name, tensors = "model.layers.1.self_attn.o_proj", load_file(out / "model.safetensors")
    fake, weight = loaded.fakes[name], tensors[f"{name}.weight"]
    group = weight[0, :32]
    inside = (group > group.min()) & (group < group.max())
    weight[0, :32][inside.nonzero()[0]] = fake.step[0, 0] * (1 if packed(fake).codes[0, :32][inside][0] <= fake.zero[0, 0] else -1)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(RunFailed, match="1 of [0-9]* codes that differ"):
        verify_folder(loaded, str(out), "zeroqat", ids)
    monkeypatch.setattr(latent_export, "MOVED", 1e-3)
    checked = verify_folder(loaded, str(out), "zeroqat", ids)
    assert checked["parts"] < 1e-4 < checked["layers"] and "codes equal but for 1 of" in checked["said"]
