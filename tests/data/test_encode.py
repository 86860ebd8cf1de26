import pytest
from transformers import AutoTokenizer

from qzo.data.encode import encode_examples, encode_prompts, leading_ids, padding_id
from qzo.data.tasks import Example
from qzo.errors import BadInput


def encode(tokenizer, *examples, max_length=64):
    return encode_examples(examples, tokenizer, max_length)


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_options_of_one_token_share_one_row(tokenizer):
    (one,), truncated = encode(tokenizer, Example("a dull film . It was", (" terrible", " great"), 1))
    prompt = ids(tokenizer, "a dull film . It was")
    assert one.rows == (prompt,)
    assert [(o.row, o.start, o.tokens) for o in one.options] == [
        (0, len(prompt) - 1, ids(tokenizer, " terrible")),
        (0, len(prompt) - 1, ids(tokenizer, " great")),
    ]
    assert (one.label, truncated) == (1, 0)


def test_options_of_several_tokens_have_a_row_each(tokenizer):
    (one,), _ = encode(tokenizer, Example("It was", (" great", " great film", " not"), 0))
    prompt = ids(tokenizer, "It was")
    assert len(one.rows) == 3
    for index, (option, text) in enumerate(zip(one.options, (" great", " great film", " not"), strict=True)):
        assert (option.row, option.start, option.tokens) == (index, len(prompt) - 1, ids(tokenizer, text))
        assert one.rows[index] == (prompt + option.tokens)[:-1]


def test_an_option_that_merges_into_the_prompt_starts_at_the_common_prefix(tokenizer):
    (one,), _ = encode(tokenizer, Example("It was gre", ("at", "en"), 0))
    full = ids(tokenizer, "It was great")
    assert full != ids(tokenizer, "It was gre") + ids(tokenizer, "at")
    assert one.options[0].tokens == full[2:] and one.options[0].start == 1
    assert len(one.rows) == 2


def test_prompt_is_cut_on_the_left_and_the_answer_never(tokenizer):
    long = Example("one two three four five six seven. It was", (" great", " a great film"), 0)
    (whole,), none = encode(tokenizer, long)
    (cut, _), truncated = encode(tokenizer, long, Example("It was", (" great", " not"), 0), max_length=12)
    assert (none, truncated) == (0, 1)
    assert [o.tokens for o in cut.options] == [o.tokens for o in whole.options]
    dropped = len(whole.rows[0]) - len(cut.rows[0])
    assert dropped > 0
    assert cut.rows == tuple(row[dropped:] for row in whole.rows)  # every option sees the same context
    assert max(len(row) + 1 for row in cut.rows) == 12
    assert encode_prompts([long], tokenizer, 5) == ([list(whole.rows[0][-5:])], 1)


def test_bos_is_kept_when_the_prompt_is_cut(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    assert leading_ids(tokenizer) == [1]
    example = Example("Once upon a time there was a girl. It was", (" great", " a dog"), 0)
    (whole,), _ = encode(tokenizer, example)
    (cut,), truncated = encode(tokenizer, example, max_length=16)
    assert truncated == 1
    assert whole.rows[0][0] == 1
    for row, full in zip(cut.rows, whole.rows, strict=True):
        assert row == (1, *full[len(full) - len(row) + 1 :])
    assert max(map(len, cut.rows)) + 1 == 16
    prompts, truncated = encode_prompts([example], tokenizer, 8)
    assert (prompts[0][0], len(prompts[0]), truncated) == (1, 8, 1)


def test_a_whole_prompt_starts_with_what_the_tokenizer_adds(shared):
    for name in ("stories260k", "reviews-llama-32m"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
        (one,), _ = encode(tokenizer, Example("a dull film . It was", (" terrible", " great"), 1))
        prompt = tuple(tokenizer("a dull film . It was")["input_ids"])
        assert one.rows[0][: len(prompt)] == prompt


@pytest.mark.parametrize(
    "example, message",
    [
        (
            Example("It was", (" great", " great"), 0, source="f.jsonl line 3"),
            "f.jsonl line 3: cannot tell apart .*' great' and ' great'",
        ),
        (Example("It was", (" great", ""), 0), "example 0: the option '' adds no token"),
        (Example("", (" great", " not"), 0), "no token of context"),
        (Example("It was", (" great" * 30,), 0), "of 30 tokens leaves no token of context.*max_length = 30"),
    ],
)
def test_bad_examples(tokenizer, example, message):
    with pytest.raises(BadInput, match=message):
        encode(tokenizer, example, max_length=30)


def test_an_empty_prompt_needs_a_bos(tokenizer, shared):
    with pytest.raises(BadInput, match="f line 1: an empty prompt"):
        encode_prompts([Example("", ("a",), 0, source="f line 1")], tokenizer, 8)
    with_bos = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    assert encode_prompts([Example("", ("a",), 0)], with_bos, 8) == ([[1]], 0)
    assert encode(with_bos, Example("", ("a", "b"), 0))[0][0].rows[0][0] == 1


def test_padding_id(tokenizer):
    assert padding_id(tokenizer) == tokenizer.eos_token_id
