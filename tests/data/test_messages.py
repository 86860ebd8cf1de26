import copy

import pytest
import torch
from test_loss import build

from qzo.data.batches import collate
from qzo.data.encode import Encoded, Option, Scattered, fingerprint
from qzo.data.loss import per_example_loss
from qzo.data.messages import encode_chats
from qzo.data.tasks import Example, get_task
from qzo.errors import BadInput

HEAD = "{% for m in messages %}<|{{ m.role }}|>\n"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}<eos>\n{% endfor %}" + PROMPT
MARKED = HEAD + (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}"
    "{{ '\n' }}{% endfor %}" + PROMPT
)
THINKING = PLAIN.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
# Marks the last turn, as Qwen3 does.
UNEVEN = HEAD + "{% if loop.last %}<think></think>{% endif %}{{ m.content }}<eos>\n{% endfor %}" + PROMPT
DATED = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN
REFUSING = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}" + PLAIN

CHAT = (("user", "It was?"), ("assistant", "a dull film ."), ("user", "Yes or No?"), ("assistant", "No"))


def chat(*messages, source=""):
    return Example("", (), 0, messages=messages, source=source)


@pytest.fixture
def speaking(tokenizer):
    def make(template, bos=None):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        if bos:
            own.bos_token = bos
        return own

    return make


def said(tokenizer, one):
    return tokenizer.decode(one.options[0].tokens)


@pytest.mark.parametrize(
    "template, expected",
    [
        (PLAIN, "a dull film .<eos>\nNo<eos>\n"),
        (THINKING, "a dull film .<eos>\nNo<eos>\n"),
        (MARKED, "a dull film .<eos>No<eos>"),
    ],
    ids=["plain", "thinking", "marked"],
)
def test_the_tokens_of_all_the_assistants_turns_and_no_others(speaking, template, expected):
    tokenizer = speaking(template)
    (one, last), truncated = encode_chats([chat(*CHAT), chat(*CHAT, ("user", "Maybe?"))], tokenizer, 200)
    assert (said(tokenizer, one), truncated) == (expected, 0)
    assert one == last  # what follows the last turn is left out
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], return_dict=False)
    (row,), (option,) = one.rows, one.options
    full = (*row, option.tokens[-1])
    assert full == tuple(whole[: len(full)]) and tokenizer.decode(full).endswith(expected[-6:])
    assert [full[place + 1] for place in option.places] == list(option.tokens)


@torch.no_grad()
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_loss_is_the_mean_over_the_assistants_tokens(speaking, template):
    model, tokenizer = build(), speaking(template)
    chats = [chat(*CHAT), chat(("system", "Maybe"), ("user", "No?"), ("assistant", "a charming journey"))]
    encoded, _ = encode_chats(chats, tokenizer, 60)
    expected = []
    for one in encoded:
        ids = torch.tensor([[*one.rows[0], one.options[0].tokens[-1]]])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        expected.append(losses[list(one.options[0].places)].mean())
    assert len(encoded[0].options[0].tokens) < len(encoded[0].rows[0])
    batch = collate(encoded, 0)
    for given in (batch, batch.rounded()):
        found = per_example_loss(model, given, 2)
        torch.testing.assert_close(found, torch.stack(expected).expand(2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bos", [None, "<eos>"])
def test_a_long_chat_loses_its_beginning_but_for_the_bos(speaking, bos):
    tokenizer = speaking("{{ bos_token }}" + PLAIN if bos else PLAIN, bos)
    (whole,), none = encode_chats([chat(*CHAT)], tokenizer, 200)
    room = 1 + len(whole.rows[0]) - whole.options[0].places[3]  # the first turn is cut within
    (cut,), truncated = encode_chats([chat(*CHAT)], tokenizer, room)
    assert (none, truncated) == (0, 1)
    kept = int(bos is not None)
    assert len(cut.rows[0]) + 1 == room and cut.rows[0][:kept] == whole.rows[0][:kept]
    assert cut.rows[0][kept:] == whole.rows[0][kept + len(whole.rows[0]) + 1 - room :]
    tokens = cut.options[0].tokens
    assert 0 < len(tokens) < len(whole.options[0].tokens) and tokens == whole.options[0].tokens[-len(tokens) :]
    full = (*cut.rows[0], tokens[-1])
    assert [full[place + 1] for place in cut.options[0].places] == list(tokens)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(speaking):
    tokenizer = speaking(DATED)
    (one,), _ = encode_chats([chat(*CHAT)], tokenizer, 200)
    assert tokenizer.decode(one.rows[0]).startswith("26 Jul 2024\n<|user|>\nIt was?")


def test_fingerprints_see_the_places(speaking):
    pieces = Encoded(((1, 2, 3),), (Scattered(0, (0, 2), (2, 4)),), 0)
    moved = Encoded(((1, 2, 3),), (Scattered(0, (1, 2), (2, 4)),), 0)
    assert fingerprint([pieces]) != fingerprint([moved])
    # Frozen: journals hold it.
    assert repr(Encoded(((1, 2),), (Option(0, 1, (3,)),), 0)) == "Encoded(rows=((1, 2),), options=(Option(row=0, start=1, tokens=(3,)),), label=0)"


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, CHAT, "tokenizer: no chat template; expected one chat template.*chat_template.jinja"),
        ({"a": PLAIN, "b": PLAIN}, CHAT, "tokenizer: several chat templates and none called default"),
        (UNEVEN, CHAT, "f line 3: .*renders the chat up to message 2 otherwise when more follows.*generation"),
        (PLAIN, CHAT[1:], "f line 3: the first message is the assistant's; expected another before it"),
        (REFUSING, CHAT, "f line 3: .*cannot render it .a system message must come first"),
        ("{{ messages[0].content.nothing.more }}", CHAT, "f line 3: .*cannot render it"),
        ("{% for", CHAT, "f line 3: .*cannot render it"),
        (PLAIN, CHAT[:1], "f line 3: no token of the assistant; expected a message of the role assistant"),
        (MARKED, CHAT[:1], "f line 3: no token of the assistant"),
    ],
)
def test_chats_that_cannot_be_used(speaking, template, messages, message):
    with pytest.raises(BadInput, match=message):
        encode_chats([chat(*messages, source="f line 3")], speaking(template), 200)


def test_uneven_templates_serve_chats_of_one_turn(speaking):
    tokenizer = speaking(UNEVEN.replace("{% if loop.last %}", "{% if loop.last and m.role == 'assistant' %}"))
    (one,), _ = encode_chats([chat(*CHAT[:2])], tokenizer, 200)
    assert said(tokenizer, one) == "<think></think>a dull film .<eos>\n"
    closing = speaking(PLAIN.replace("{% endif %}", "{% else %}<end>{% endif %}"))
    (one,), _ = encode_chats([chat(*CHAT[:2])], closing, 200)
    assert said(closing, one) == "a dull film .<eos>\n<end>"
    with pytest.raises(BadInput, match="up to message 2 otherwise"):
        encode_chats([chat(*CHAT)], closing, 200)


def test_records():
    task = get_task("messages")
    assert task.chat and not task.generation
    made = task.make({"messages": [{"role": r, "content": c, "weight": 1} for r, c in CHAT], "id": 7})
    assert made == chat(*CHAT)
    with pytest.raises(BadInput, match="task messages: prompt set; expected no such setting: its prompt is the tokenizer's"):
        get_task("messages", prompt="{x}")
    with pytest.raises(BadInput, match="Did you mean messages"):
        get_task("message")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "a"}, "no field 'messages'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "Hi"}, "messages is str"),
        ({"messages": ["Hi"]}, "message 1 has no text 'role'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "message 2 has no text 'content'"),
        ({"messages": [{"from": "human", "value": "a"}]}, "message 1 has no text 'role'"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message):
        get_task("messages").make(record)
