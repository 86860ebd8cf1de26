"""scripts/split_text: what is measured, what settings are chosen on and what is trained on share no text."""

import json

import pytest
from tiny_scripts import script

MODEL = "builtin:tiny-llama"


@pytest.fixture
def split(tmp_path, monkeypatch):
    def run(words, *arguments):
        (tmp_path / "text.txt").write_text(" ".join(f"word{i}" for i in range(words)))
        monkeypatch.setattr("sys.argv", ["split_text", str(tmp_path / "text.txt"), MODEL, "-o", str(tmp_path / "out"), *arguments])
        script("split_text").main()
        return tmp_path / "out"

    return run


def test_the_parts_follow_one_another(split, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "more"}) + "\n")
    out = split(400, "--window", "16", "--windows", "3", "--dev", "2", "--more", str(tmp_path / "more.jsonl"))
    whole, dev = (out / "validation.txt").read_text(), (out / "dev.txt").read_text()
    train, more = (json.loads(line)["text"] for line in (out / "train.jsonl").read_text().splitlines())
    assert more == "more" and dev and train and whole.endswith(dev + train)
    assert len(whole) - len(dev + train) > 1.5 * len(dev), "four windows before, of which three are measured"


def test_a_short_text_is_refused(split, tmp_path):
    with pytest.raises(SystemExit, match=r"text.txt: \d+ tokens; expected more than 2896"):
        split(20, "--window", "16")
    assert not (tmp_path / "out").exists()
