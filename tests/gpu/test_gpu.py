"""What holds on a CUDA device: the same bits twice, replays equal to the CPU's, no weight written while measuring."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from qzo.checkpoint import state_hash
from qzo.cli import main
from qzo.data.batches import collate
from qzo.data.encode import encode_examples, padding_id
from qzo.data.loss import per_example_loss
from qzo.data.tasks import get_task, load_examples
from qzo.model.files import Folder
from qzo.model.load import load_model
from qzo.rebuild import tuned_state
from qzo.run import read_run
from qzo.zo.optimizer import ZO
from qzo.zo.targets.scales import Scales

pytestmark = pytest.mark.gpu
MODEL = "models/reviews-llama-32m-gptq-w4g128"


@pytest.fixture(scope="module")
def loaded(shared):
    return load_model(str(shared / MODEL), "cuda")


@pytest.fixture(scope="module")
def batch(shared, loaded):
    task = get_task("sst2")
    tokenizer = loaded.tokenizer()
    encoded, _ = encode_examples(load_examples(task, shared / "data/sst2", "train", 16), tokenizer, 128)
    return collate(encoded, padding_id(tokenizer)).to("cuda")


def everything(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def closure_of(loaded, batch):
    return lambda variants=1: per_example_loss(loaded.model, batch, variants).mean(1)


@pytest.mark.parametrize("stacked", [False, True])
def test_zero_eps_gives_equal_losses(loaded, batch, stacked):
    target = Scales(loaded.layers, 0.03, 0.0)
    target.eps = 0.0
    losses = ZO([target], stacked=stacked).losses(closure_of(loaded, batch), 0, [(0, 1), (0, -1)])
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("stacked", [False, True])
def test_lr_zero_changes_no_byte_and_losses_repeat(loaded, batch, stacked):
    before, seen = everything(loaded.model), []
    for _ in range(2):
        optimizer = ZO([Scales(loaded.layers, 0.03, 0.0)], seed=1, stacked=stacked)
        for _ in range(20):
            optimizer.step(closure_of(loaded, batch))
            seen.append(optimizer.last.projected.tobytes())
    assert everything(loaded.model) == before
    assert seen[:20] == seen[20:] and len(set(seen)) == 20


def tune(shared: Path, out: Path, *overrides: str) -> None:
    command = ["tune", "qzo-reviews-llama-32m-w4", f"model={shared / MODEL}", f"data={shared / 'data/sst2'}",
               "train_examples=100", "eval_examples=64", f"output_dir={out}", *overrides]  # fmt: skip
    assert main(command) == 0


def test_run_repeats_resumes_and_replays_on_the_cpu(shared, tmp_path):
    """Two runs, one of them cut and continued, write the same journal; a CPU replays it to the same bytes."""
    tune(shared, tmp_path / "a", "steps=60", "save_every=25")
    tune(shared, tmp_path / "b", "steps=60", "save_every=25")
    journal = (tmp_path / "a/journal.bin").read_bytes()
    assert (tmp_path / "b/journal.bin").read_bytes()[-40 * 24 :] == journal[-40 * 24 :]
    shutil.rmtree(tmp_path / "b/snapshots/step-000060")
    (tmp_path / "b/journal.bin").write_bytes((tmp_path / "b/journal.bin").read_bytes()[: -20 * 24])
    tune(shared, tmp_path / "b", "steps=60", "save_every=25")
    folder = Folder(str(shared / MODEL))
    hashes = set()
    for run in ("a", "b"):
        header, records = read_run(str(tmp_path / run))
        assert len(records) == 60 and header["device"].startswith("NVIDIA")
        for device in ("cpu", "cuda"):
            steps, state = tuned_state(str(tmp_path / run), folder, torch.device(device), snapshots=False)
            hashes.add(state_hash({k: v.cpu() for k, v in state.items()}))
        assert main(["replay", str(tmp_path / run), "--verify", "--device", "cpu"]) == 0
    assert len(hashes) == 1


def test_journal_written_on_a_cpu_replays_on_the_gpu(shared, tmp_path):
    tune(shared, tmp_path / "run", "steps=8", "device=cpu", "dtype=fp32", "batch_size=2")
    assert main(["replay", str(tmp_path / "run"), "--verify", "--device", "cuda"]) == 0


def test_export_and_evaluate(shared, tmp_path, capsys):
    tune(shared, tmp_path / "run", "steps=30", "stacked=false", "dense=true", "dense_lr=1e-3", "dense_eps=1e-3")
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "logits equal" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "out"), "--recipe", "qzo-reviews-llama-32m-w4", "--data", str(shared / "data/sst2"), "--limit", "64"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_quantize_gptq_on_the_gpu(shared, tmp_path):
    """A small model of the fixtures' family through GPTQ on the device, read back with finite logits."""
    text = tmp_path / "calibration.txt"
    text.write_text("Once upon a time there was a little dog. He liked to play in the garden with a red ball. " * 200)
    command = ["quantize", str(shared / "models/stories260k"), "-o", str(tmp_path / "q"), "--group-size", "32",
               "--calibration", str(text), "--samples", "8", "--max-length", "64", "--device", "cuda"]  # fmt: skip
    assert main(command) == 0
    loaded = load_model(str(tmp_path / "q"), "cuda")
    with torch.no_grad():
        assert bool(torch.isfinite(loaded.model(torch.arange(1, 17, device="cuda")[None]).logits).all())
