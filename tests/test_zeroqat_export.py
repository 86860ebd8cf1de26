"""Runs of ZeroQAT, exported: packed, latent and GPTQ folders that compute what the run computes, and that are tuned again."""

import json

import pytest
import torch
from tiny_runs import sentences, write_recipe

from qzo.cli import main
from qzo.export import export_run
from qzo.journal import read_journal
from qzo.model.load import load_model
from qzo.model.packing import packed
from qzo.quantize import quantize_model
from qzo.rebuild import load_run

ZEROQAT = {"method": "zeroqat", "eps_mode": "relative_step", "eps": 0.4, "lr": 0.3, "steps": 3}
# bits, group size, activations, keys
KINDS = {
    "latent": (4, -1, 4, {}),
    "light": (4, 32, 8, {"latent_layers": '["q_proj", "v_proj"]'}),
    "all": (6, -1, 6, {"quantizer": '["clipping", "step", "span", "scale", "shift"]', "quantizer_lr": 0.1}),
    "weights alone": (2, 32, 16, {"quantizer": '["clipping", "zero"]', "quantizer_eps": 0.7, "quantizer_lr": 0.5}),
    "quantizer alone": (4, 32, 16, {"latent_layers": "[]", "quantizer": '["step"]', "quantizer_lr": 0.3}),
}


@pytest.fixture(scope="module")
def tuned(llama16, sentiment, tmp_path_factory):
    """kind -> (the folder of a run of three large steps, the latent checkpoint that it began with)."""
    made = {}

    def make(kind):
        if kind not in made:
            folder, (bits, size, activations, keys) = tmp_path_factory.mktemp("tuned"), KINDS[kind]
            (folder / "texts.jsonl").write_text("".join(json.dumps({"text": 6 * record["sentence"]}) + "\n" for record in sentences()))
            quantize_model(str(llama16), folder / "model", "zeroqat", bits, size, activations=activations, calibration=str(folder / "texts.jsonl"),
                           samples=8, max_length=32, device="cpu")  # fmt: skip
            assert main(["tune", write_recipe(folder / "recipe.yaml", folder / "model", sentiment, **{**ZEROQAT, **keys})]) == 0
            made[kind] = folder / "run", folder / "model"
        return made[kind]

    return make


def logits(loaded):
    with torch.no_grad():
        return loaded.model(torch.arange(1, 24)[None], use_cache=False).logits.float()


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_run_computes(kind, tuned, tmp_path, capsys):
    (run, base), (_, _, activations, _) = tuned(kind), KINDS[kind]
    formats = ("packed", "zeroqat") + (("gptq_v2",) if activations == 16 else ())
    expected = load_run(str(run), "cpu", "fp32")[0]
    assert apart(logits(load_model(str(base), "cpu", "fp32")), logits(expected)) > 1e-2
    for format in formats:
        assert main(["export", str(run), "-o", str(tmp_path / format), "--format", format]) == 0
        said = capsys.readouterr().out
        assert f"{format}, 3 steps applied\nreloaded: codes equal" in said
        found = load_model(str(tmp_path / format), "cpu", "fp32")
        assert apart(logits(found), logits(expected)) < (2e-3 if format == "gptq_v2" else 1e-3)
        for name, layer in {**found.fakes, **found.layers}.items():
            ours = packed(expected.fakes.get(name) or expected.layers[name])
            assert (packed(layer).codes != ours.codes).sum() <= (format == "zeroqat") and torch.equal(packed(layer).zero, ours.zero), name
        assert "Load" in (tmp_path / format / "README.md").read_text()
    if activations < 16:
        assert main(["export", str(run), "-o", str(tmp_path / "no"), "--format", "gptq_v2"]) == 2
        assert "Use --format packed" in capsys.readouterr().err


def test_the_default_is_packed_and_some_steps(tuned, tmp_path, capsys):
    run, base = tuned("latent")
    assert main(["replay", str(run), "--to", "2", "-o", str(tmp_path / "two")]) == 0
    assert "packed, 2 steps applied" in capsys.readouterr().out
    two, whole = load_model(str(tmp_path / "two"), "cpu", "fp32"), load_run(str(run), "cpu", "fp32")[0]
    assert apart(logits(two), logits(load_run(str(run), "cpu", "fp32", to=2)[0])) < 1e-3 < apart(logits(two), logits(whole))


def test_a_replay_writes_the_same_model_and_reads_no_snapshot(tuned, tmp_path, monkeypatch):
    run, _ = tuned("light")
    export_run(str(run), str(tmp_path / "exported"))
    monkeypatch.setattr("qzo.rebuild.newest_snapshot", lambda *_, **__: pytest.fail("a snapshot was read"))
    assert export_run(str(run), str(tmp_path / "replayed"), snapshots=False)["steps"] == 3
    assert (tmp_path / "replayed" / "model.safetensors").read_bytes() == (tmp_path / "exported" / "model.safetensors").read_bytes()


def test_evaluation_of_packed_is_that_of_the_run(tuned, tmp_path, capsys):
    run, _ = tuned("latent")
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    (tmp_path / "text.txt").write_text(" ".join(record["sentence"] for record in sentences()))
    for question in (["--recipe", str(run.with_name("recipe.yaml"))], ["--perplexity", str(tmp_path / "text.txt"), "--window", "32"]):
        capsys.readouterr()
        figures = []
        for model in (run, tmp_path / "out"):
            assert main(["evaluate", str(model), *question, "--dtype", "fp32", "--device", "cpu", "--json"]) == 0
            figures.append(json.loads(capsys.readouterr().out))
        assert figures[0].pop("steps") == 3
        for key, value in figures[0].items():
            assert figures[1][key] == pytest.approx(value, rel=2e-3), key


@pytest.mark.parametrize("kind", ["light", "all", "weights alone"])
def test_packed_scales_are_tuned_by_qzo(kind, tuned, sentiment, tmp_path, capsys):
    """The product is of integers also under noise, and what moved is exported again, bit for bit."""
    run, _ = tuned(kind)
    out, again = tmp_path / "packed", tmp_path / "again"
    assert main(["export", str(run), "-o", str(out)]) == 0
    recipe = write_recipe(tmp_path / "recipe.yaml", out, sentiment, steps=3, lr=0.05, dense=True, dense_lr=1e-3, dense_eps=1e-2)
    assert main(["tune", recipe, "--dry-run"]) == 0 and main(["tune", recipe]) == 0
    header, records = read_journal(tmp_path / "run/journal.bin")
    assert [group["name"] for group in header["groups"]] == ["scales", "dense"] and all(record.coefs.all() for record in records)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "-o", str(again)]) == 0
    assert "reloaded: logits equal" in capsys.readouterr().out
    first, second = load_model(str(out), "cpu", "fp32"), load_model(str(again), "cpu", "fp32")
    assert first.config == second.config and not torch.equal(logits(first), logits(second))
    for name, layer in second.layers.items():
        other = first.layers[name]
        assert torch.equal(layer.codes, other.codes) and layer.input_bits == other.input_bits and not torch.equal(layer.scales, other.scales)
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert main(["replay", str(tmp_path / "run"), "--verify"]) == 0


@pytest.mark.parametrize(("kind", "keys", "says"), [
    ("light", {"method": "quzo", "lr": 0.1}, "recipe, method: quzo with a packed checkpoint of 4-bit weights and 8-bit activations"),
    ("light", {"activations": "int8"}, "recipe, activations: int8 with a packed checkpoint of 4-bit weights and 8-bit activations"),
    ("weights alone", {"method": "quzo", "lr": 0.1}, "recipe, method: quzo with a packed checkpoint of 2-bit weights and 16-bit activations"),
])  # fmt: skip
def test_what_a_packed_checkpoint_is_not_tuned_by(kind, keys, says, tuned, sentiment, tmp_path, capsys):
    assert main(["export", str(tuned(kind)[0]), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for more in ((), ("--dry-run",)):
        assert main(["tune", write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", sentiment, **keys), *more]) == 2
        assert says in capsys.readouterr().err


def test_adapters_on_a_packed_checkpoint(tuned, sentiment, tmp_path):
    assert main(["export", str(tuned("light")[0]), "-o", str(tmp_path / "out")]) == 0
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", sentiment, method="quzo-lora", lr=0.05, eps=0.01, steps=2)
    assert main(["tune", recipe]) == 0


def test_an_exported_latent_checkpoint_is_tuned_again(tuned, sentiment, tmp_path):
    assert main(["export", str(tuned("latent")[0]), "-o", str(tmp_path / "model"), "--format", "zeroqat"]) == 0
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", sentiment, **{**ZEROQAT, "steps": 1})]) == 0
