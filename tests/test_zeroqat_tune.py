"""Whole runs of ZeroQAT on a latent checkpoint: what moves, the journal's bits, resume, evaluation from the run, the lightweight variant, errors."""

import json
import shutil

import pytest
import torch
from tiny_runs import edit_json, sentences, stop_at, write_recipe

from qzo.checkpoint import newest_snapshot, state_hash
from qzo.cli import main
from qzo.conflicts import QUANTIZER
from qzo.errors import BadInput, Interrupted
from qzo.inputs import quantized_folder
from qzo.journal import read_journal
from qzo.metrics import read_metrics
from qzo.model.files import Folder
from qzo.model.linear import QuantLinear
from qzo.quantize import quantize_model
from qzo.rebuild import load_run, tuned_state
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo.targets.quantizer import PARTS

ZEROQAT = {"method": "zeroqat", "eps_mode": "relative_step", "eps": 0.4, "lr": 0.3}
KINDS = {
    "latent": {"stacked": True, "directions": 2},
    "realized": {"direction": "realized", "micro_batch": 2},
    "absolute": {"eps_mode": "absolute", "eps": 0.01, "lr": 0.001},
    "light": {"latent_layers": '["q_proj", "v_proj"]', "stacked": True},
    "light-realized": {"latent_layers": '["q_proj"]', "direction": "realized"},
    "all": {"quantizer": '["clipping", "step", "span", "scale", "shift"]', "quantizer_lr": 0.1},
    "quantizer": {"latent_layers": "[]", "quantizer": '["zero"]', "quantizer_eps": 0.7, "quantizer_lr": 10.0},
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latent4(llama16, tmp_path_factory):
    """W4A4 with smoothing. Not to be written to."""
    folder = tmp_path_factory.mktemp("latent4")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": 6 * record["sentence"]}) + "\n" for record in sentences()))
    quantize_model(str(llama16), folder / "model", "zeroqat", 4, activations=4, calibration=str(folder / "texts.jsonl"), samples=8, max_length=32,
                   device="cpu")  # fmt: skip
    return folder / "model"


@pytest.fixture
def tuner(latent4, sentiment, tmp_path):
    def make(**keys):
        path = write_recipe(tmp_path / "recipe.yaml", latent4, sentiment, **{**ZEROQAT, **keys})
        return Tuner(load_recipe(path), "tiny", "qzo tune")

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_replays_and_is_evaluated(kind, tuner, latent4, tmp_path, capsys):
    keys, path = KINDS[kind], str(tmp_path / "run")
    whole = tuner(**keys, output_dir=tmp_path / "whole")
    before = {name: value.clone() for name, value in whole._state().items()}
    still = {name: value.clone() for name, value in whole.loaded.model.state_dict().items()}
    whole.run()
    state = whole._state()
    moving = {name.rpartition("/")[0] for name, value in state.items() if not torch.equal(value, before[name])}
    assert moving == {name.rpartition("/")[0] for name in state}, "all that is meant to move does"
    assert all(torch.equal(value, still[name]) for name, value in whole.loaded.model.state_dict().items() if name not in moving)
    header, records = read_journal(tmp_path / "whole/journal.bin")
    assert len(records) == 6 and all(r.coefs.any() for r in records) and header["noise"]["bit_exact"] == "on every device"
    scores = [m["evaluation"] for m in read_metrics(tmp_path / "whole/metrics.jsonl") if "evaluation" in m]

    with pytest.raises(Interrupted):
        stop_at(tuner(**keys, save_every=2), 3).run()
    resumed = tuner(**keys, save_every=2)
    resumed.run()
    assert state_hash(resumed._state()) == state_hash(state)
    assert [r.loss for r in read_journal(tmp_path / "run/journal.bin")[1]] == [r.loss for r in records]
    for snapshots in (True, False):
        assert state_hash(tuned_state(path, Folder(latent4), CPU, None, snapshots)[1]) == state_hash(state)
    assert main(["replay", path, "--verify"]) == 0 and "equal to the snapshot of step 6" in capsys.readouterr().out

    loaded, targets, steps = load_run(path, "cpu")
    assert steps == 6 and state_hash({n: v for t in targets for n, v in t.state().items()}) == state_hash(state)
    ours, theirs = (dict(model.named_modules()) for model in (whole.loaded.model, loaded.model))
    for name in whole.loaded.fakes:
        for key in ("step", "zero", "offset"):
            a, b = (getattr(modules[name], key) for modules in (ours, theirs))
            assert a is b is None or torch.equal(a, b), (name, key)
    assert main(["evaluate", path, "--device", "cpu"]) == 0
    assert f"loss: {scores[-1]['loss']:.4g}" in capsys.readouterr().out and scores[-1]["loss"] != scores[0]["loss"]


def test_the_lightweight_variant_packs_all_but_two(tuner):
    run = tuner(latent_layers='["q_proj", "v_proj"]')
    assert {name.rpartition(".")[2] for name in run.loaded.fakes} == {"q_proj", "v_proj"} == {i.name.split(".")[-2] for i in run.targets[0].info()}
    assert len(run.loaded.layers) == 5 and all(isinstance(layer, QuantLinear) for layer in run.loaded.layers.values())
    small, large = (fit.estimate().phases["load"] for fit in (run.fit, tuner().fit))
    assert small["latents"] < large["latents"] / 3 and 0 < small["codes"] < large["latents"] / 4 and not large["codes"]


def test_the_estimate_is_what_is_held(tuner):
    """The weights, to the byte; grids within a tenth."""
    for keys in ({}, KINDS["light"], KINDS["quantizer"]):
        run = tuner(**keys)
        found, fakes = run.fit.estimate().phases["load"], run.loaded.fakes.values()
        assert found["latents"] == sum(fake.weight.nbytes for fake in fakes)
        held = [t for f in fakes for t in (f.low, f.high, f.factor, f.move, f.step, f.zero, f.offset) if t is not None]
        held += [u.rows for t in run.targets if t.name == "latent" for u in t.units.values()]
        assert found["grids"] == pytest.approx(sum(t.nbytes for t in held), rel=0.15)
        assert found["codes"] == sum(layer.codes.nbytes for layer in run.loaded.layers.values())


def test_statistics_are_written(tuner, tmp_path):
    tuner(**KINDS["all"]).run()
    last = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "evaluation" in m][-1]
    assert 0 < last["latent"]["changed"] < 1 and last["latent"]["rms_steps"] > 0 and set(last["quantizer"]) == {"low", "high", "factor", "span", "scale", "shift"}


def test_dry_run_and_warnings(latent4, sentiment, tmp_path, capsys):
    path = write_recipe(tmp_path / "r.yaml", latent4, sentiment, **ZEROQAT)
    assert main(["tune", path, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 bits, group -1, zeroqat, activations of 4 bits; on" in said and "latents" in said
    assert main(["tune", path, "lr=1e-9", "steps=25"]) == 0
    assert "hardly a code will ever change. Raise lr." in capsys.readouterr().err


OTHERS = {
    "relative": ({"eps_mode": "relative"}, "eps_mode: given \"relative\" with method: zeroqat, expected relative_step"),
    "dense": ({"dense": True, "dense_lr": 0.1, "dense_eps": 0.1}, "dense: given true with method: zeroqat"),
    "activations": ({"activations": "int8"}, "activations: given \"int8\" with method: zeroqat, expected null"),
    "codes": ({"offload": "codes", "stacked": True}, "offload: given \"codes\" with method: zeroqat"),
    "nothing": ({"latent_layers": "[]"}, "nothing would move"),
    "two directions": ({"direction": "realized", "directions": 2}, "directions: given 2 with direction: realized, expected 1"),
    "absolute": ({"direction": "realized", "eps_mode": "absolute"}, "eps_mode: given \"absolute\" with direction: realized"),
    "moving grid": ({"direction": "realized", "quantizer": '["clipping"]', "quantizer_lr": 0.1}, "quantizer: given [\"clipping\"] with direction: realized"),
    "unknown part": ({"quantizer": '["clip"]', "quantizer_lr": 0.1}, "quantizer: given \"clip\", expected some of clipping, step"),
    "rate of nothing": ({"quantizer_lr": 0.1}, "quantizer_lr: given 0.1 without quantizer, expected null"),
    "no rate": ({"quantizer": '["clipping"]'}, "quantizer_lr: given nothing"),
    "stacked": ({"quantizer": '["clipping"]', "quantizer_lr": 0.1, "stacked": True}, "stacked: given true with a quantizer that moves"),
    "packed": ({"quantizer": '["clipping"]', "quantizer_lr": 0.1, "latent_layers": '["q_proj"]'}, "packed layers have none"),
    "small eps": ({"quantizer": '["zero"]', "quantizer_lr": 0.1}, "quantizer_eps: given 0.03 with quantizer: zero, expected above 0.5"),
    "of another method": ({"method": "qzo", "direction": "realized"}, "direction: given \"realized\" with method: qzo"),
    "steps of another": ({"method": "qzo"}, "eps_mode: given relative_step with method: qzo, expected relative or absolute"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_keys_that_do_not_fit(case, latent4, sentiment, tmp_path):
    keys, says = OTHERS[case]
    with pytest.raises(BadInput) as error:
        load_recipe(write_recipe(tmp_path / "r.yaml", latent4, sentiment, **{**ZEROQAT, **keys}))
    assert says in str(error.value)


def test_parts_have_one_list():
    assert tuple(PARTS) == QUANTIZER


def test_models_that_do_not_fit(latent4, llama4, llama16, sentiment, tmp_path):
    def refused(model, says, **keys):
        with pytest.raises(BadInput) as error:
            Tuner(load_recipe(write_recipe(tmp_path / "r.yaml", model, sentiment, **{**ZEROQAT, **keys})), "x", "qzo tune")
        assert says in str(error.value) and not (tmp_path / "run").exists()

    for model in llama4, llama16:
        refused(model, "qzo quantize")
    refused(latent4, "a latent checkpoint of ZeroQAT, with method: qzo", method="qzo", eps_mode="relative")
    refused(latent4, "some of down_proj, gate_proj", latent_layers='["x_proj"]')
    refused(latent4, "some of down_proj, gate_proj", latent_layers='["q_proj", "x_proj"]')
    plain = shutil.copytree(latent4, tmp_path / "plain")
    document = json.loads((plain / "config.json").read_text())["quantization_config"]
    edit_json(plain / "config.json", quantization_config=document | {"activations": 16, "smoothing": False})
    for part, why in (("span", "activations of 16 bits"), ("shift", "no smoothing")):
        refused(plain, f"{part}, of a model with {why}", quantizer=f'["{part}"]', quantizer_lr=0.1)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", plain, sentiment, **ZEROQAT))
    assert quantized_folder(recipe)[1].bits == 4
    assert newest_snapshot(tmp_path) is None
