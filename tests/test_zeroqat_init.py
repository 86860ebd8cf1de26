"""scripts/zeroqat_init on a tiny model: its rows, and what it does with a file that is there."""

import json
import sys

import pytest
from tiny_models import calibration, one_thread, tiny  # noqa: F401
from tiny_scripts import script

from qzo.model.qat import Precision
from qzo.quantize.initialize import Initialization


def test_rows_are_measured_kept_and_compared(tiny, calibration, tmp_path, monkeypatch):  # noqa: F811
    program = script("zeroqat_init")
    low, high = Precision(2, 32, 4), Precision(8, 32, 16)
    monkeypatch.setattr(program, "WINDOW", 16)
    monkeypatch.setattr(program, "ROWS", [
        ("rtn", Initialization(low, False, False)), ("init", Initialization(low, True, True)),
        ("gptq", Initialization(low, False, False)), ("rtn", Initialization(high, False, False)),
        ("first-order", Initialization(low, True, True, reconstruct=2)),
    ])  # fmt: skip
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out.json"

    def run(*more: str) -> dict:
        command = ["zeroqat_init", str(tiny("llama")), "--calibration", calibration, "--text", str(tmp_path / "text.txt"), "--samples", "4",
                   "--max-length", "32", "--device", "cpu", "--dtype", "fp32", "-o", str(out), *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        program.main()
        return json.loads(out.read_text())

    run("--methods", "init")
    document = run("--methods", "rtn", "gptq")
    rows = {(row["method"], row.get("bits")): row for row in document["rows"]}
    assert set(rows) == {("16 bits", None), ("init", 2), ("rtn", 2), ("gptq", 2), ("rtn", 8)}
    assert rows["16 bits", None]["kl"] == 0 and rows["rtn", 8]["kl"] < 1e-3 < rows["rtn", 2]["kl"]
    assert rows["rtn", 2]["loss"] == rows["rtn", 8]["loss"] == 1 and rows["init", 2]["loss"] != 1
    assert rows["init", 2]["log"] and rows["gptq", 2]["activations"] == 4 and document["dtype"] == "float32"
    row = next(row for row in run("--methods", "first-order")["rows"] if row["method"] == "first-order")
    assert row["reconstruct"] == 2 and any("of 2 epochs kept" in line for line in row["log"]) and row["perplexity"] > 0
    before = out.read_text()
    with pytest.raises(SystemExit, match="another setup"):
        run("--windows", "2")
    assert out.read_text() == before
