"""scripts/bench_formats: a folder per format by its own library, its round trip through qzo and its runs."""

import json
import sys

import pytest
from tiny_runs import make_model, write_recipe
from tiny_scripts import script
from wheels import root

from qzo.quantize import quantize_model


@pytest.fixture(scope="module")
def bench():
    """Runs it with arguments; what main would return."""
    program = script("bench_formats")

    def run(stage, *arguments):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", ["bench_formats", stage, *map(str, arguments)])
            return getattr(program, stage)(program.arguments())

    run.formats = program.FORMATS
    return run


@pytest.fixture(scope="module")
def formats(bench, pytestconfig, tmp_path_factory):
    """All folders, of widths that are whole groups of 128."""
    folder = tmp_path_factory.mktemp("formats")
    base = make_model(folder / "model", hidden_size=128, intermediate_size=256)
    quantize_model(str(base), folder / "ready", "rtn", 4, 128)
    bench("prepare", base, "-o", folder / "out", "--gptq", folder / "ready", "--packages", root(pytestconfig, tmp_path_factory))
    return folder / "out"


def test_every_format_is_read_as_its_library_reads_it(bench, formats):
    assert {path.name for path in formats.iterdir() if path.is_dir()} == set(bench.formats)
    for name in bench.formats:
        made = json.loads((formats / f"{name}.json").read_text())
        assert made["format"] == name and made["linears"] == made["equal_weights"] == 7, name
        # aqlm: a product of its own, by codebook, in fp16.
        assert made["logit_difference"] <= (0.02 * made["largest_logit"] if name == "aqlm" else 0) < made["largest_logit"], name


def test_round_trips_and_runs_are_measured_and_kept(bench, formats, sentiment, tmp_path):
    out, names = tmp_path / "formats.json", ("nf4-double", "int8", "awq", "compressed-int4", "gptq", "aqlm")
    folders = [formats / name for name in names]
    recipe = write_recipe(tmp_path / "recipe.yaml", "none", sentiment, lr=0.05, save_every=2)
    common = ["--data", sentiment, "--recipe", recipe, "--steps", 3, "-o", out]
    assert bench("measure", *folders, *common, "--seeds", "0") == 0
    text = out.read_text()
    document, rows = json.loads(text), {row["format"]: row for row in json.loads(text)["rows"]}
    assert tuple(rows) == names and str(tmp_path) not in text and str(formats) not in text
    assert document["recipe"]["steps"] == 3 and document["seeds"] == [0]
    for name, row in rows.items():
        trip, (run,) = row["round_trip"], row["runs"]
        assert trip["logit_difference"] == 0 < trip["largest_logit"], name
        # Double quantization is undone by an export.
        assert (trip["equal_tensors"] == trip["tensors"]) == (name != "nf4-double"), name
        assert run["export_equal"] and run["after"] == row["after"] and row["library"]["equal_weights"] == 7, name
    with pytest.raises(SystemExit, match="another setup"):
        bench("measure", formats / "awq", *common, "--seeds", "5")
    assert out.read_text() == text
    assert bench("measure", *folders, *common, "--seeds", "0", "--only", "awq", "--jobs", "2") == 0
    again = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert tuple(again) == names and again["awq"]["round_trip"] == rows["awq"]["round_trip"]


def test_a_format_that_fails_does_not_stop_the_others(bench, formats, sentiment, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    recipe = write_recipe(tmp_path / "recipe.yaml", "none", sentiment, lr=0.5)
    assert bench("measure", tmp_path / "broken", formats / "fp4", "--data", sentiment, "--recipe", recipe, "--steps", 2, "--seeds", "0,1",
                 "-o", tmp_path / "out.json") == 1  # fmt: skip
    assert "broken: " in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    one, other = (run["after"] for run in row["runs"])
    assert [run["seed"] for run in row["runs"]] == [0, 1] and row["after"] == (one + other) / 2 and row["format"] == "fp4"
    assert row["std"] == pytest.approx(abs(one - other) / 2**0.5)
