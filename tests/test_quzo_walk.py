"""Codes after many steps of QuZO against the closed forms; the figures are those of scripts/quzo_walk."""

import json
import sys

import pytest
from tiny_scripts import script

walks = script("quzo_walk")


def check(found: list[dict]) -> None:
    for row in found:
        name = (row["bits"], row["case"], row["feedback"])
        if row["at_edge"] > 0:
            assert name == (4, "large", False)
            continue
        squares = row["errors"].flatten() ** 2
        sigma = float(squares.std()) / len(squares) ** 0.5
        assert sigma > 0 and abs(float(squares.mean()) - row["closed_form"] ** 2) < 5 * sigma, name
        assert abs(float(row["errors"].mean())) < 5 * row["closed_form"] / len(squares) ** 0.5, name
        assert abs(row["slope"] - 1) < 5 * row["slope_sigma"], name
        if row["feedback"]:
            assert row["codes_error_max"] < 0.51 and row["error_std"] < 1e-3, name


def test_codes_follow_the_closed_forms():
    check(walks.rows(100))


@pytest.mark.campaign
def test_codes_follow_the_closed_forms_for_5000_steps():
    """With feedback, paths of several grid steps are met within 1 % and codes are one rounding off; without, small steps are noise."""
    found = walks.rows(5000)
    check(found)
    table = {(row["bits"], row["case"], row["feedback"]): row for row in found}
    for bits, least in ((4, 1), (8, 10)):
        large = table[bits, "large", True]
        assert large["at_edge"] == 0 and large["path_std"] > least
        assert large["error_std"] < 0.01 * large["path_std"]
        assert large["codes_error_std"] == pytest.approx(12**-0.5, rel=0.02)
    assert table[4, "constant", False]["error_std"] > 50 * table[4, "constant", False]["path_std"]
    assert table[4, "large", False]["at_edge"] > 0.1


def test_a_file_of_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quzo_walk", "--steps", "3", "--out", str(tmp_path / "walk.json")])
    walks.main()
    document = json.loads((tmp_path / "walk.json").read_text())
    assert document["steps"] == 3 and len(document["rows"]) == 12 and document["commit"]
    assert "closed_form" in capsys.readouterr().err
