"""The learning rate over a run, against values worked out by hand."""

import pytest

from qzo.zo.schedule import schedule


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8]),
        ("constant", 2, [4, 8, 8, 8]),
        ("linear", 0, [8, 6, 4, 2]),
        ("linear", 2, [4, 8, 8, 4]),
        ("linear", 4, [2, 4, 6, 8]),
        ("cosine", 0, [8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5]),
        ("cosine", 1, [8, 8, 6, 2]),
    ],
)
def test_schedule(kind, warmup, expected):
    assert [schedule(kind, 8.0, step, 4, warmup) for step in range(4)] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("kind", "step"), [("linear", -1), ("linear", 4), ("step", 0)])
def test_schedule_refuses(kind, step):
    with pytest.raises(ValueError, match=str(step) if kind == "linear" else kind):
        schedule(kind, 1.0, step, 4, 0)
