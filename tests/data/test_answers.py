import pytest

from qzo.data.answers import exact_match, f1, normalize


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The  Rain.", "rain"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("\tOctober,\n1973", "october 1973"),
        ("The", ""),
    ],
)
def test_normalize(answer, expected):
    assert normalize(answer) == expected


@pytest.mark.parametrize(
    "answer, references, em, overlap",
    [
        ("the October 1973!", ["1973", "October 1973"], 1, 1),
        ("in October 1973", ["October 1973", "rain"], 0, 0.8),
        ("rain", ["snow"], 0, 0),
        ("", ["snow"], 0, 0),
        ("rain rain", ["rain"], 0, 2 / 3),
    ],
)
def test_best_of_the_references(answer, references, em, overlap):
    assert exact_match(answer, references) == em
    assert f1(answer, references) == pytest.approx(overlap)
