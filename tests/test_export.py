"""Exported folders: they reload with the run's logits, say what they are, and score what the run scores."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import edit_json, make_model, write_recipe
from transformers import AutoModelForCausalLM

from qzo.cli import main
from qzo.export import PROBE
from qzo.model.gptq_format import read_config
from qzo.model.load import load_model
from qzo.quantize import quantize_model
from qzo.rebuild import load_run

DENSE = {"dense": True, "dense_lr": 1e-3, "dense_eps": 1e-2}
# bits, symmetric, format, in order of activation size, group size; the inner width is 96
CASES = {
    "2 asym": (2, False, "gptq", False, 32),
    "3 sym v2": (3, True, "gptq_v2", False, 64),
    "4 asym desc_act": (4, False, "gptq", True, 32),
    "4 sym v2 desc_act": (4, True, "gptq_v2", True, 64),
    "8 sym whole rows": (8, True, "gptq", False, -1),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("wide") / "model", intermediate_size=96)


@pytest.fixture(scope="module")
def tuned(wide, sentiment, tmp_path_factory):
    """case -> (the folder of a run of three large steps, the folder of its base model)."""
    made = {}

    def make(case):
        if case not in made:
            bits, sym, version, desc_act, size = CASES[case]
            base = tmp_path_factory.mktemp("tuned")
            text = base / "text.jsonl"
            lines = (json.loads(line)["sentence"] for line in (sentiment / "train.jsonl").read_text().splitlines())
            text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
            method = "gptq" if desc_act else "rtn"
            quantize_model(str(wide), base / "model", method, bits, size, sym, desc_act, version, str(text), 8, 16, "cpu")
            assert main(["tune", write_recipe(base / "recipe.yaml", base / "model", sentiment, steps=3, lr=0.05)]) == 0
            made[case] = base / "run", base / "model"
        return made[case]

    return make


def logits(loaded):
    ids = torch.tensor([loaded.tokenizer()(PROBE)["input_ids"]])
    with torch.no_grad():
        return loaded.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(case, version, tuned, tmp_path, capsys):
    run, base = tuned(case)
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--format", version]) == 0
    assert "reloaded: logits equal" in capsys.readouterr().out
    out, expected = load_model(str(tmp_path / "out"), "cpu", "fp32"), load_run(str(run), "cpu", "fp32")[0]
    for name, layer in expected.layers.items():
        layer.scales.data.copy_(layer.scales.half())
        other = out.layers[name]
        assert torch.equal(other.scales, layer.scales) and torch.equal(other.codes, layer.codes) and (other.zeros is layer.zeros is None or torch.equal(other.zeros, layer.zeros))
    assert torch.equal(logits(out), logits(expected))
    assert not torch.equal(logits(out), logits(load_model(str(base), "cpu", "fp32")))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {name: (t.dtype, t.shape) for name, t in after.items()}
    same_zeros = version == read_config(load_model(str(base), "cpu", "fp32").folder).version
    changed = {name.rpartition(".")[2] for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {"scales"} | (set() if same_zeros else {"qzeros"})


@pytest.mark.parametrize("case", CASES)
def test_hf(case, tuned, tmp_path):
    """Plain 16-bit weights: transformers reads them on its own, and gives what the run gives up to their rounding."""
    run, _ = tuned(case)
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--format", "hf"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16} and not any("qweight" in name or "scales" in name for name in tensors)
    ours, expected = load_model(str(tmp_path / "out"), "cpu", "fp32"), load_run(str(run), "cpu", "fp32")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor([ours.tokenizer()(PROBE)["input_ids"]])
        assert torch.equal(theirs(ids, use_cache=False).logits, logits(ours))
    torch.testing.assert_close(logits(ours), logits(expected), rtol=0, atol=0.02)
    for name, layer in expected.layers.items():
        assert torch.equal(tensors[f"{name}.weight"], layer.weight(torch.float16))


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "hf"])
def test_dense_tensors_are_exported(kind, llama4, sentiment, tmp_path, capsys):
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **DENSE)]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--format", kind]) == 0
    assert ("logits equal" in capsys.readouterr().out) == (kind != "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (llama4, tmp_path / "out"))
    norms = [name for name in before if "norm" in name]
    assert norms and not any(torch.equal(before[name], after[name]) for name in norms)
    state = load_run(str(tmp_path / "run"), "cpu", "fp32")[1][1].state()
    assert all(torch.equal(state[f"{name}/dense"][0].half(), after[name]) for name in norms)


def test_what_the_base_config_says_besides_is_kept(llama4_copy, sentiment, tmp_path):
    meta = {"quantizer": ["gptqmodel:7.0.0"], "damp_percent": 0.05}
    own = json.loads((llama4_copy / "config.json").read_text())["quantization_config"]
    own = {key: value for key, value in own.items() if key not in ("bits", "checkpoint_format")}
    edit_json(llama4_copy / "config.json", quantization_config={**own, "w_bit": 4, "format": "gptq", "meta": meta}, mine=1)
    (llama4_copy / "quantize_config.json").unlink()
    (llama4_copy / "LICENSE.txt").write_text("a licence")
    (llama4_copy / "modeling_mine.py").write_text("raise SystemExit")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4_copy, sentiment, steps=1)]) == 0
    for version in ("gptq", "gptq_v2"):
        out = tmp_path / version
        assert main(["export", str(tmp_path / "run"), "-o", str(out), "--format", version]) == 0
        config = json.loads((out / "config.json").read_text())
        quantization = config["quantization_config"]
        assert quantization["meta"] == meta and config["mine"] == 1 and quantization["w_bit"] == quantization["bits"] == 4
        assert quantization["checkpoint_format"] == quantization["format"] == version
        assert json.loads((out / "quantize_config.json").read_text()) == quantization
        assert (out / "LICENSE.txt").read_text() == "a licence" and not (out / "modeling_mine.py").exists()
        assert (out / "tokenizer.json").read_bytes() == (llama4_copy / "tokenizer.json").read_bytes()


def test_base_names_without_the_leading_model(sentiment, tmp_path):
    """OPT's own checkpoints call the decoder `decoder`, where the model calls it `model.decoder`."""
    from safetensors.torch import save_file
    from tiny_models import OPT, SIZES
    from tiny_runs import make_tokenizer
    from transformers import AutoConfig

    tokenizer = make_tokenizer()
    sizes = SIZES | OPT | {"vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).half().save_pretrained(tmp_path / "16")
    tokenizer.save_pretrained(tmp_path / "16")
    quantize_model(str(tmp_path / "16"), tmp_path / "4", "rtn", 4, 32, device="cpu")
    base = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "4" / "model.safetensors").items()}
    save_file(base, tmp_path / "4" / "model.safetensors")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", tmp_path / "4", sentiment, steps=1, **DENSE)]) == 0
    for kind in ("gptq", "hf"):
        assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / kind), "--format", kind]) == 0
        names = {n.removesuffix(".weight").removesuffix(".qweight") for n in load_file(tmp_path / kind / "model.safetensors")}
        assert {n.removesuffix(".weight").removesuffix(".qweight") for n in base} >= names and "decoder.layers.0.fc1" in names


def test_evaluation_of_the_export_is_that_of_the_run(tuned, sentiment, tmp_path, capsys):
    run, base = tuned("4 asym desc_act")
    question = ["--recipe", str(run.with_name("recipe.yaml")), "--dtype", "fp32", "--device", "cpu", "--json"]
    for kind in ("gptq", "hf"):
        assert main(["export", str(run), "-o", str(tmp_path / kind), "--format", kind]) == 0
    capsys.readouterr()
    figures = {}
    for name, model in {"run": run, "gptq": tmp_path / "gptq", "hf": tmp_path / "hf", "base": base}.items():
        assert main(["evaluate", str(model), *question]) == 0
        figures[name] = json.loads(capsys.readouterr().out)
    assert figures["run"].pop("steps") == 3
    for name in ("gptq", "hf"):
        assert figures[name]["accuracy"] == figures["run"]["accuracy"]
        assert figures[name]["loss"] == pytest.approx(figures["run"]["loss"], abs=2e-3)
    assert abs(figures["base"]["loss"] - figures["run"]["loss"]) > 0.01
    shutil.rmtree(tmp_path / "hf")


def test_an_exported_model_is_tuned_again(tuned, sentiment, tmp_path):
    run, _ = tuned("4 asym desc_act")
    assert main(["export", str(run), "-o", str(tmp_path / "model")]) == 0
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", sentiment, steps=1)]) == 0
