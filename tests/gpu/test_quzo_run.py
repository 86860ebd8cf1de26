"""QuZO on a CUDA device: captured steps have the bits of eager ones, a CPU replays them, and nobody waits for the device."""

import pytest
import torch
from qzo_kernels import reference_noisy
from tiny_runs import make_model, step_without_waiting

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
W4 = "models/reviews-llama-32m-gptq-w4g128"
KINDS = {
    "w4a16": ["eps=0.3", "lr=0.3"], "w4a8": ["eps=0.3", "lr=0.3", "activations=int8"], "separate": ["eps=0.3", "lr=0.3", "stacked=false"],
    "plain": ["eps=0.3", "lr=0.3", "feedback=false"], "rge2": ["eps=0.3", "lr=0.3", "estimator=rge2", "noise_bits=3", "directions=2"],
    "fp8": ["eps=0.3", "lr=0.3", "activations=fp8"], "w8a8": ["eps=4", "lr=60", "activations=int8", "noise_bits=8"],
    "lora": ["method=quzo-lora", "eps=0.01", "lr=0.003"], "lora a8": ["method=quzo-lora", "eps=0.01", "lr=0.003", "activations=int8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def w8(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("w8") / "model"
    quantize_model(str(shared / "models/reviews-llama-32m"), out, "rtn", 8, 128)
    return out


def made(kind, shared, w8, folder, capture=True, *more):
    model = w8 if kind.startswith("w8") else shared / W4
    keys = [f"model={model}", f"data={shared / 'data/sst2'}", "method=quzo", "stacked=true", "steps=12", "batch_size=8", "train_examples=64",
            "eval_examples=32", "save_every=5", f"output_dir={folder}", *KINDS[kind], *more]  # fmt: skip
    return Tuner(load_recipe("qzo-reviews-llama-32m-w4", keys), "test", "qzo tune", capture=capture)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_have_the_bits_of_eager_ones_and_replay_on_a_cpu(kind, shared, w8, tmp_path, capsys):
    states = []
    for capture in (False, True):
        run = made(kind, shared, w8, tmp_path / str(capture), capture)
        run.run()
        states.append(state_hash(run._state()))
        assert not capture or run.graphs.captured
    records = [read_journal(tmp_path / str(capture) / "journal.bin")[1] for capture in (False, True)]
    assert [(r.loss.tobytes(), r.coefs.tobytes()) for r in records[0]] == [(r.loss.tobytes(), r.coefs.tobytes()) for r in records[1]]
    assert states[0] == states[1] and all(r.coefs.any() for r in records[0])
    model = Folder(str(w8 if kind.startswith("w8") else shared / W4))
    assert state_hash(tuned_state(str(tmp_path / "True"), model, torch.device("cpu"), 1, False)[1]) == \
        state_hash(tuned_state(str(tmp_path / "True"), model, torch.device("cuda"), 1, False)[1])  # fmt: skip
    assert state_hash(tuned_state(str(tmp_path / "True"), model, torch.device("cuda"), None, False)[1]) == states[1]
    assert main(["export", str(tmp_path / "True"), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "logits equal" in printed or "adapters for peft" in printed


@pytest.mark.parametrize("kind", ["w4a16", "w4a8", "lora"])
def test_no_step_waits_for_the_device(kind, shared, w8, tmp_path):
    run = made(kind, shared, w8, tmp_path / "run")
    batch = run._batch(0)
    for capture in (False, True):
        graphs = Graphs(run.optimizer, lambda parts, variants: per_example_loss(run.loaded.model, parts[0], variants).mean(1), capture)
        step_without_waiting(graphs, batch)


@pytest.mark.parametrize("kind", ["w4a16", "w4a8", "w8a8"])
def test_losses_are_near_those_of_the_definition(kind, shared, w8, tmp_path):
    """A layer's product on the device against reference_noisy.py, on the layer's own inputs."""
    run = made(kind, shared, w8, tmp_path / "run")
    layer = run.loaded.layers["model.layers.1.mlp.down_proj"]
    x = torch.randn(64, layer.in_features, device="cuda", dtype=torch.bfloat16)
    from qzo.zo.noise import variants

    with run.targets[0].entered(variants(3, 5, [(0, 1), (0, -1)], torch.device("cuda"))):
        noise, y = layer.noise, layer(x)
    weights = reference_noisy.noisy_weight(
        layer.codes.cpu(), layer.scales.data.cpu(), None if layer.zeros is None else layer.zeros.cpu(), layer.bits, layer.group_size,
        layer.in_features, noise.state.cpu(), noise.eps.cpu(), noise.uid, noise.noise_bits,
    )  # fmt: skip
    expected = torch.cat([part.float().cpu() @ w.t() for part, w in zip(x.chunk(2), weights, strict=True)])
    assert (y.float().cpu() - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_tiny_model_of_odd_sizes(tmp_path):
    """Groups that end early, act order, one row."""
    text = tmp_path / "texts.txt"
    text.write_text("a lovely film . It was great\n" * 400)
    quantize_model(str(make_model(tmp_path / "16")), tmp_path / "4", "gptq", 4, 32, desc_act=True, calibration=str(text), samples=2, max_length=32)
    from tiny_runs import make_data, write_recipe

    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "4", make_data(tmp_path / "data"), method="quzo", eps=0.5, lr=0.3, stacked=True,
                          device="cuda", dtype="fp16", batch_size=1)  # fmt: skip
    assert main(["tune", recipe]) == 0 and main(["replay", str(tmp_path / "run"), "--verify", "--device", "cpu"]) == 0
