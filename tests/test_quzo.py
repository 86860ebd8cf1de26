"""Whole runs whose codes move (QuZO): what never moves, the journal's bits, resume, export, statistics and warnings."""

from functools import partial

import numpy as np
import pytest
import torch
from qzo_kernels.pack import untile_codes
from tiny_formats import make_awq, make_compressed
from tiny_runs import stop_at, write_recipe

from qzo.checkpoint import newest_snapshot, state_hash
from qzo.cli import main
from qzo.journal import read_journal
from qzo.metrics import read_metrics
from qzo.model.files import Folder
from qzo.model.load import load_model
from qzo.quantize import quantize_model
from qzo.rebuild import load_run, tuned_state
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo.quantized import gain

QUZO = {"method": "quzo", "eps": 0.5, "lr": 0.3, "stacked": True}
KINDS = {
    "feedback": {}, "plain": {"feedback": False}, "rge2": {"estimator": "rge2", "noise_bits": 3}, "int8": {"activations": "int8"},
    "fp8": {"activations": "fp8"}, "two directions": {"directions": 2, "lr": 3.0}, "separate": {"stacked": False, "micro_batch": 2},
}  # fmt: skip


@pytest.fixture
def tuner(llama4, sentiment, tmp_path):
    def make(**keys):
        path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **{**QUZO, **keys})
        return Tuner(load_recipe(path), "tiny", "qzo tune")

    return make


def copies(tuner):
    return {name: value.clone() for name, value in tuner._state().items()}


def moved(tuner, before):
    return {name for name, value in tuner._state().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_replays_resumes_and_exports(kind, tuner, llama4, tmp_path, capsys):
    """The journal rebuilds codes and residuals; the export holds the codes, and its logits are the run's."""
    run = tuner(**KINDS[kind])
    before = copies(run)
    others = {name: value.clone() for name, value in run.loaded.model.state_dict().items() if not name.endswith("codes")}
    run.run()
    assert any(name.endswith("/codes") for name in moved(run, before))
    assert all(torch.equal(value, run.loaded.model.state_dict()[name]) for name, value in others.items()), "codes alone move"
    header, records = read_journal(tmp_path / "run/journal.bin")
    assert len(records) == 6 and all(r.coefs.any() for r in records) and header["groups"][0]["settings"]["bits"] == 4
    for snapshots in (True, False):
        state = tuned_state(str(tmp_path / "run"), Folder(llama4), torch.device("cpu"), None, snapshots)[1]
        assert state_hash(state) == state_hash(run._state())
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reloaded: logits equal"
    out = load_model(str(tmp_path / "out"), "cpu", "fp32")
    for name, layer in run.loaded.layers.items():
        assert torch.equal(out.layers[name].codes, layer.codes) and torch.equal(out.layers[name].scales, layer.scales)


@pytest.mark.parametrize("feedback", [False, True])
def test_an_interrupted_run_ends_in_the_same_bits(feedback, tuner, tmp_path):
    whole = tuner(feedback=feedback, output_dir=tmp_path / "whole")
    whole.run()
    with pytest.raises(RuntimeError, match="stopped"):
        stop_at(tuner(feedback=feedback), 5, RuntimeError("stopped")).run()
    assert newest_snapshot(tmp_path / "run")[0] == 4
    again = tuner(feedback=feedback)
    again.run()
    assert state_hash(again._state()) == state_hash(whole._state())
    assert [r.loss for r in read_journal(tmp_path / "run/journal.bin")[1]] == [r.loss for r in read_journal(tmp_path / "whole/journal.bin")[1]]


@pytest.mark.parametrize("kind", ["feedback", "plain", "int8"])
def test_lr_0_and_forwards_change_no_bit(kind, tuner):
    run = tuner(**KINDS[kind], lr=0.0, steps=20)
    before = copies(run)
    run.run()
    assert not moved(run, before)


@pytest.mark.parametrize("kind", ["feedback", "int8"])
def test_no_noise_no_difference(kind, tuner):
    """The two signs of a direction measure the same loss, bit for bit, where the noise is too small to be seen."""
    run = tuner(**KINDS[kind], eps=1e-30)
    losses = run.optimizer.losses(lambda count: run._losses(run._batch(0), count), 0, [(0, 1), (0, -1), (0, 0)])
    assert losses[0] == losses[1] == losses[2]


def test_codes_stay_on_their_grid_and_metrics_say_so(tuner, tmp_path):
    run = tuner(lr=1e4, steps=12)
    run.run()
    for layer in run.loaded.layers.values():
        q = untile_codes(layer.codes, 4, layer.in_features)
        assert int(q.min()) >= 0 and int(q.max()) <= 15
    first, *_, last = [m["codes"] for m in read_metrics(tmp_path / "run/metrics.jsonl") if "evaluation" in m]
    assert first["saturated"] < last["saturated"] <= 1 and last["residual_bytes"] == 2 * last["codes"]
    assert first["noise"] != last["noise"] and all(abs(m["noise"]["mean_square"] / gain(4) - 1) < 0.2 for m in (first, last))
    assert (last["smallest"], last["largest"]) == (0, 15) and first["residual_mean_square"] == 0 < last["residual_mean_square"]


@pytest.mark.parametrize("keys,said", [
    ({"lr": 1e-9}, "no code will ever change"), ({"lr": 1e-9, "feedback": False}, "hardly a code will ever change"),
    ({"lr": 30.0, "feedback": False}, "Use feedback: true"), ({"lr": 100.0}, "pile up at its ends"), ({"lr": 0.3}, None),
])  # fmt: skip
def test_steps_that_lead_nowhere_are_named(keys, said, tuner, capsys):
    tuner(**keys, steps=40, schedule="constant", batch_size=2).run()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: codes")]
    assert len(warnings) == (said is not None) and all(said in line and "grid step" in line for line in warnings)


@pytest.mark.parametrize("bits,act_order", [(2, False), (3, False), (4, True), (8, False)])
def test_every_kind_of_checkpoint(bits, act_order, llama16, sentiment, tmp_path, capsys):
    text = tmp_path / "texts.txt"
    text.write_text("a lovely film . It was great\n" * 400)
    more = {"calibration": str(text), "samples": 2, "max_length": 32} if act_order else {}
    quantize_model(str(llama16), tmp_path / "model", "gptq" if act_order else "rtn", bits, 32, desc_act=act_order, device="cpu", **more) \
        if bits != 3 else quantize_model(str(llama16), tmp_path / "model", "rtn", 4, -1, device="cpu")
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", sentiment, **QUZO)
    assert main(["tune", path]) == 0 and main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reloaded: logits equal"
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "dense"), "--format", "hf"]) == 0
    dense, tuned = load_model(str(tmp_path / "dense"), "cpu", "fp32"), load_run(str(tmp_path / "run"), "cpu", "fp32")[0]
    for name, layer in tuned.layers.items():
        np.testing.assert_allclose(dense.model.get_submodule(name).weight, layer.weight(torch.float32), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("keys,said", [
    ({"noise": "gaussian"}, 'noise: given "gaussian" with method: quzo'), ({"dense": True, "dense_lr": 1.0, "dense_eps": 1.0}, "dense: given true"),
    ({"eps_mode": "absolute"}, "eps_mode"), ({"offload": "codes"}, "which writes them"),
    ({"activations": "fp8", "noise_bits": 8}, "noise_bits: given 8 with activations: fp8"), ({"noise_bits": 9}, "noise_bits"),
])  # fmt: skip
def test_settings_that_do_not_fit_together(keys, said, llama4, sentiment, tmp_path, capsys):
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **{**QUZO, **keys})]) == 2
    assert said in capsys.readouterr().err


LORA = {"method": "quzo-lora", "eps": 0.05, "lr": 0.05}


@pytest.mark.parametrize("more", [{}, {"estimator": "rge2", "stacked": False}, {"activations": "int8", "lora_rank": 2, "lora_layers": '["o_proj"]'}],
                         ids=["default", "rge2", "int8"])  # fmt: skip
def test_adapters_run_replay_resume_and_export(more, tuner, llama4, tmp_path, capsys):
    run = tuner(**LORA, **more)
    before = copies(run)
    others = {name: value.clone() for name, value in run.loaded.model.state_dict().items()}
    run.run()
    assert moved(run, before) == set(before)
    assert all(torch.equal(value, run.loaded.model.state_dict()[name]) for name, value in others.items()), "adapters alone move"
    for snapshots in (True, False):
        state = tuned_state(str(tmp_path / "run"), Folder(llama4), torch.device("cpu"), 6, snapshots)[1]
        assert state_hash(state) == state_hash(run._state())
    assert tuned_state(str(tmp_path / "run"), Folder(llama4), torch.device("cpu"), 0)[1].keys() == before.keys()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "adapters for peft, 6 steps" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "gptq"), "--format", "gptq"]) == 2
    assert "one of peft" in capsys.readouterr().err


def test_layers_that_are_not_there_are_named(llama4, sentiment, tmp_path, capsys):
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **LORA, lora_layers='["query"]')]) == 2
    assert "some of down_proj, gate_proj" in capsys.readouterr().err


@pytest.mark.parametrize("bits,group,kind,said", [(8, 32, "fp8", "fp8 with a model of 8 bits"), (4, 24, "int8", "groups of 24")])
def test_activations_that_the_model_cannot_take(bits, group, kind, said, llama16, sentiment, tmp_path, capsys):
    quantize_model(str(llama16), tmp_path / "model", "rtn", bits, group, device="cpu")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", sentiment, activations=kind)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("make", [make_awq, partial(make_compressed, bits=8), partial(make_compressed, order=True)], ids=["awq", "8 bits", "ordered"])
def test_codes_go_back_to_the_format_that_they_came_from(make, llama16, sentiment, tmp_path, capsys):
    folder, _ = make(llama16, tmp_path / "model")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment, **{**QUZO, "lr": 1e3})]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reloaded: logits equal"
    out, tuned, base = load_model(str(tmp_path / "out"), "cpu", "fp32"), load_run(str(tmp_path / "run"), "cpu", "fp32")[0], load_model(str(folder), "cpu", "fp32")
    for name, layer in tuned.layers.items():
        assert torch.equal(out.layers[name].codes, layer.codes)
    assert any(not torch.equal(base.layers[name].codes, layer.codes) for name, layer in tuned.layers.items())
