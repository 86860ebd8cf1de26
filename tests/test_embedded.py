"""The embedded model and task: small, loadable, unbiased, and made by the script that claims to make them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "qzo" / "embedded"
MODEL, TASK = EMBEDDED / "tiny-llama", EMBEDDED / "sentiment"
CHOICES = (" terrible", " great")
VERDICTS = ((" awful", " dreadful", " horrible"), (" lovely", " wonderful", " superb"))


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def last_logits(tokenizer) -> torch.Tensor:
    """[400, vocabulary] fp32 logits after `{sentence} it was`, one row per validation record."""
    rows = [tokenizer(f"{record['sentence']} it was").input_ids for record in records("validation")]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model.model(input_ids=padded, use_cache=False)[0]
        return model.lm_head(hidden[torch.arange(len(rows)), last])


def accuracy(last_logits: torch.Tensor, tokenizer, words: tuple[tuple[str, ...], ...]) -> float:
    ids = [[tokenizer(word, add_special_tokens=False).input_ids[0] for word in group] for group in words]
    scores = torch.stack([last_logits[:, group].sum(dim=1) for group in ids], dim=1)
    labels = torch.tensor([record["label"] for record in records("validation")])
    return (scores.argmax(dim=1) == labels).double().mean().item()


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 2_000_000


def test_model_is_a_fp16_llama_of_about_a_million_parameters():
    stored = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    assert type(stored).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}
    assert 0.8e6 < sum(parameter.numel() for parameter in stored.parameters()) < 1.1e6
    assert all(torch.isfinite(parameter).all() for parameter in stored.parameters())


def test_tokenizer_round_trips_any_text_and_starts_with_bos(tokenizer):
    for text in ("the soup was cold.", "Größe 東京 \n\t{x}"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("word", CHOICES)
def test_choice_is_one_token_after_the_prompt(tokenizer, word):
    prompt = f"{records('train')[0]['sentence']} it was"
    assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert tokenizer(prompt + word).input_ids[:-1] == tokenizer(prompt).input_ids


def test_splits_are_disjoint_and_balanced():
    sentences = [record["sentence"] for name in ("train", "validation") for record in records(name)]
    assert len(sentences) == len(set(sentences)) == 1400
    calibration = " ".join(record["text"] for record in records("calibration"))
    assert len(records("calibration")) == 128
    assert not {f"{part}." for part in calibration.split(". ")} & set(sentences)
    for name in ("train", "validation"):
        labels = [record["label"] for record in records(name)]
        assert set(labels) == {0, 1}
        assert 0.45 <= sum(labels) / len(labels) <= 0.55


def test_sentences_never_hold_a_choice():
    text = " ".join(record["sentence"] for name in ("train", "validation") for record in records(name))
    assert "great" not in text and "terrible" not in text


def test_untuned_model_answers_near_chance(last_logits, tokenizer):
    assert 0.45 <= accuracy(last_logits, tokenizer, tuple((word,) for word in CHOICES)) <= 0.60


def test_untuned_model_represents_sentiment_in_its_own_words(last_logits, tokenizer):
    assert accuracy(last_logits, tokenizer, VERDICTS) >= 0.95


def test_data_come_from_the_script_and_its_seed(tmp_path):
    script = ROOT / "scripts" / "make_embedded"
    subprocess.run([sys.executable, str(script), "data", "--out", str(tmp_path)], check=True, timeout=60)
    for path in sorted(TASK.glob("*.jsonl")):
        assert (tmp_path / "sentiment" / path.name).read_bytes() == path.read_bytes(), path.name
    subprocess.run([sys.executable, str(script), "data", "--out", str(tmp_path), "--seed", "1"], check=True, timeout=60)
    assert (tmp_path / "sentiment" / "train.jsonl").read_bytes() != (TASK / "train.jsonl").read_bytes()
