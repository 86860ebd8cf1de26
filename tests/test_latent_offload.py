"""Runs whose latents lie in host memory (offload: latents): the bits of runs whose latents are on the device."""

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_lanes import AtOnce
from tiny_runs import make_model, sentences, stop_at, write_recipe

from qzo import fit
from qzo.checkpoint import newest_snapshot, state_hash
from qzo.cli import main
from qzo.errors import BadInput, Interrupted
from qzo.journal import read_journal
from qzo.metrics import read_metrics
from qzo.model.latent_stream import LatentStream
from qzo.model.load import load_model
from qzo.model.qat import FakeQuantLinear, prepare_layer
from qzo.quantize import quantize_model
from qzo.rebuild import load_run
from qzo.recipe import load_recipe
from qzo.tune import Tuner

LIGHT = '["q_proj", "v_proj"]'
ZEROQAT = {"method": "zeroqat", "eps_mode": "relative_step", "eps": 0.4, "lr": 0.3, "stacked": True, "offload": "latents", "latent_layers": LIGHT}
MODELS = {"W2A16": {"bits": 2, "group_size": 32, "activations": 16}, "W4A4": {"bits": 4, "activations": 4}}  # the second is smoothed
KINDS = {
    "light": ("W2A16", {}), "smoothed": ("W4A4", {"micro_batch": 3, "directions": 2}), "realized": ("W4A4", {"direction": "realized"}),
    "every weight": ("W2A16", {"latent_layers": "null"}), "absolute": ("W2A16", {"eps_mode": "absolute", "eps": 0.01, "lr": 0.001, "noise": "gaussian"}),
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latent checkpoints of three layers by name, not to be written to."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": 6 * record["sentence"]}) + "\n" for record in sentences()))
    base = str(make_model(folder / "16", num_hidden_layers=3))
    for name, how in MODELS.items():
        quantize_model(base, folder / name, "zeroqat", **how, calibration=str(folder / "texts.jsonl"), samples=8, max_length=32, device="cpu")
    return folder


@pytest.fixture
def tuner(latents, sentiment, tmp_path, monkeypatch):
    """A run of one recipe, its latents streamed or, as on any CPU, not. Buffers are filled as early as they may be."""

    def make(streamed, model="W2A16", **keys):
        monkeypatch.setattr("qzo.model.stream.Lanes", lambda device: AtOnce())
        monkeypatch.setattr("qzo.model.load._apart", lambda device: streamed)
        run = Tuner(load_recipe(write_recipe(tmp_path / "recipe.yaml", latents / model, sentiment, **{**ZEROQAT, **keys})), "tiny", "qzo tune")
        assert isinstance(run.loaded.stream, LatentStream) == streamed
        return run

    return make


def outcome(run):
    """Records, the last snapshot and what the evaluations found; the folder is removed."""
    records = [(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in read_journal(run.folder.journal)[1]]
    found = [{key: m[key] for key in ("after", "evaluation", "latent")} for m in read_metrics(run.folder.metrics) if "evaluation" in m]
    step, tensors, meta = newest_snapshot(run.folder.path)
    shutil.rmtree(run.folder.path)
    assert len(found) == 4 and found[0]["latent"]["changed"] == 0 < found[-1]["latent"]["changed"]
    return records, found, step, meta, {name: value.numpy().tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_latents_give_the_same_run(kind, tuner):
    """Evaluated, interrupted, and continued with the latents in either place."""
    outcomes, (model, keys) = [], KINDS[kind]
    for first, second in ((False, False), (True, True), *([(True, False), (False, True)] if kind == "smoothed" else [])):
        with pytest.raises(Interrupted):
            stop_at(tuner(first, model, **keys, eval_every=2, save_every=3), 4).run()
        run = tuner(second, model, **keys, eval_every=2, save_every=3)
        run.run()
        outcomes.append(outcome(run))
    assert outcomes[0][2] == 6 and all(other == outcomes[0] for other in outcomes[1:])


@pytest.mark.parametrize("model", MODELS)
def test_a_run_stopped_within_a_step_keeps_the_step_before(model, tuner):
    """Some layers have then taken the last update, and others not."""
    found = []
    for streamed in (False, True):
        run = tuner(streamed, model)

        def stop(*_, run=run):
            if run.optimizer.steps == 4:
                raise Interrupted("here", 15, "")

        run.loaded.model.get_decoder().layers[1].mlp.down_proj.register_forward_pre_hook(stop)
        with pytest.raises(Interrupted):
            run.run()
        found.append((newest_snapshot(run.folder.path)[0], state_hash(run._state())))
        assert found[-1][1] == newest_snapshot(run.folder.path)[2]["state_sha256"]
        shutil.rmtree(run.folder.path)
    assert found[0] == found[1] and found[0][0] == 4


def test_the_tuned_model_of_a_streamed_run(tuner, tmp_path, monkeypatch, capsys):
    run = tuner(True)
    run.run()
    path, expected = str(run.folder.path), state_hash(run._state())
    scores = [m["evaluation"] for m in read_metrics(run.folder.metrics) if "evaluation" in m]
    loaded, targets, steps = load_run(path, "cpu")
    assert steps == 6 and loaded.stream is not None and state_hash(targets[0].state()) == expected
    assert main(["evaluate", path, "--device", "cpu"]) == 0 and f"loss: {scores[-1]['loss']:.4g}" in capsys.readouterr().out
    assert main(["replay", path, "--verify", "--device", "cpu"]) == 0 and "equal to the snapshot of step 6" in capsys.readouterr().out
    assert main(["export", path, "-o", str(tmp_path / "packed")]) == 0
    monkeypatch.setattr("qzo.model.load._apart", lambda device: False)
    assert main(["export", path, "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "packed/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert state_hash(load_run(path, "cpu")[1][0].state()) == expected


def test_what_crosses_the_bus(tuner):
    """In a step: every layer once per micro-batch, both signs together, and back once."""
    run = tuner(True, micro_batch=2, steps=5, save_every=100)
    lanes, seen = run.loaded.stream.lanes, []
    launch = run.launch
    run.launch = lambda: (seen.append((lanes.fetched, lanes.stored)), launch())
    run.run()
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(seen[1:], seen[2:], strict=False)] == [(2 * 3, 3)] * 3


def test_only_latents_are_in_host_memory_and_as_fp32(tuner):
    run = tuner(True)
    stream, fakes = run.loaded.stream, run.loaded.fakes
    assert {name.rpartition(".")[2] for name in fakes} == {"q_proj", "v_proj"} and len(stream._blocks) == 3
    assert all(fake.weight.dtype == torch.float32 and fake.weight.data_ptr() != fake.latent().data_ptr() for fake in fakes.values())
    sizes = [fake.weight.numel() for fake in fakes.values()]
    assert 4 * sum(sizes) <= stream.bytes_per_forward <= 4 * sum(sizes) + 512 * len(sizes) and stream.device_bytes == stream.bytes_per_forward * 2 // 3
    assert all(layer.source is None for layer in run.loaded.layers.values())


def test_a_plan_says_what_is_in_host_memory(latents, sentiment, tmp_path, monkeypatch, capsys):
    kept = fit._kept
    monkeypatch.setattr("qzo.fit._kept", lambda shapes, offload, device: kept(shapes, offload, "cuda"))
    monkeypatch.setattr("qzo.plan.gigabytes", lambda size: f"{size} GB")
    recipe = write_recipe(tmp_path / "r.yaml", latents / "W2A16", sentiment, **{**ZEROQAT, "micro_batch": 2})
    assert main(["tune", recipe, "--dry-run"]) == 0
    size = 3 * 4 * 64 * (64 + 32)
    assert f"latents in host memory: {size} GB; {3 * size} GB cross the bus in a step, {size} GB of them back" in capsys.readouterr().out
    monkeypatch.undo()
    advised = Tuner(load_recipe(write_recipe(tmp_path / "r.yaml", latents / "W2A16", sentiment, **{**ZEROQAT, "offload": "none"})), "x", "qzo tune").fit
    advised.device, large = torch.device("cuda"), tuple(replace(linear, rows=5120, cols=5120) for linear in advised.whole.latents)
    advised.whole = advised.shapes = replace(advised.whole, latents=large)
    # Of three layers two stay; and with them the embeddings go.
    assert dict(advised.savings())["offload=latents stacked=true"] == pytest.approx(2 * 4 * 5120 * 5120, rel=0.02)


def test_loading_holds_the_latents_of_one_layer(latents, monkeypatch):
    """When a layer is prepared, those that were packed before it are gone."""
    seen, prepare = [], prepare_layer

    def prepared(layer, *how):
        assert not [one() for one in seen if one() is not None]
        found = prepare(layer, *how)
        seen.extend(weakref.ref(module) for name, module in layer.named_modules() if isinstance(module, FakeQuantLinear) and name[-6:] not in LIGHT)
        return found

    monkeypatch.setattr("qzo.model.latent.prepare_layer", prepared)
    load_model(str(latents / "W2A16"), "cpu", "fp32", latent_layers=["q_proj", "v_proj"])
    assert len(seen) == 3 * 5


REFUSED = {
    "signs one by one": ({"stacked": False}, "offload: given latents with stacked: false, expected none, or stacked: true"),
    "a moving quantizer": ({"stacked": False, "latent_layers": "null", "quantizer": '["step"]', "quantizer_lr": 0.1}, "none, because a quantizer moves"),
    "no weights": ({"latent_layers": "[]"}, "offload: given latents with latent_layers: []"),
    "another method": ({"method": "qzo", "eps_mode": "relative", "latent_layers": "null"}, "offload: given latents with method: qzo"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_do_not_fit(case, sentiment, tmp_path):
    keys, says = REFUSED[case]
    with pytest.raises(BadInput) as error:
        load_recipe(write_recipe(tmp_path / "r.yaml", "model", sentiment, **{**ZEROQAT, **keys}))
    assert says in str(error.value)
