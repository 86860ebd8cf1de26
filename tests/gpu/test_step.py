"""A step on a CUDA device: the same bits launched one by one, as a captured graph, and after a resume; and nobody waits for it."""

import gc
import weakref
from functools import partial

import pytest
import torch
from tiny_runs import write_recipe

from qzo.data.batches import collate
from qzo.data.encode import encode_examples, padding_id
from qzo.data.loss import per_example_loss
from qzo.data.tasks import get_task, load_examples
from qzo.journal import read_journal
from qzo.model.decoder import decode, is_plain
from qzo.model.load import load_model
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo import graph as module
from qzo.zo.estimator import Clip
from qzo.zo.graph import Graphs
from qzo.zo.optimizer import ZO
from qzo.zo.targets.dense import Dense
from qzo.zo.targets.scales import Scales

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODEL = "models/reviews-llama-32m-gptq-w4g128"
STEPS, RESUME = 30, 13


@pytest.fixture(scope="module")
def loaded(shared):
    return load_model(str(shared / MODEL), DEVICE)


@pytest.fixture(scope="module")
def batches(shared, loaded):
    """On the host, in three buckets."""
    tokenizer, task = loaded.tokenizer(), get_task("sst2")
    encoded, _ = encode_examples(load_examples(task, shared / "data/sst2", "train", 120), tokenizer, 128)
    encoded.sort(key=lambda example: max(map(len, example.rows)))
    found = {}
    for start in range(0, 120, 8):
        batch = collate(encoded[start : start + 8], padding_id(tokenizer)).rounded()
        found[batch.input_ids.shape] = batch
    assert len(found) >= 3
    return list(found.values())[:3]


@pytest.fixture
def fresh(loaded):
    """The model's parameters are put back before every run and at the end."""
    kept = {name: tensor.data.clone() for name, tensor in loaded.model.named_parameters()}

    def put_back():
        for name, tensor in loaded.model.named_parameters():
            tensor.data.copy_(kept[name])

    yield put_back
    put_back()


def graphs_of(loaded, stacked=False, dense=False, directions=1, capture=True):
    targets = [Scales(loaded.layers, 0.05, 0.01)]
    if dense:
        targets.append(Dense(loaded.model, loaded.folder.read, 1e-3, 1e-3))
    optimizer = ZO(targets, 7, directions, Clip(multiple=1.2), stacked)

    def loss(given, variants):
        return sum(per_example_loss(loaded.model, batch, variants).mean(1) for batch in given)

    return Graphs(optimizer, loss, capture)


def outcome(loaded, batches, make, resume=None):
    """What every step measured and applied, and the tuned tensors: bytes."""
    graphs, records = make(), []
    for step in range(STEPS):
        if step == resume:
            saved, state = graphs.optimizer.state_dict(), [target.state() for target in graphs.optimizer.targets]
            graphs = make()
            graphs.optimizer.load_state_dict(saved)
            for target, tensors in zip(graphs.optimizer.targets, state, strict=True):
                target.load_state(tensors)
        for group in graphs.optimizer.param_groups:
            group["lr"] *= 0.95
        loss = graphs.step([batches[step // 2 % 3].to(DEVICE)])
        last = graphs.optimizer.last
        assert last.step == step and last.loss == loss.item() and not last.skipped
        records.append((last.loss.tobytes(), last.projected.tobytes(), last.coefs.tobytes(), last.clipped))
    state = {name: t.cpu().numpy().tobytes() for target in graphs.optimizer.targets for name, t in target.state().items()}
    return records, state, graphs


KINDS = {
    "separate": {}, "stacked": {"stacked": True}, "three directions": {"directions": 3},
    "stacked directions": {"stacked": True, "directions": 2}, "dense": {"dense": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_eager_captured_and_resumed_steps_have_the_same_bits(loaded, batches, fresh, kind):
    outcomes = []
    for capture, resume in ((False, None), (True, None), (True, None), (True, RESUME)):
        fresh()
        records, state, graphs = outcome(loaded, batches, partial(graphs_of, loaded, capture=capture, **KINDS[kind]), resume)
        assert len(graphs.captured) == (3 if capture else 0)
        outcomes.append((records, state))
    assert all(other == outcomes[0] for other in outcomes[1:])
    assert len({record[:2] for record in outcomes[0][0]}) == STEPS and any(record[3] for record in outcomes[0][0])


def test_dropped_graphs_are_captured_again_with_the_same_bits(loaded, batches, fresh, monkeypatch):
    outcomes = []
    for most in (16, 1):
        monkeypatch.setattr(module, "MAX_GRAPHS", most)
        fresh()
        graphs = graphs_of(loaded)
        for index in (0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 1, 2):
            graphs.step([batches[index].to(DEVICE)])
        assert len(graphs.captured) == (3 if most == 16 else 1)
        outcomes.append([target.state()["model.layers.0.self_attn.q_proj/scales"].clone() for target in graphs.optimizer.targets])
    assert torch.equal(*(state[0] for state in outcomes))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_no_step_waits_for_the_device(loaded, batches, fresh, capture, stacked):
    graphs = graphs_of(loaded, stacked, capture=capture)
    for _ in range(2):
        graphs.step([batches[0].to(DEVICE)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = []
        for _ in range(5):
            loss = graphs.step([batches[0].to(DEVICE)])
            pending.append(graphs.optimizer.newest)
        with pytest.raises(RuntimeError, match="synchronizing"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    records = [measured.read() for measured in pending]
    assert [record.step for record in records] == [2, 3, 4, 5, 6] and len({record.loss for record in records}) == 5


def test_micro_batches_are_part_of_one_graph(loaded, batches, fresh):
    outcomes = []
    for capture in (False, True):
        fresh()
        graphs = graphs_of(loaded, capture=capture)
        losses = [graphs.step([batch.to(DEVICE) for batch in batches]).item() for _ in range(4)]
        outcomes.append(losses)
        assert len(graphs.captured) == int(capture)
    assert outcomes[0] == outcomes[1]


class Garbage:
    """Not reachable and in a cycle; what is called when it goes waits for the device, as to unlock an earlier run's host memory does."""

    def __init__(self, gone):
        self.itself = self
        weakref.finalize(self, lambda: (torch.cuda.synchronize(), gone.append(True)))


def test_garbage_of_before_does_not_end_a_capture(loaded, batches, fresh, monkeypatch):
    gone, eager = [], module.Graphs._eager

    def with_garbage(graphs, given):
        eager(graphs, given)
        if torch.cuda.is_current_stream_capturing():
            Garbage(gone)
            [[] for _ in range(5000)]  # more objects than the collector begins after

    monkeypatch.setattr(module.Graphs, "_eager", with_garbage)
    graphs = graphs_of(loaded)
    for _ in range(3):
        graphs.step([batches[0].to(DEVICE)])
    assert len(graphs.captured) == 1 and gc.isenabled()
    gc.collect()
    assert gone == [True]


def test_replays_take_no_more_memory(loaded, batches, fresh):
    graphs = graphs_of(loaded)
    for index in (0, 0, 1, 1, 2, 2, 0, 1, 2):
        graphs.step([batches[index].to(DEVICE)])
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for step in range(60):
        graphs.step([batches[step % 3].to(DEVICE)])
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before and len(graphs.captured) == 3


@torch.no_grad()
def test_the_decoder_is_that_of_transformers(loaded, batches):
    for batch in batches:
        input_ids = batch.input_ids.to(DEVICE)
        assert is_plain(loaded.model, input_ids.shape[1])
        expected = loaded.model.get_decoder()(input_ids=input_ids, use_cache=False)[0].float()
        found = decode(loaded.model, input_ids).float()
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("keys", [["stacked=true"], ["stacked=false", "dense=true", "dense_lr=1e-3", "dense_eps=1e-3"], ["micro_batch=5"]])
def test_runs_with_and_without_graphs_write_the_same_records(shared, tmp_path, keys):
    journals = []
    for name, capture in (("eager", False), ("captured", True), ("again", True)):
        recipe = load_recipe("qzo-reviews-llama-32m-w4", [
            f"model={shared / MODEL}", f"data={shared / 'data/sst2'}", "train_examples=100", "eval_examples=32",
            "steps=40", "save_every=15", "eval_every=20", f"output_dir={tmp_path / name}", *keys,
        ])  # fmt: skip
        tuner = Tuner(recipe, "test", "qzo tune", capture=capture)
        tuner.run()
        records = read_journal(tmp_path / name / "journal.bin")[1]
        journals.append([(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in records])
        assert len(records) == 40 and bool(tuner.graphs.captured) == capture and tuner.late == 1
    assert journals[0] == journals[1] == journals[2]


def test_embeddings_on_the_host_measure_the_same(llama4, sentiment, tmp_path):
    found = []
    for offload in ("none", "embeddings"):
        keys = {"device": "cuda", "dtype": "bf16", "stacked": True, "offload": offload, "output_dir": str(tmp_path / offload)}
        tuner = Tuner(load_recipe(write_recipe(tmp_path / f"{offload}.yaml", llama4, sentiment, **keys)), "test", "qzo tune")
        tuner.run()
        assert bool(tuner.graphs.captured) and bool(tuner.loaded.embedding) == (offload != "none")
        found.append([(r.loss.tobytes(), r.coefs.tobytes()) for r in read_journal(tmp_path / offload / "journal.bin")[1]])
    assert found[0] == found[1]
