"""Latents in host memory on a CUDA device: the bits of a model whose latents are on it, eager, captured and evaluated, in less memory."""

import gc
import json
from functools import partial

import pytest
import torch
from tiny_runs import make_data, make_model, sentences, step_without_waiting, write_recipe

from qzo.checkpoint import newest_snapshot
from qzo.cli import main
from qzo.data.batches import collate
from qzo.data.encode import Encoded, Option, padding_id
from qzo.data.loss import option_scores, per_example_loss
from qzo.errors import Interrupted
from qzo.journal import read_journal
from qzo.metrics import read_metrics
from qzo.model.latent_stream import stream_latents
from qzo.model.load import load_model
from qzo.quantize import quantize_model
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo.estimator import Clip
from qzo.zo.graph import Graphs
from qzo.zo.optimizer import ZO
from qzo.zo.targets.latent import Latent

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COUNTS = (1, 2, 3, 5)  # layers
KINDS = {"latent": {}, "absolute": {"relative": False, "eps": 0.01, "lr": 1e-3}, "realized": {"realized": True}, "gaussian": {"gaussian": True}}
LIGHT = ["q_proj", "v_proj"]


def write_latent(folder, layers, **how):
    """A latent checkpoint of `layers` layers of width 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": layers, "initializer_range": 0.1}
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": 6 * record["sentence"]}) + "\n" for record in sentences()))
    quantize_model(str(make_model(folder / "16", **sizes)), folder / "latent", "zeroqat", calibration=str(folder / "texts.jsonl"), samples=8,
                   max_length=32, device="cpu", **how)  # fmt: skip
    return str(folder / "latent")


@pytest.fixture(scope="module", params=[*((count, 2) for count in COUNTS), (3, 4)], ids=lambda given: f"{given[0]} layers W{given[1]}")
def pair(request, tmp_path_factory):
    """The same model twice: latents on the device, and streamed. Of 4 bits it is smoothed, with activations of 4."""
    count, bits = request.param
    how = {"bits": 2, "group_size": 32, "activations": 16} if bits == 2 else {"bits": 4, "activations": 4}
    path = write_latent(tmp_path_factory.mktemp("latents"), count, **how)
    loaded = [load_model(path, DEVICE, latent_layers=LIGHT) for _ in range(2)]
    loaded[1].stream = stream_latents(loaded[1].model, torch.device(DEVICE))
    return loaded


def batches(loaded, sizes=(16, 40)):
    """One batch per length, the lengths of two buckets."""
    made = []
    for seed, length in enumerate(sizes):
        rows = torch.randint(1, 250, (6, length), generator=torch.Generator().manual_seed(seed)).tolist()
        encoded = [Encoded((tuple(row),), (Option(0, length - 1, (3,)), Option(0, length - 1, (4,))), 0) for row in rows]
        made.append(collate(encoded, padding_id(loaded.tokenizer())).rounded().to(DEVICE))
    return made


def optimizer_of(loaded, directions=1, eps=0.4, lr=0.05, **options):
    target = Latent(loaded.fakes, loaded.folder.read, eps, lr, **options, stream=loaded.stream)
    return ZO([target], 7, directions, Clip(multiple=1.2), stacked=True, device=loaded.device)


def loss_of(loaded):
    return lambda parts, variants: sum(per_example_loss(loaded.model, part, variants).mean(1) for part in parts)


def run(loaded, given, capture, micro=False, between=lambda: None, **options):
    """What 12 steps measured and applied, and the tuned tensors: bytes; the weights are then those of the folder again."""
    optimizer = optimizer_of(loaded, **options)
    target = optimizer.targets[0]
    kept = {name: value.clone() for name, value in target.state().items()}
    graphs, records = Graphs(optimizer, loss_of(loaded), capture, loaded.rest), []
    for step in range(12):
        graphs.step(given if micro else [given[step // 2 % 2]])
        last = optimizer.last
        assert not last.skipped
        records.append((last.loss.tobytes(), last.projected.tobytes(), last.coefs.tobytes()))
        between()
    assert len(graphs.captured) == capture * (1 if micro else 2)
    state = {name: value.cpu().numpy().tobytes() for name, value in target.state().items()}
    assert all(state[name] != value.cpu().numpy().tobytes() for name, value in kept.items())
    target.load_state(kept)
    return records, state


@pytest.mark.parametrize("micro", [False, True], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_latents_on_the_device(pair, kind, micro):
    on_device, streamed = pair
    given = batches(on_device)
    expected = run(on_device, given, True, micro, **KINDS[kind])
    assert len(set(expected[0])) == 12
    for capture in (False, True):
        assert run(streamed, given, capture, micro, **KINDS[kind]) == expected


@torch.no_grad()
def test_what_runs_between_replays(pair):
    """Evaluations, statistics, and weights in any order see the last update, and leave the graphs what they need."""
    given, seen = batches(pair[0]), []

    def between(loaded, found):
        found.append(option_scores(loaded.model, given[0]).cpu())
        names = list(loaded.fakes)
        found.extend(loaded.fakes[name].effective_weight(torch.bfloat16).cpu() for name in (names[-1], names[0], names[len(names) // 2]))

    for loaded in pair:
        found = []
        seen.append((run(loaded, given, True, between=partial(between, loaded, found)), found))
    assert seen[0][0] == seen[1][0] and len(seen[0][1]) == len(seen[1][1]) == 48
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


def test_no_step_waits_for_the_device(pair):
    streamed = pair[1]
    given = batches(streamed)[:1]
    for capture in (False, True):
        optimizer = optimizer_of(streamed, lr=0.0)
        graphs = Graphs(optimizer, loss_of(streamed), capture, streamed.rest)
        step_without_waiting(graphs, given)
        assert optimizer.last.step == 6


def test_latents_are_page_locked(pair):
    on_device, streamed = pair
    for name, layer in streamed.fakes.items():
        assert layer.weight.device.type == "cpu" and layer.weight.is_pinned() and layer.weight.dtype == torch.float32 and layer.step.is_cuda
        assert layer.latent().is_cuda and torch.equal(layer.latent(), on_device.fakes[name].weight.data.float())


def allocated(make):
    """Bytes on the device that `make` leaves, and what it made."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    made = make()
    return torch.cuda.memory_allocated() - before, made


def test_memory_is_lower_by_the_latents(tmp_path):
    path = write_latent(tmp_path, 8, bits=2, group_size=32, activations=16)

    def load(offload):
        loaded = load_model(path, DEVICE, "auto", offload)
        return loaded, optimizer_of(loaded)

    plain, (loaded, _) = allocated(lambda: load("none"))
    latents = sum(4 * fake.weight.numel() for fake in loaded.fakes.values())
    embeddings = loaded.model.get_input_embeddings().weight.nbytes
    del loaded, _
    streamed, (loaded, _) = allocated(lambda: load("latents"))
    assert latents <= loaded.stream.bytes_per_forward < latents + 512 * len(loaded.fakes) and loaded.stream.device_bytes < latents / 3.9
    assert abs(plain - latents - embeddings + loaded.stream.device_bytes - streamed) < 1 << 20


def test_runs_write_the_same_records(tmp_path):
    """Streamed or not, stopped in the middle, and continued with the other value."""
    path, outcomes = write_latent(tmp_path, 3, bits=2, group_size=32, activations=16), []
    data = make_data(tmp_path / "data")
    for name, first, second in (("a", "none", "none"), ("b", "latents", "latents"), ("c", "latents", "none"), ("d", "none", "latents")):
        for offload in (first, second):
            keys = {"method": "zeroqat", "eps_mode": "relative_step", "eps": 0.4, "lr": 0.1, "stacked": True, "latent_layers": json.dumps(LIGHT),
                    "offload": offload, "steps": 30, "save_every": 10, "eval_every": 15, "micro_batch": 2, "device": "cuda", "dtype": "bf16",
                    "output_dir": tmp_path / name}  # fmt: skip
            tuner = Tuner(load_recipe(write_recipe(tmp_path / "r.yaml", path, data, **keys)), "test", "qzo tune")
            assert (tuner.loaded.stream is None) == (offload == "none") and tuner.graphs.capture
            if (tmp_path / name / "journal.bin").exists():
                tuner.run()
                continue
            launch = tuner.launch

            def launched(tuner=tuner, launch=launch):
                if tuner.optimizer.steps == 17:
                    raise Interrupted("here", 15, "")
                launch()

            tuner.launch = launched
            with pytest.raises(Interrupted):
                tuner.run()
        records = [(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in read_journal(tmp_path / name / "journal.bin")[1]]
        found = [(m["evaluation"], m["latent"]) for m in read_metrics(tmp_path / name / "metrics.jsonl") if "evaluation" in m]
        outcomes.append((records, found, newest_snapshot(tmp_path / name)[2]))
        assert len(records) == 30 and len(found) == 3
    assert all(other == outcomes[0] for other in outcomes[1:])
    assert main(["evaluate", str(tmp_path / "b")]) == 0
    assert main(["replay", str(tmp_path / "b"), "--verify"]) == 0
