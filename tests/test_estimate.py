"""The memory of a run before it: against measured peaks, against the tensors of loaded models, and what follows from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qzo_kernels.pack import tiled_words
from tiny_scripts import script

from qzo.cli import main
from qzo.estimate import PHASES, Linear, Shapes, Work, estimate
from qzo.fit import Fit, evaluation_size
from qzo.inputs import load_data, quantized_folder
from qzo.journal import read_journal
from qzo.model.gptq_format import GptqConfig
from qzo.model.load import load_model, load_tokenizer
from qzo.model.zeroqat_format import LatentConfig
from qzo.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
LLAMA_13B = Shapes(
    tuple([Linear(5120, 5120)] * 4 + [Linear(13824, 5120)] * 2 + [Linear(5120, 13824)]) * 40, {"model.embed_tokens.weight": 32000 * 5120, "lm_head.weight": 32000 * 5120, "norms": 81 * 5120},
    GptqConfig(4, 128),
    {"hidden_size": 5120, "num_attention_heads": 40, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000},
)  # fmt: skip


def measured() -> list[dict]:
    rows = json.loads((ROOT / "results/memory-h200.json").read_text())["rows"]
    return [row for row in rows if "estimate / peak" in row]


def shapes_of(row: dict) -> Shapes:
    """Of a model of scripts/make_random_model, as qzo sees the folder."""
    known = script("make_random_model")
    config, linears, latents, others = known.model_config(row["model"], None), [], [], {}
    for name, shape, _ in known.shapes(config):
        if "proj" in name:
            moves = "method=zeroqat" in row["keys"] and name.split(".")[-2] in ("q_proj", "v_proj")
            (latents if moves else linears).append(Linear(*shape, int(name.split(".")[2])))
        elif "embed_tokens" not in name or "offload" not in row["keys"]:
            others[name] = torch.Size(shape).numel()
    quantization = (LatentConfig if latents else GptqConfig)(row["bits"], 128)
    return Shapes(tuple(linears), others, quantization, config, "offload=codes" in row["keys"], "offload" in row["keys"],
                  latents=tuple(latents), latents_streamed="offload=latents" in row["keys"])  # fmt: skip


@pytest.mark.parametrize("row", measured(), ids=lambda row: "-".join(str(row[key]) for key in ("model", "bits", "size", "limit_gb", "keys")))
def test_estimate_is_near_the_measured_peak(row):
    """Within a twentieth, of whole runs on an H200; asked is a tenth."""
    length, micro, variants = int(row["size"].split("x")[1]), int(row["micro"]), 2 if "stacked" in row["keys"] else 1
    step = Work(micro, length, 4 * micro, variants)
    examples = min(evaluation_size(replace(step, rows=1), micro, variants), script("bench_memory").EVALUATED)
    found = estimate(shapes_of(row), step, Work(examples, length, 4 * examples), torch.bfloat16, "cuda")
    assert abs(found.peak / 1e9 / row["peak_gb"] - 1) < 1 / 20



def light_13b(offload: str) -> Shapes:
    """Llama-2-13B of 2 bits, the latents of two Linears in each layer."""
    return shapes_of({"model": "llama-2-13b", "bits": 2, "keys": f"method=zeroqat {offload}"})


@pytest.mark.parametrize("size", [(1, 64), (16, 64)], ids=["1x64", "16x64"])
def test_streamed_latents_leave_the_device(size):
    """Those of two layers are there; the paper has 6.8 GB for all of it."""
    rows, length = size
    work = Work(rows, length, rows, 2)
    streamed, whole = (estimate(light_13b(offload), work, work, torch.bfloat16, "cuda") for offload in ("offload=latents", ""))
    host = light_13b("offload=latents").host_latents()
    assert len(host) == 40 and set(host.values()) == {2 * 4 * 5120 * 5120} and not light_13b("").host_latents()
    assert streamed.phases["step"]["latents"] == 2 * 2 * 4 * 5120 * 5120 and whole.phases["step"]["latents"] == sum(host.values())
    assert streamed.peak < 6.8e9 < sum(host.values()) + streamed.phases["step"]["codes"] < whole.peak
    # Of the last layer what is packed, as it was read, and one matrix, its quotient and its codes in fp32; the head and the buffers come later.
    read = (2 + 24 / 128) * (2 * 5120 * 5120 + 3 * 13824 * 5120) + 12 * 13824 * 5120
    later = streamed.phases["load"]["latents"] + streamed.phases["load"]["embeddings, norms, head"]
    assert streamed.phases["load"]["a layer being packed"] == read - later and whole.phases["load"]["a layer being packed"] == 0


def folders(shared: Path) -> list[Path]:
    return sorted(path for path in (shared / "models" / "gptq-fixtures").iterdir() if (path / "config.json").exists())


def test_weights_are_those_of_a_loaded_model(shared):
    """To the byte, for every kind of checkpoint (on a CPU, where tensors take what they hold)."""
    assert len(folders(shared)) >= 5
    for path in folders(shared):
        loaded = load_model(str(path), "cpu", "fp32")
        found = estimate(Shapes.of(loaded.folder, loaded.config), Work(1, 8, 1), Work(1, 8, 1), torch.float32, "cpu").phases["load"]
        layers = loaded.layers.values()
        assert found["codes"] == sum(layer.codes.nbytes for layer in layers), path.name
        assert found["scales"] == sum(layer.scales.nbytes for layer in layers)
        held = {id(p): p.nbytes for name, p in loaded.model.named_parameters() if not name.endswith(".scales")}
        biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
        assert found["embeddings, norms, head"] - sum(held.values()) in (0, biases), path.name


def test_levels_of_a_table_go_through_the_scratch():
    """The fused product takes none, however few the rows are."""
    table = replace(LLAMA_13B, quantization=replace(LLAMA_13B.quantization, codebook=True))
    plain, found = (estimate(shapes, Work(1, 64, 1), Work(1, 64, 1), torch.bfloat16, "cuda") for shapes in (LLAMA_13B, table))
    assert plain.phases["step"]["scratch"] == 0 and found.phases["step"]["scratch"] == 13824 * 5120 * 2
    assert plain.phases["load"]["codes"] == found.phases["load"]["codes"]


def test_parts_follow_the_work():
    one = estimate(LLAMA_13B, Work(1, 64, 1), Work(1, 64, 1), torch.bfloat16, "cuda")
    many = estimate(LLAMA_13B, Work(16, 256, 16, 2), Work(16, 256, 16), torch.bfloat16, "cuda")
    assert set(one.phases) == set(PHASES) and one.total("load") < one.total("export") < one.total("load") * 1.01
    assert one.phases["step"]["scratch"] == 0 and many.phases["step"]["scratch"] == 13824 * 5120 * 2
    assert many.phases["step"]["activations"] > 60 * one.phases["step"]["activations"]
    assert many.phases["snapshot"]["CUDA graphs"] == many.phases["step"]["activations"] + many.phases["step"]["logits"]
    assert many.peak == many.total("evaluate") > many.total("step") > many.total("load") > one.total("load") - 1
    eager = estimate(LLAMA_13B, Work(16, 256, 16, 2), Work(16, 256, 16), torch.bfloat16, "cuda", captured=False)
    assert "CUDA graphs" not in eager.phases["evaluate"] and eager.peak < many.peak
    two_bits = Shapes(LLAMA_13B.linears, LLAMA_13B.others, GptqConfig(2, 128), LLAMA_13B.config)
    halved = estimate(two_bits, Work(1, 64, 1), Work(1, 64, 1), torch.bfloat16, "cpu").phases["load"]["codes"]
    assert halved == sum(4 * linear.rows * tiled_words(linear.cols, 2) for linear in LLAMA_13B.linears)


@pytest.fixture
def fit(recipe, monkeypatch):
    def make(available: int | None, *overrides: str) -> Fit:
        monkeypatch.setattr("qzo.fit.available", lambda *_: available)
        loaded = load_recipe(recipe, overrides)
        folder, quantization = quantized_folder(loaded)
        train, validation, task = load_data(loaded, load_tokenizer(folder), folder.fit_length(loaded.max_length))
        return Fit(loaded, folder, quantization, train, len(validation), task.generation)

    return make


def test_micro_batch_is_the_largest_half_that_fits(fit):
    assert fit(None, "batch_size=16").micro == 16 and fit(1 << 40, "batch_size=16").micro == 16
    large = ("batch_size=16", "stacked=true", "directions=16")
    probe = fit(None, *large)
    for size in (8, 4):
        assert fit(probe.estimate(size).peak, *large).micro == size
    assert fit(1, "batch_size=16").micro == 1 and fit(1, "batch_size=16", "micro_batch=6").micro == 6


def test_advice_names_what_saves_most(fit):
    found = fit(None, "batch_size=16", "stacked=true", "directions=4").savings()
    assert {name for name, _ in found} >= {"micro_batch=8", "stacked=false"}
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True) and found[-1][1] > 0
    assert fit(None, "batch_size=1").advice().count("less") <= 2


def test_evaluation_takes_no_more_than_a_step(fit):
    one = fit(None).one
    assert evaluation_size(one, 1000, 2) == 2000
    assert 1 <= evaluation_size(one, 1, 1) <= 384 // 16


def test_too_large_is_exit_code_3_before_the_weights(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qzo.fit.available", lambda *_: 12345)
    monkeypatch.setattr("qzo.tune.load_base", lambda *_: pytest.fail("loaded"))
    assert main(["tune", recipe]) == 3
    err = capsys.readouterr().err
    assert err.startswith("qzo tune: device memory: about 0.0") and "the 0.00 GB available" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main(["tune", recipe, "--dry-run"]) == 3
    out, err = capsys.readouterr()
    assert "together" in out and all(phase in out for phase in PHASES) and "device memory: about" in err


def test_a_run_out_of_memory_says_the_numbers_and_goes_on_in_smaller_pieces(recipe, tmp_path, monkeypatch, capsys):
    assert main(["tune", recipe, "steps=4", f"output_dir={tmp_path / 'whole'}"]) == 0
    original, calls = __import__("qzo.tune").tune.per_example_loss, []

    def sometimes(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return original(*args)

    monkeypatch.setattr("qzo.tune.per_example_loss", sometimes)
    capsys.readouterr()
    assert main(["tune", recipe, "steps=4"]) == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert "Tried to allocate 2.00 GiB" in err and "GB estimated" in err and "with another micro_batch or stacked" in err
    assert main(["tune", recipe, "steps=4", "micro_batch=1"]) == 0
    assert "warning: micro_batch was 4 and is 1 from here on" in capsys.readouterr().err
    found, expected = (read_journal(tmp_path / name / "journal.bin")[1] for name in ("run", "whole"))
    assert [r.step for r in found] == [0, 1, 2, 3] and [r.loss for r in found[:2]] == [r.loss for r in expected[:2]]
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours.loss - theirs.loss) < 1e-4
