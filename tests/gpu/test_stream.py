"""Codes in host memory on a CUDA device: the bits of a model whose codes are on it, eager, captured and evaluated, in less memory."""

import gc
from functools import partial

import pytest
import torch
from tiny_runs import make_model, step_without_waiting

from qzo.cli import main
from qzo.data.batches import collate
from qzo.data.encode import Encoded, Option, encode_examples, padding_id
from qzo.data.loss import option_scores, per_example_loss
from qzo.data.tasks import get_task, load_examples
from qzo.journal import read_journal
from qzo.metrics import read_metrics
from qzo.model.load import load_model
from qzo.model.stream import stream_codes
from qzo.quantize import quantize_model
from qzo.recipe import load_recipe
from qzo.tune import Tuner
from qzo.zo.estimator import Clip
from qzo.zo.graph import Graphs
from qzo.zo.optimizer import ZO
from qzo.zo.targets.dense import Dense
from qzo.zo.targets.scales import Scales

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODEL = "models/reviews-llama-32m-gptq-w4g128"
COUNTS = (1, 2, 3, 4, 7)  # layers
KINDS = {
    "stacked": {"stacked": True}, "separate": {}, "stacked directions": {"stacked": True, "directions": 2},
    "dense": {"dense": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=COUNTS)
def pair(request, tmp_path_factory):
    """The same model twice: codes on the device, and streamed."""
    folder = tmp_path_factory.mktemp("stream")
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": request.param, "initializer_range": 0.1}
    quantize_model(str(make_model(folder / "16", **sizes)), folder / "4", "rtn", 4, 128, device="cpu")
    loaded = [load_model(str(folder / "4"), DEVICE) for _ in range(2)]
    loaded[1].stream = stream_codes(loaded[1].model, torch.device(DEVICE))
    return loaded


def batches(loaded, sizes=(16, 40)):
    """One batch per length, the lengths of two buckets."""
    tokenizer, made = loaded.tokenizer(), []
    for seed, length in enumerate(sizes):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randint(1, 250, (6, length), generator=draw).tolist()
        encoded = [Encoded((tuple(row),), (Option(0, length - 1, (3,)), Option(0, length - 1, (4,))), 0) for row in rows]
        made.append(collate(encoded, padding_id(tokenizer)).rounded().to(DEVICE))
    return made


def run(loaded, given, capture, micro=False, stacked=False, dense=False, directions=1, between=lambda: None):
    """What 12 steps measured and applied, and the tuned tensors: bytes; the model is left as it was."""
    kept = {name: tensor.data.clone() for name, tensor in loaded.model.named_parameters()}
    targets = [Scales(loaded.layers, 0.05, 0.01)]
    if dense:
        targets.append(Dense(loaded.model, loaded.folder.read, 1e-3, 1e-3))
    optimizer = ZO(targets, 7, directions, Clip(multiple=1.2), stacked)

    def loss(parts, variants):
        return sum(per_example_loss(loaded.model, part, variants).mean(1) for part in parts)

    graphs, records = Graphs(optimizer, loss, capture, loaded.rest), []
    for step in range(12):
        graphs.step(given if micro else [given[step // 2 % 2]])
        last = optimizer.last
        assert not last.skipped
        records.append((last.loss.tobytes(), last.projected.tobytes(), last.coefs.tobytes()))
        between()
    assert len(graphs.captured) == capture * (1 if micro else 2)
    state = {name: t.cpu().numpy().tobytes() for target in targets for name, t in target.state().items()}
    for name, tensor in loaded.model.named_parameters():
        tensor.data.copy_(kept[name])
    return records, state


@pytest.mark.parametrize("micro", [False, True], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_codes_on_the_device(pair, kind, micro):
    on_device, streamed = pair
    given = batches(on_device)
    expected = run(on_device, given, True, micro, **KINDS[kind])
    assert len(set(expected[0])) == 12
    for capture in (False, True):
        assert run(streamed, given, capture, micro, **KINDS[kind]) == expected


@torch.no_grad()
def test_forwards_between_replays(pair):
    """Evaluations, weights and layers in any order leave the graphs what they need, and get what they need."""
    on_device, streamed = pair
    given = batches(on_device)
    scores, wrong = option_scores(on_device.model, given[0]), []
    names = list(streamed.layers)

    def between():
        wrong.append(not torch.equal(option_scores(streamed.model, given[0]), scores))
        for name in (names[-1], names[0], names[len(names) // 2]):
            wrong.append(not torch.equal(streamed.layers[name].weight(torch.bfloat16), on_device.layers[name].weight(torch.bfloat16)))

    expected = run(on_device, given, True, stacked=True)
    assert run(streamed, given, True, between=partial(untuned, streamed, between), stacked=True) == expected
    assert wrong and not any(wrong)


def untuned(loaded, work):
    """`work()` under the scales of the folder, the tuned ones put back after it."""
    tuned = {name: layer.scales.data.clone() for name, layer in loaded.layers.items()}
    for name, layer in loaded.layers.items():
        layer.scales.data.copy_(loaded.folder.read(f"{name}.scales").t())
    work()
    for name, layer in loaded.layers.items():
        layer.scales.data.copy_(tuned[name])


@torch.no_grad()
def test_transformers_own_forward_and_generation(pair):
    on_device, streamed = pair
    ids = batches(on_device)[1].input_ids
    for _ in range(2):
        assert torch.equal(*(one.model(input_ids=ids, use_cache=False).logits for one in pair))
        assert torch.equal(*(one.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True) for one in pair))


def test_no_step_waits_for_the_device(pair):
    streamed = pair[1]
    given = batches(streamed)[:1]
    for capture in (False, True):
        optimizer = ZO([Scales(streamed.layers, 0.05, 0.0)], stacked=True)
        graphs = Graphs(optimizer, lambda parts, variants: per_example_loss(streamed.model, parts[0], variants).mean(1), capture, streamed.rest)
        step_without_waiting(graphs, given)
        assert optimizer.last.step == 6


def test_codes_are_page_locked_and_never_written(pair):
    on_device, streamed = pair
    run(streamed, batches(streamed), True, stacked=True)
    for name, layer in streamed.layers.items():
        assert layer.codes.device.type == "cpu" and layer.codes.is_pinned() and layer.scales.is_cuda
        assert torch.equal(layer.codes, on_device.layers[name].codes.cpu())


def test_a_capture_that_does_not_begin_at_rest_is_refused(pair):
    streamed, given = pair[1], batches(pair[1])[:1]
    for capture in (False, True):
        graphs = Graphs(
            ZO([Scales(streamed.layers, 0.05, 0.0)], stacked=True),
            lambda parts, variants: per_example_loss(streamed.model, parts[0], variants).mean(1), capture,
        )  # fmt: skip
        graphs.step(given)
    with pytest.raises(RuntimeError, match=r"call rest\(\), then capture"):
        graphs.step(given)
    torch.cuda.synchronize()
    assert torch.equal(option_scores(streamed.model, given[0]), option_scores(pair[0].model, given[0]))


def allocated(make):
    """Bytes on the device that `make` leaves, the most on the way there, and what it made."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = make()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before, made


def test_memory_is_lower_by_the_codes(shared):
    """Two layers' codes on the device, also while loading, beside what unpacks a weight."""
    slack = 1 << 20
    plain, peak, loaded = allocated(lambda: load_model(str(shared / MODEL), DEVICE))
    codes = sum(4 * layer.codes.numel() for layer in loaded.layers.values())
    del loaded
    streamed, streamed_peak, loaded = allocated(lambda: load_model(str(shared / MODEL), DEVICE, "auto", "codes"))
    stream = loaded.stream
    assert codes <= stream.bytes_per_forward < codes + 512 * len(loaded.layers)
    assert stream.device_bytes < codes // 3
    assert abs(plain - codes + stream.device_bytes - streamed) < slack
    assert streamed_peak <= peak - codes + stream.device_bytes + slack


def test_runs_write_the_same_records(shared, tmp_path):
    """Streamed or not, and continued with the other value after an evaluation in the middle."""
    journals = []
    for name, first, second in (("a", "none", "none"), ("b", "codes", "codes"), ("c", "codes", "none"), ("d", "none", "codes")):
        for offload in (first, second):
            recipe = load_recipe("qzo-reviews-llama-32m-w4", [
                f"model={shared / MODEL}", f"data={shared / 'data/sst2'}", "train_examples=100", "eval_examples=32", "steps=40",
                "save_every=15", "eval_every=20", f"output_dir={tmp_path / name}", "stacked=true", "micro_batch=8", f"offload={offload}",
            ])  # fmt: skip
            tuner = Tuner(recipe, "test", "qzo tune")
            assert (tuner.loaded.stream is None) == (offload == "none") and tuner.graphs.capture
            if not (tmp_path / name / "journal.bin").exists():
                launch = tuner.launch

                def launched(tuner=tuner, launch=launch):
                    if tuner.optimizer.steps == 23:
                        raise RuntimeError("stopped")
                    launch()

                tuner.launch = launched
                with pytest.raises(RuntimeError, match="stopped"):
                    tuner.run()
            else:
                tuner.run()
        records = read_journal(tmp_path / name / "journal.bin")[1]
        scores = [m["evaluation"] for m in read_metrics(tmp_path / name / "metrics.jsonl") if "evaluation" in m]
        journals.append(([(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in records], scores))
        assert len(records) == 40 and len(scores) == 3
    assert all(other == journals[0] for other in journals[1:])


def test_a_streamed_run_is_evaluated_and_exported(shared, tmp_path, capsys):
    command = ["tune", "qzo-reviews-llama-32m-w4", f"model={shared / MODEL}", f"data={shared / 'data/sst2'}", "train_examples=100",
               "eval_examples=64", "steps=20", "stacked=true", "offload=codes", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(command) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "logits equal" in capsys.readouterr().out


@torch.no_grad()
def test_examples_score_the_same(shared):
    loaded = [load_model(str(shared / MODEL), DEVICE, "auto", offload) for offload in ("none", "codes")]
    task = get_task("sst2")
    encoded, _ = encode_examples(load_examples(task, shared / "data/sst2", "train", 64), loaded[0].tokenizer(), 128)
    for start in range(0, 64, 16):
        batch = collate(encoded[start : start + 16], padding_id(loaded[0].tokenizer())).to(DEVICE)
        assert torch.equal(*(option_scores(one.model, batch) for one in loaded))
