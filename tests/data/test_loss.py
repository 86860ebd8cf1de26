import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qzo.data import loss as loss_module
from qzo.data.batches import collate
from qzo.data.encode import encode_examples
from qzo.data.loss import option_scores, per_example_loss
from qzo.data.tasks import Example

FP32 = {"atol": 1e-5, "rtol": 1e-5}
COMMON = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GQA = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, **GQA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, **GQA, sliding_window=32)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **GQA, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, **GQA, head_dim=8)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**COMMON, init_std=0.3, ffn_dim=48, word_embed_proj_dim=24)),
}
EXAMPLES = {
    "one token": [
        Example("a dull film . It was", (" terrible", " great"), 0),
        Example("It was", (" terrible", " great"), 1),
        Example("a charming , affecting journey . It was", (" terrible", " great"), 1),
    ],
    "several tokens": [
        Example("It was", (" a great film", " great", " not"), 2),
        Example("this is a journey", (" a film", " lifeless and dull"), 1),
    ],
    "completion": [
        Example("It was", (" a great film and a great journey\n",), 0),
        Example("this is a long and dull journey", (" a film\n",), 0),
    ],
}


def build(family: str = "llama", dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype).eval()


def make_batch(tokenizer, examples):
    return collate(encode_examples(examples, tokenizer, 48)[0], 0)


def naive_scores(model, tokenizer, example) -> torch.Tensor:
    """From the full logits of one unpadded sequence per option."""
    scores = []
    prompt = tokenizer(example.prompt)["input_ids"]
    for option in example.options:
        ids = tokenizer(example.prompt + option)["input_ids"]
        start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        log_probs = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
        scores.append(torch.stack([log_probs[i - 1, ids[i]] for i in range(start, len(ids))]).mean())
    return torch.stack(scores)


def naive_loss(model, tokenizer, example) -> torch.Tensor:
    scores = naive_scores(model, tokenizer, example)
    return -scores[0] if len(scores) == 1 else -scores.log_softmax(0)[example.label]


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_naive_full_logits(tokenizer, family, kind):
    model, examples = build(family), EXAMPLES[kind]
    expected = torch.stack([naive_loss(model, tokenizer, e) for e in examples])
    assert expected.std() > 0.05  # otherwise a constant would pass
    losses = per_example_loss(model, make_batch(tokenizer, examples))[0]
    torch.testing.assert_close(losses, expected, **FP32)


@torch.no_grad()
def test_options_that_an_example_lacks(tokenizer):
    model, examples = build(), [e for kind in EXAMPLES.values() for e in kind]
    batch = make_batch(tokenizer, examples)
    scores = option_scores(model, batch)
    for row, example in zip(scores, examples, strict=True):
        torch.testing.assert_close(row[: len(example.options)], naive_scores(model, tokenizer, example), **FP32)
        assert (row[len(example.options) :] == -torch.inf).all()
    expected = torch.stack([naive_loss(model, tokenizer, e) for e in examples])
    torch.testing.assert_close(per_example_loss(model, batch)[0], expected, **FP32)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_variants_of_the_same_weights_are_bit_equal(tokenizer, family, dtype, kind):
    model, batch = build(family, dtype), make_batch(tokenizer, EXAMPLES[kind])
    losses = per_example_loss(model, batch, variants=2)
    assert (losses.dtype, losses.shape) == (torch.float32, (2, len(EXAMPLES[kind])))
    assert losses.isfinite().all()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses, per_example_loss(model, batch, variants=2))


@torch.no_grad()
def test_variants_are_the_major_part_of_the_rows(tokenizer):
    model, batch = build(), make_batch(tokenizer, EXAMPLES["several tokens"])
    plain, head = per_example_loss(model, batch)[0], model.lm_head

    def second_half_doubled(module, inputs, output):
        assert output.shape[0] == 2
        return torch.cat([output[:1], 2 * output[1:]])

    handle = head.register_forward_hook(second_half_doubled)
    losses = per_example_loss(model, batch, variants=2)
    handle.remove()
    head.weight.mul_(2)
    doubled = per_example_loss(model, batch)[0]
    torch.testing.assert_close(losses, torch.stack([plain, doubled]), **FP32)


@pytest.mark.parametrize("variants", [1, 2])
@torch.no_grad()
def test_head_sees_only_the_positions_that_count_in_chunks(tokenizer, monkeypatch, variants):
    model, batch = build(), make_batch(tokenizer, EXAMPLES["completion"])
    expected, seen = per_example_loss(model, batch, variants), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    per_example_loss(model, batch, variants)
    assert seen == [variants * len(batch.positions)] and len(batch.positions) < batch.input_ids.numel()
    seen.clear()
    monkeypatch.setattr(loss_module, "HEAD_POSITIONS", 5)
    torch.testing.assert_close(per_example_loss(model, batch, variants), expected, **FP32)
    assert len(seen) > 2 and max(seen) <= 5 and sum(seen) == variants * len(batch.positions)


@torch.no_grad()
def test_any_module_can_be_the_head(tokenizer):
    model, batch = build(), make_batch(tokenizer, EXAMPLES["one token"])
    expected, weight = per_example_loss(model, batch), model.lm_head.weight

    class Head(torch.nn.Module):
        def forward(self, x):
            return x @ weight.T

    model.lm_head = Head()
    torch.testing.assert_close(per_example_loss(model, batch), expected, **FP32)


@torch.no_grad()
def test_padding_does_not_count(tokenizer):
    model, examples = build("opt"), EXAMPLES["several tokens"]
    encoded, _ = encode_examples(examples, tokenizer, 48)
    assert torch.equal(*(per_example_loss(model, collate(encoded, pad_id)) for pad_id in (0, 17)))


@torch.no_grad()
def test_a_broken_model_is_not_finite(tokenizer):
    model = build()
    model.lm_head.weight.fill_(float("nan"))
    assert per_example_loss(model, make_batch(tokenizer, EXAMPLES["completion"])).isnan().all()


@pytest.mark.parametrize("kind", EXAMPLES)
@torch.no_grad()
def test_rounded_batches_have_the_same_losses(tokenizer, kind):
    model, batch = build(), make_batch(tokenizer, EXAMPLES[kind])
    torch.testing.assert_close(per_example_loss(model, batch.rounded(), 2), per_example_loss(model, batch, 2), **FP32)


@torch.no_grad()
def test_the_host_reads_nothing(tokenizer):
    """A graph of the step can be captured: no value decides what is launched."""
    batch = make_batch(tokenizer, EXAMPLES["several tokens"])
    with FakeTensorMode() as mode:
        fake = dataclasses.replace(batch, **{f.name: mode.from_tensor(v) for f in dataclasses.fields(batch)
                                             if isinstance(v := getattr(batch, f.name), torch.Tensor)})  # fmt: skip
        losses = per_example_loss(FAMILIES["llama"]().eval(), fake, 2)
        assert losses.shape == (2, batch.examples)
        with pytest.raises(DataDependentOutputException):
            losses[0, 0].item()
