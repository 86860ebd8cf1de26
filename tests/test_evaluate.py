import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qzo.data.tasks import Example, get_task, load_examples
from qzo.errors import BadInput
from qzo.evaluate import evaluate_task, perplexity


@pytest.fixture(scope="module")
def stories(shared):
    path = shared / "models/stories260k"
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name, folder", [("sst2", "sst2"), ("rte", "rte"), ("copa", "copa")])
def test_options(shared, stories, name, folder):
    model, tokenizer = stories
    task = get_task(name)
    short = [e for e in load_examples(task, shared / "data" / folder, "validation") if len(e.prompt) < 250]
    examples, seen = short[:40], []
    result = evaluate_task(model, tokenizer, task, examples, 256, 16, lambda *at: seen.append(at))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    assert result["examples"] == 40 and 0 < result["accuracy"] < 1
    assert result == evaluate_task(model, tokenizer, task, examples, 256, 16)
    other = evaluate_task(model, tokenizer, task, examples[::-1], 256, 7)
    assert other["accuracy"] == result["accuracy"]
    assert other["loss"] == pytest.approx(result["loss"], abs=1e-4)

    right, losses = 0, []
    with torch.no_grad():
        for example in examples:
            prompt = tokenizer(example.prompt)["input_ids"]
            scores = []
            for option in example.options:
                ids = tokenizer(example.prompt + option)["input_ids"]
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
                scores.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start))
            right += scores.index(max(scores)) == example.label
            losses.append(-torch.tensor(scores).log_softmax(0)[example.label].item())
    assert result["accuracy"] == right / 40
    assert result["loss"] == pytest.approx(sum(losses) / 40, abs=1e-4)


def test_truncated_prompts_are_counted(shared, stories):
    task = get_task("cb")
    examples = load_examples(task, shared / "data/cb", "validation", 8)
    assert evaluate_task(*stories, task, examples, 32, 8)["truncated"] == 8


def test_generation_equals_one_by_one_greedy(stories):
    model, tokenizer = stories
    prompts = ["Once upon a time, there was a little", "Lily and Tom", "The dog said: I want to go and"]
    examples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        config = GenerationConfig(do_sample=False, max_new_tokens=50, eos_token_id=2, pad_token_id=2)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
        line = tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]
        assert len(line) > 20
        examples.append(Example(prompt, (line,), 0, (line,)))
    task = get_task("jsonl")
    seen = []
    result = evaluate_task(model, tokenizer, task, examples, 128, 3, lambda *at: seen.append(at))
    assert result == {"exact_match": 1.0, "f1": 1.0, "examples": 3, "truncated": 0}
    assert seen == [(3, 3)]
    wrong = [Example(prompts[0], ("x",), 0, ("zebra crossing",)), *examples[1:]]
    assert evaluate_task(model, tokenizer, task, wrong, 128, 2)["exact_match"] == pytest.approx(2 / 3)


def test_generation_stops_at_a_newline(stories, monkeypatch):
    model, tokenizer = stories
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    lengths, generate = [], model.generate

    def watched(**arguments):
        output = generate(**arguments)
        lengths.append(output.shape[1] - arguments["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", watched)
    column = torch.tensor([newline])
    head = model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, column, 1e4))
    result = evaluate_task(model, tokenizer, get_task("jsonl"), [Example("Once upon", ("x",), 0, ("x",))], 128, 1)
    head.remove()
    assert lengths == [1]
    assert result["exact_match"] == 0


def test_squad(shared, stories):
    task = get_task("squad")
    examples = load_examples(task, shared / "data/squad_devsplit", "validation", 2)
    result = evaluate_task(*stories, task, examples, 200, 2)
    assert result["truncated"] == 2 and 0 <= result["exact_match"] <= result["f1"] <= 1


def test_training_mode_is_restored(stories):
    model, tokenizer = stories
    model.train()
    evaluate_task(model, tokenizer, get_task("sst2"), [Example("It was", (" bad", " good"), 1)], 64, 1)
    assert model.training
    model.eval()


def test_bad_arguments(stories, tmp_path):
    with pytest.raises(BadInput, match="no examples"):
        evaluate_task(*stories, get_task("sst2"), [], 64, 1)
    with pytest.raises(BadInput, match="max_length: 50; expected more than the 50"):
        evaluate_task(*stories, get_task("jsonl"), [Example("a", ("b",), 0, ("b",))], 50, 1)
    (tmp_path / "short.txt").write_text("Once upon a time")
    with pytest.raises(BadInput, match="short.txt.*at least one window of 512"):
        perplexity(*stories, tmp_path / "short.txt")
    with pytest.raises(BadInput, match="absent.txt.*cannot be read"):
        perplexity(*stories, tmp_path / "absent.txt")
    with pytest.raises(BadInput, match="window: 1"):
        perplexity(*stories, tmp_path / "short.txt", window=1)


def test_perplexity_equals_naive(shared, stories, tmp_path):
    model, tokenizer = stories
    text = (shared / "data/wikitext2/validation.txt").read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    result = perplexity(model, tokenizer, tmp_path / "text.txt", window=60, limit_windows=7)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    losses = []
    with torch.no_grad():
        for window in ids.split(60)[:7]:
            logits = model(window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    assert (result["windows"], result["tokens"]) == (7, 7 * 59)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / 7), rel=1e-5)
    every = perplexity(model, tokenizer, tmp_path / "text.txt", window=60)
    assert every["windows"] == len(ids) // 60


@pytest.mark.campaign
def test_published_figures(shared):
    path = shared / "models/reviews-llama-32m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = get_task("sst2")
    result = evaluate_task(model, tokenizer, task, load_examples(task, shared / "data/sst2", "validation"), 256, 32)
    assert result["accuracy"] == pytest.approx(0.577, abs=0.001)
    result = perplexity(model, tokenizer, shared / "data/wikitext2/validation.txt", 512, 120)
    assert result["perplexity"] == pytest.approx(136.2, abs=0.1)
