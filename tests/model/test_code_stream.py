"""Codes in host memory: every use sees its layer's codes in whatever order a GPU runs its queues, and models compute the same bits."""

from types import SimpleNamespace

import pytest
import torch
from tiny_lanes import AtOnce, Queues
from tiny_models import OPT, SIZES, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from qzo.model.decoder import decode, is_plain
from qzo.model.files import Folder
from qzo.model.gptq_format import read_config
from qzo.model.load import swap_quantized, load_model, skeleton
from qzo.model.stream import CodeStream, stream_codes
from qzo.quantize import quantize_model

CPU = torch.device("cpu")


def made(count, seed=0, **broken):
    """Layers of two Linears with codes of several sizes, their stream, and a forward that uses them in the order given."""
    layers = [[SimpleNamespace(codes=torch.full((2, 3 + 70 * (i % 3) + j), 10 * i + j, dtype=torch.int32)) for j in range(2)] for i in range(count)]
    expected = [[linear.codes.clone() for linear in layer] for layer in layers]
    queues = Queues(seed, **broken)
    stream = CodeStream(layers, CPU, queues)

    def forward(order=range(count)):
        for i in order:
            for linear, right in zip(layers[i], expected[i], strict=True):
                queues.use(linear.source(), right)

    return queues, stream, forward, layers, expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_use_sees_its_own_codes(count):
    """Forwards in the order of the layers, in any order, and rests between them."""
    for seed in range(30):
        queues, stream, forward, layers, expected = made(count, seed)
        for _ in range(6):
            forward()
            if queues.rng.random() < 0.5:
                stream.rest()
            if queues.rng.random() < 0.5:
                forward([queues.rng.randrange(count) for _ in range(5)])
            if queues.rng.random() < 0.3:
                queues.run()
        queues.run()
        assert queues.wrong == 0
        assert all(torch.equal(a.codes, b) for layer, right in zip(layers, expected, strict=True) for a, b in zip(layer, right, strict=True))


@pytest.mark.parametrize("queue", ["compute", "side"])
def test_without_the_waits_of_a_queue_wrong_codes_are_seen(queue):
    wrong = 0
    for seed in range(10):
        queues, _, forward, _, _ = made(5, seed, **{queue: True})
        forward()
        forward()
        queues.run()
        wrong += queues.wrong
    assert wrong


def test_the_order_of_operations():
    """Layer i + 1 is copied over layer i - 1 once that is done, while layer i is used."""
    queues, stream, forward, _, _ = made(4)
    stream.rest()
    queues.run()
    forward()
    kinds = [operation[0] for operation in queues.queues["compute"]]
    use = ["use"] * 4
    assert kinds == ["record", *use, "wait", "record", *use, "wait", "record", *use, "wait", "record", *use]
    assert [operation[0] for operation in queues.queues["side"]] == ["wait", "begin", "end", "record"] * 4
    side, compute = queues.queues["side"], queues.queues["compute"]
    recorded = [operation[1] for operation in compute if operation[0] == "record"]
    assert [operation[1] for operation in side if operation[0] == "wait"] == recorded
    assert [operation[1] for operation in compute if operation[0] == "wait"] == [op[1] for op in side if op[0] == "record"][:3]
    targets = [operation[1].data_ptr() for operation in side if operation[0] == "end"]
    assert targets[0] == targets[2] != targets[1] == targets[3]


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_every_byte_crosses_the_bus_once_per_forward(count, forwards):
    queues, stream, forward, layers, _ = made(count)
    stream.rest()
    for _ in range(3):
        queues.copies.clear()
        for _ in range(forwards):
            forward()
        stream.rest()
        assert len(queues.copies) == forwards * count and 4 * sum(queues.copies) == forwards * stream.bytes_per_forward
    words = sum(linear.codes.numel() for layer in layers for linear in layer)
    assert 4 * words <= stream.bytes_per_forward < 4 * (words + 128 * 2 * count)
    assert stream.device_bytes == 2 * 4 * max(queues.copies)


def replayed(count, forwards, seed, rests=True):
    """Two graphs, and forwards of other orders before, between and after their replays; the number of wrong codes seen."""
    queues, stream, forward, _, _ = made(count, seed)
    graphs = []

    def step():
        for _ in range(forwards):
            forward()
        stream.rest()

    for _ in range(12):
        if rests or len(graphs) < 2:
            stream.rest()
        if len(graphs) < 2:
            graphs.append(queues.capture(step))
        queues.replay(queues.rng.choice(graphs))
        if queues.rng.random() < 0.5:
            forward(range(queues.rng.randint(1, count)))
        if queues.rng.random() < 0.2:
            queues.run()
    queues.run()
    return queues.wrong


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("forwards", [1, 2])
def test_captured_steps_and_what_runs_between_them(count, forwards):
    assert sum(replayed(count, forwards, seed) for seed in range(10)) == 0


def test_replays_that_do_not_begin_at_rest_see_wrong_codes():
    assert sum(replayed(5, 1, seed, rests=False) for seed in range(10))


def test_a_capture_begins_at_rest_and_one_that_failed_is_forgotten():
    queues, stream, forward, _, _ = made(5)
    forward()
    with pytest.raises(RuntimeError, match=r"call rest\(\), then capture"):
        queues.capture(forward)
    stream.rest()
    with pytest.raises(AssertionError, match="not joined"):
        queues.capture(lambda: forward([0, 1, 2]))
    forward([2, 3, 4, 0])
    stream.rest()
    queues.run()
    assert queues.wrong == 0


def write(folder, family, layers):
    torch.manual_seed(layers)
    sizes = SIZES | (OPT if family == "opt" else {}) | {"num_hidden_layers": layers}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, initializer_range=0.2)).half().save_pretrained(folder / "16")
    byte_tokenizer().save_pretrained(folder / "16")
    quantize_model(str(folder / "16"), folder / "4", "rtn", 4, 32, sym=False, format="gptq_v2", device="cpu")
    return str(folder / "4")


@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("llama", 2), ("llama", 3), ("qwen3", 4), ("opt", 3)])
@torch.no_grad()
def test_models_compute_the_same_bits(family, layers, tmp_path, monkeypatch):
    path = write(tmp_path, family, layers)
    plain, streamed = load_model(path, "cpu", "fp32"), load_model(path, "cpu", "fp32")
    lanes = AtOnce()
    monkeypatch.setattr("qzo.model.stream.Lanes", lambda device: lanes)
    stream = stream_codes(streamed.model, CPU)
    assert all(layer.source for layer in streamed.layers.values()) and is_plain(plain.model, 20) == (family != "opt")
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for compute in (
            lambda model: decode(model, ids), lambda model: model(input_ids=ids, use_cache=False).logits,
            lambda model: model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True),
        ):  # fmt: skip
            assert torch.equal(compute(streamed.model), compute(plain.model))
        for name in reversed(streamed.layers):
            assert torch.equal(streamed.layers[name].weight(torch.float32), plain.layers[name].weight(torch.float32))
            assert torch.equal(streamed.layers[name].codes, plain.layers[name].codes)
        stream.rest()
    assert lanes.fetched > 3 * 6 * layers or layers < 3


def test_on_a_cpu_nothing_changes(tmp_path):
    path = write(tmp_path, "llama", 3)
    loaded = [load_model(path, "cpu", "fp32", offload) for offload in ("none", "codes")]
    assert loaded[1].stream is None and all(layer.source is None for layer in loaded[1].layers.values())
    loaded[1].rest()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(*(decode(one.model, ids) for one in loaded))
