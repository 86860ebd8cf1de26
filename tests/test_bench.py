"""The benchmarks' own arithmetic, on a CPU: what they compute from times, what they compare with, and when they refuse."""

import csv
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from qzo_kernels import ops, reference
from tiny_lanes import AtOnce
from tiny_scripts import script

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GREEN = f"# NVIDIA H200, commit {COMMIT}: pytest tests/kernels\n....\n4 passed, 1 deselected in 2.00s\n"


common, report, cases, rivals, models = map(script, ("bench_common", "bench_report", "bench_cases", "bench_rivals", "bench_models"))


@pytest.fixture
def green(tmp_path, monkeypatch) -> Path:
    """A log of green tests of the commit that is measured, on this device."""
    monkeypatch.setenv("QZO_COMMIT", COMMIT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (tmp_path / "green.txt").write_text(f"{common.device_name(device)}\n{GREEN}")
    return tmp_path / "green.txt"


def test_green_log_is_taken():
    assert common.check_log(GREEN, COMMIT, "NVIDIA H200") == 4


@pytest.mark.parametrize(("text", "commit", "device", "why"), [
    (GREEN.replace("4 passed", "1 failed, 3 passed"), COMMIT, None, "1 failed"),
    (GREEN.replace("4 passed", "2 errors, 3 passed"), COMMIT, None, "2 errors"),
    (GREEN.replace("4 passed, ", ""), COMMIT, None, "no test passed"),
    (GREEN, "f" * 40, None, "does not name ffff"), (GREEN, "", None, "does not name a commit"),
    (GREEN, COMMIT, "NVIDIA B200", "NVIDIA B200"), (GREEN.replace("tests/kernels", "tests/zo"), COMMIT, None, "tests/kernels"),
])  # fmt: skip
def test_red_log_is_refused(text, commit, device, why):
    with pytest.raises(common.Red, match=why):
        common.check_log(text, commit, device)


@pytest.mark.parametrize("name", ["bench_kernels", "bench_step"])
@pytest.mark.parametrize("broken", ["1 failed, ", None])
def test_nothing_is_measured_when_tests_are_red(name, broken, green, tmp_path, monkeypatch, capsys):
    green.write_text(green.read_text().replace("4 passed", f"{broken}4 passed")) if broken else green.unlink()
    monkeypatch.setattr(sys, "argv", [name, "--tests-log", str(green), "--out", str(tmp_path / "out/result")])
    with pytest.raises(SystemExit) as stopped:
        script(name).main()
    assert stopped.value.code == 1 and "kernel tests: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kernel_tests_that_fail_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(common.subprocess, "run", lambda *a, **k: type("Run", (), {"returncode": 1, "stdout": "1 failed, 3 passed\n"}))
    with pytest.raises(SystemExit):
        common.green_tests(None, CPU)
    assert "code 1" in capsys.readouterr().err


def test_sample_and_tables(tmp_path):
    assert common.sample([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == common.Sample(3.5, 2.0, 5.0, 6)
    rows = [{"op": "cublas", "us": 37.81234, "M": 16}, {"op": "gemlite", "reason": "not here, alas"}]
    assert common.table(rows, ["op", "M", "us"]) == "op       M   us\ncublas   16  37.81\ngemlite"
    common.write_csv(tmp_path / "t.csv", rows, ["op", "us", "reason"])
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.reader(file)) == [["op", "us", "reason"], ["cublas", "37.81", ""], ["gemlite", "", "not here, alas"]]
    assert common.slug("NVIDIA H200") == "h200" and common.slug("x86_64 CPU") == "x86-64-cpu"


def test_replays_are_timed_per_call_and_in_turn():
    order = []
    captured = [common.Captured([lambda i=i: order.append(i)] * calls, CPU) for i, calls in enumerate((2, 3))]
    order.clear()
    times = common.in_turn(captured, CPU, least=4)
    assert order[:10] == [0, 0, 1, 1, 1] * 2 and [t.n for t in times] == [common.MOST_ROUNDS] * 2
    assert all(0 < t.p20 <= t.median <= t.p80 for t in times)


def test_an_output_not_written_is_an_infinite_error():
    out, x = torch.zeros(4, 3), torch.ones(2, 3)
    got = common.Captured([lambda: (out[:2].copy_(x), out)[1]], CPU).first()
    assert cases.relative_error(got[:2], x) == 0 and cases.relative_error(got, torch.ones(4, 3)) == math.inf


def test_roofline_is_the_larger_of_bytes_and_operations():
    layer = cases.LAYERS["13b"][0]
    weight = 13824 * 5120 // 2 + 13824 * 40 * 4
    assert cases.weight_bytes(layer, 4) == weight and cases.weight_bytes(layer, 3) == 13824 * 5120 * 3 // 8 + 13824 * 40 * 4
    case = cases.quant_matmul(cases.Bench(layer, CPU, torch.bfloat16, 0), 16, noise=1)
    assert case.moved == weight + 16 * 2 * (5120 + 13824) and case.operations == 2 * 16 * 5120 * 13824
    limits = {"bytes": 4e12, "bf16": 8e14, "fp8": None}
    row = report.speed({}, 20e-6, case.moved, case.operations, "bf16", limits)
    assert row["us"] == 20 and math.isclose(row["roofline"], case.moved / 4e12 / 20e-6)
    assert math.isclose(row["tflops"], case.operations / 20e-6 / 1e12) and math.isclose(row["gbs"], case.moved / 20e-6 / 1e9)
    assert math.isclose(report.speed({}, 1e-3, 1e6, 4e11, "bf16", limits)["roofline"], 0.5)
    assert report.speed({}, 1e-3, 1e6, 4e11, "fp8", limits)["roofline"] is None


def rows_of(m: int, **times: float) -> list[dict]:
    """Rows of one cell of a 13B layer, with ratios and verdicts; times in us."""
    base = {"model": "13b", "layer": "qkvo", "N": 5120, "K": 5120, "M": m, "rel_error": 1e-3}
    quant = base | {"op": "quant_matmul", "bits": 4, "variants": 1, "route": "auto"}
    kinds = {
        "cublas": base | {"op": "cublas", "route": "bf16"}, "off": quant | {"noise": False}, "on": quant | {"noise": True},
        "halves": quant | {"op": "two_halves", "noise": True}, "stacked": quant | {"noise": True, "variants": 2},
        "forced": quant | {"noise": True, "variants": 2, "route": "fused"},
        "int8": quant | {"op": "w4a8", "noise": True, "route": "int8"}, "fp8": quant | {"op": "w8a8", "bits": 8, "noise": True, "route": "fp8"},
    }  # fmt: skip
    rows = [kinds[name] | {"us": us} for name, us in times.items()]
    return [report.judged(report.ratios(row, rows)) for row in rows]


def test_ratios_and_targets():
    rows = rows_of(64, cublas=20.0, off=19.5, on=20.5, halves=40.0, stacked=30.0, forced=50.0)
    cublas, off, on, halves, stacked, forced = rows
    assert on["vs_cublas"] == 1.025 and math.isclose(on["vs_off"], 20.5 / 19.5) and on["met"] == "no"
    assert on["target"] == "vs_cublas <= 1; vs_off <= 1.03; rel_error <= 0.003"
    assert stacked["vs_halves"] == 0.75 and stacked["met"] == "yes" and forced["vs_halves"] == 1.25
    assert off["met"] == halves["met"] == "yes" and "met" not in cublas
    low = rows_of(1024, cublas=100.0, int8=94.0, fp8=80.0)
    assert [row.get("met") for row in low] == [None, "yes", "no"]
    assert report.judged({**rows[0], "op": "quant_matmul", "noise": False, "variants": 1, "route": "auto", "bits": 4, "rel_error": math.inf})["met"] == "no"


def test_must_show_has_every_cell_and_says_what_was_missed():
    rows = rows_of(64, cublas=20.0, off=19.5, on=20.5, halves=40.0, stacked=30.0, forced=50.0)
    rows += rows_of(1024, cublas=100.0, off=90.0, on=91.0, halves=95.0, stacked=120.0, forced=110.0, int8=94.0, fp8=80.0)
    rows.append({**rows[-1], "M": 4096, "us": None, "vs_cublas": None, "rel_error": None, "reason": "no"})
    lines, columns = report.must_show(rows)
    found = {(line["what"].split(",")[0], line["ratio"]): line for line in lines}
    assert columns == ["what", "ratio", "layer", "M=64", "M=1024", "M=4096"]
    noisy = found["quant_matmul auto W4", "vs_cublas"]
    assert (noisy["M=64"], noisy["M=1024"]) == ("1.02 > 1", "0.91 ok")
    assert found["quant_matmul auto W4", "vs_off"]["M=1024"] == "1.01 ok"
    assert found["quant_matmul auto W4", "vs_halves"]["M=64"] == "0.75 ok"
    assert found["best route", "vs_halves"]["M=1024"] == "1.16 fused"
    low = found["w8a8 fp8 W8", "vs_cublas"]
    assert (low["M=1024"], low["M=4096"]) == ("0.8 > 0.75", "did not run")
    assert "0.001 ok" in [line["layer"] for line in lines if line["what"] == "largest relative error"]


def test_plot(tmp_path):
    report.plot(tmp_path / "p.png", rows_of(64, cublas=20.0, off=19.5, on=20.5) + rows_of(1024, cublas=90.0, on=91.0, int8=80.0), "title")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_weight_is_the_reference_in_fp64(bits):
    bench = cases.Bench(cases.LAYERS["tiny"][1], CPU, torch.float32, 1 << 14)
    w, noise = bench.weight(bits), bench.noise(2)
    assert len(w.codes) > 1 and not torch.equal(w.codes[0], w.codes[1])
    for variant in range(2):
        one = noise._replace(state=noise.state[variant : variant + 1], eps=noise.eps[variant : variant + 1])
        expected = ops.dequantize(w.codes[0], w.scales[0], None, bits, cases.GROUP, 256, torch.float32, None, one)
        assert torch.allclose(w.exact(w.seen(noise)[variant]).float(), expected, rtol=1e-6, atol=0)
    assert not torch.equal(*w.seen(noise))


def test_rounded_activations_and_nibbles():
    x = torch.randn(5, 64)
    for kind, most in (("int8", 0.5 / 127), ("fp8", 1 / 28)):
        error = (rivals.rounded(x, kind) - x).abs() / x.abs().amax(1, keepdim=True)
        assert 0 < error.max() <= most
    codes, scales = torch.tensor([[0x1F, 0x80]], dtype=torch.uint8).repeat(1, 64), torch.tensor([[0.5, 2.0]])
    assert rivals._exact(codes, scales)[0, [0, 1, 2, 3, 128]].tolist() == [-3.5, 3.5, 0.0, -4.0, -14.0]


def test_mezo_restores_the_weights_and_moves_along_its_noise():
    model = torch.nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    x, before = torch.randn(9, 6, dtype=torch.float64), [p.clone() for p in model.parameters()]
    moved = []
    for in_place in (False, True):
        for p, old in zip(model.parameters(), before, strict=True):
            p.data = old.clone()
        mezo = models.MeZO(model, in_place, eps=1e-4, lr=0.5)
        d = mezo.step(lambda: model(x).square().sum())
        torch.manual_seed(1)
        z = [torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype) for p in before]
        gradient = 2 * (x @ before[0].t() + before[1])
        slope = (gradient.t() @ x * z[0]).sum() + (gradient.sum(0) * z[1]).sum()
        assert math.isclose(d, slope, rel_tol=1e-6)
        moved.append([p.clone() for p in model.parameters()])
        for p, old, direction in zip(model.parameters(), before, z, strict=True):
            assert torch.allclose(p, old - 0.5 * d * direction, rtol=0, atol=1e-9 * abs(d))
    assert all(torch.allclose(a, b) for a, b in zip(*moved, strict=True))


@pytest.mark.parametrize(("kernel", "part"), [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matmul"), ("matmul_kernel", "matmul"), ("_dequantize_kernel", "dequantize"),
    ("void pytorch_flash::flash_fwd_kernel<Flash>", "attention"), ("_rms_norm_kernel", "norms, rotary, SwiGLU"),
    ("_update_kernel", "update"), ("_perturb_kernel", "perturb"), ("Memcpy DtoD", "other"),
])  # fmt: skip
def test_parts_of_a_step(kernel, part):
    assert models.part_of(kernel) == part
    assert models.parts([(kernel, 1.5), (kernel, 0.5)])["ms"] == {part: 2.0}


def test_random_models_differ_by_their_linears_only():
    model, layers = models.quantized_model("tiny", CPU, torch.float32)
    dense = models.dense_model("tiny", CPU, torch.float32)
    assert len(layers) == 14 and not any(p.is_meta for p in model.parameters())
    batch = models.batch_of(3, 16, 64, CPU)
    from qzo.data.loss import per_example_loss

    assert torch.isclose(per_example_loss(dense, batch).mean(), models.eager_loss(dense, batch), rtol=1e-4)
    ours = per_example_loss(model, batch)
    for layer in layers.values():
        expected = reference.dequantize(layer.codes, layer.scales.data, None, 4, 128, layer.in_features, torch.float32)
        assert expected.std() == pytest.approx(models.SPREAD, rel=0.1)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(expected)
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    with torch.no_grad():
        assert torch.allclose(models.eager_loss(model, batch), ours.mean(), rtol=1e-4)


def test_verdicts_of_steps():
    step = script("bench_step")
    rows = [{"size": "1x64", "what": what, "ms": ms, "peak_gb": 7.9} for what, ms in (
        ("ours, stacked", 44.0), ("ours, separate", 50.0), ("two forwards", 88.0), ("MeZO", 352.0), ("MeZO, fused additions", 220.0))]  # fmt: skip
    rows += [{"size": "16x64", "what": "ours, stacked", "reason": "out of memory"}, {"size": "16x64", "what": "two forwards", "ms": 1.0}]
    small, large = step.verdicts(rows, quzo=False)
    assert small == {"size": "1x64", "ours": "stacked", "ms": 44.0, "of two forwards": "0.5 ok", "faster than MeZO": "8 < 9",
                     "faster than MeZO, fused additions": "5", "peak GB": "7.9 ok"}  # fmt: skip
    assert large == {"size": "16x64", "ours": "did not run"}


def test_an_operator_that_cannot_run_is_a_row_with_its_reason():
    bench, kernels = cases.Bench(cases.LAYERS["tiny"][0], CPU, torch.float32, 1 << 14), script("bench_kernels")
    broken = replace(cases.quant_matmul(bench, 4), make=lambda: cases.Made(lambda i: ops.perturb(torch.zeros(2), *bench.noise(1)), 1))
    good, bad = kernels.measured([cases.linear(bench, 4), broken], CPU, {"bytes": 1e9, "bf16": 1e9}, 4)
    assert good["us"] > 0 and good["rel_error"] < 1e-5 and good["vs_cublas"] == 1
    assert bad["reason"].startswith("ValueError: values: shape (2,)") and "us" not in bad and bad["met"] == "no"


def two_rounds(name, monkeypatch):
    """A script that replays what it times twice, and not for as long as a figure needs."""
    module = script(name)
    monkeypatch.setattr("bench_common.ROUNDS_SECONDS", 0.0)
    monkeypatch.setattr(module, "in_turn", partial(module.in_turn, least=2))
    return module


def test_bench_kernels_from_end_to_end(green, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "kernels"
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--shapes", "tiny", "--rows", "1,2", "--quick", "--tests-log", str(green), "--out", str(out)])
    two_rounds("bench_kernels", monkeypatch).main()
    assert "largest relative error" in capsys.readouterr().out
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"cublas", "quant_matmul", "two_halves", "dequantize", "perturb", "update_", "update_codes_",
                                        "effective_weight", "copy", "update_latent_"}  # fmt: skip
    assert {row["variants"] for row in rows if row["op"] == "quant_matmul"} == {"1", "2"}
    assert all(0 < float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"]) for row in rows)
    assert all(float(row["rel_error"]) <= 3e-3 for row in rows), rows
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["commit"] == COMMIT and document["tests"]["passed"] == 4 and document["versions"]["torch"] == torch.__version__
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("more", [[], ["--offload"], ["--quzo", "W4A8"]], ids=["on the device", "offload", "quzo"])
def test_bench_step_from_end_to_end(more, green, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qzo.model.stream.Lanes", lambda device: AtOnce())
    out = tmp_path / "results" / "step.json"
    command = ["bench_step", "--like", "tiny", "--sizes", "2x16", "--profile", "2x16", "--repeats", "2", "--tests-log", str(green), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command + more)
    two_rounds("bench_step", monkeypatch).main()
    document = json.loads(out.read_text())
    eager, plain = (["eager QuZO"], ["ours, stacked, plain rounding"]) if "--quzo" in more else ([], [])
    assert [row["what"] for row in document["rows"]] == ["ours, stacked", "ours, separate", *plain, "two forwards", "MeZO", "MeZO, fused additions", *eager]
    assert all(0 < row["p20"] <= row["ms"] <= row["p80"] for row in document["rows"])
    bus = [row["bus_gb"] for row in document["rows"] if "bus_gb" in row]
    assert document["offload"] == ("--offload" in more) == bool(bus) and (not bus or 0 < bus[1] == 2 * bus[0])
    assert document["must_show"][0]["size"] == "2x16" and ("dequantize" in document["profile"]["ours, stacked"]["ms"] or eager)
    assert "of two forwards" in capsys.readouterr().out


def test_bench_memory_runs_what_it_compares(tmp_path, monkeypatch, capsys):
    out = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["bench_memory", "--models", str(tmp_path), "--only", "tiny", "--steps", "3", "--out", str(out)])
    script("bench_memory").main()
    rows = json.loads(out.read_text())["rows"]
    assert [("method=zeroqat" in row["keys"], "offload=latents" in row["keys"]) for row in rows] == [(False, False), (True, True)]
    for row in rows:
        assert row["exit"] == 0 and row["peak_gb"] > 0.1 and row["ms_per_step"] > 0 and row["estimate_gb"] == 0.0, "a model of kilobytes"
    assert not (tmp_path / "tiny-w4").exists() and not (tmp_path / "tiny-latent2").exists() and "tiny" in capsys.readouterr().out


def test_bench_memory_compares_streamed_rows_with_the_same_step():
    bench = script("bench_memory")
    same = {"model": "m", "bits": 2, "size": "1x64"}
    rows = [same | {"keys": " ".join(bench.STREAMED), "ms_per_step": 200.0, "bus_gb": 16.0, "back_gb": 8.0}, same | {"keys": "stacked=true", "ms_per_step": 20.0},
            same | {"keys": " ".join(bench.LIGHT), "ms_per_step": 100.0}, same | {"keys": "stacked=true offload=codes", "ms_per_step": 200.0, "bus_gb": 9.5}]  # fmt: skip
    bench.streamed(rows, 50.0)
    assert rows[0]["bus_gb_s"] == 80.0 and rows[0]["compute_ms"] == 100.0
    assert not {"copy_ms", "hidden"} & rows[0].keys(), "both ways at once the bus has another bandwidth"
    assert rows[3]["copy_ms"] == 190.0 and rows[3]["compute_ms"] == 20.0 and rows[3]["hidden"] == pytest.approx(10 / 190)
    assert "copy_ms" not in rows[2]


def test_a_plan_says_what_crosses_the_bus():
    said = "latents in host memory: 8.39 GB; 16.78 GB cross the bus in a step, 8.39 GB of them back\n"
    found = script("bench_memory").planned(said)
    assert found == {"bus_gb": 16.78, "back_gb": 8.39}


def test_bench_quantize_memory_kills_and_continues(tmp_path, monkeypatch):
    out = tmp_path / "quantize.json"
    command = ["bench_quantize_memory", "--models", str(tmp_path), "--like", "tiny", "--gptq-layers", "1", "--keep", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    script("bench_quantize_memory").main()
    rtn, killed, continued = json.loads(out.read_text())["rows"]
    assert (rtn["exit"], killed["exit"], continued["exit"]) == (0, -9, 0) and rtn["host_gb"] > 0.1
    assert continued["layers"] == "1 to 2" and (tmp_path / "tiny-w4").is_dir() and not (tmp_path / "tiny-16").exists()
