"""ZeroQAT on a CUDA device: captured steps have the bits of eager ones, a CPU replays them, and nobody waits for the device."""

import json

import pytest
import torch
from tiny_runs import make_data, make_model, sentences, step_without_waiting, write_recipe

from qzo.checkpoint import state_hash
from qzo.cli import main
from qzo.data.loss import per_example_loss
from qzo.journal import read_journal
from qzo.model.files import Folder
from qzo.quantize import quantize_model
from qzo.rebuild import tuned_state
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo.graph import Graphs

pytestmark = pytest.mark.gpu
KINDS = {
    "latent": {"stacked": True, "directions": 2}, "realized": {"direction": "realized"},
    "light": {"latent_layers": '["q_proj", "v_proj"]', "stacked": True}, "absolute": {"eps_mode": "absolute", "eps": 0.01, "lr": 0.001},
    "all": {"quantizer": '["clipping", "step", "span", "scale", "shift"]', "quantizer_lr": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def latent4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent4")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": 6 * record["sentence"]}) + "\n" for record in sentences()))
    model = make_model(folder / "16", hidden_size=128, intermediate_size=176, num_hidden_layers=2)
    quantize_model(str(model), folder / "model", "zeroqat", 4, activations=4, calibration=str(folder / "texts.jsonl"), samples=8, max_length=32)
    return folder / "model"


@pytest.fixture
def made(latent4, tmp_path):
    def make(kind, capture=True):
        data = make_data(tmp_path / "data")
        keys = {"method": "zeroqat", "eps_mode": "relative_step", "eps": 0.4, "lr": 0.3, "device": "cuda", "dtype": "bf16", "steps": 12,
                "output_dir": tmp_path / str(capture), **KINDS[kind]}  # fmt: skip
        return Tuner(load_recipe(write_recipe(tmp_path / "recipe.yaml", latent4, data, **keys)), "test", "qzo tune", capture=capture)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_have_the_bits_of_eager_ones_and_replay_on_a_cpu(kind, made, latent4, tmp_path):
    states = []
    for capture in (False, True):
        run = made(kind, capture)
        run.run()
        states.append(state_hash(run._state()))
        assert not capture or run.graphs.captured
    records = [read_journal(tmp_path / str(capture) / "journal.bin")[1] for capture in (False, True)]
    assert [(r.loss.tobytes(), r.coefs.tobytes()) for r in records[0]] == [(r.loss.tobytes(), r.coefs.tobytes()) for r in records[1]]
    assert states[0] == states[1] and all(r.coefs.any() for r in records[0])
    for device in ("cpu", "cuda"):
        assert state_hash(tuned_state(str(tmp_path / "True"), Folder(latent4), torch.device(device), None, False)[1]) == states[1]
    assert main(["replay", str(tmp_path / "True"), "--verify", "--device", "cpu"]) == 0
    assert main(["evaluate", str(tmp_path / "True")]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, made):
    run = made(kind)
    batch = run._batch(0)
    for capture in (False, True):
        graphs = Graphs(run.optimizer, lambda parts, variants: per_example_loss(run.loaded.model, parts[0], variants).mean(1), capture)
        step_without_waiting(graphs, batch)
