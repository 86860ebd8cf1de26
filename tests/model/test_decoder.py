"""The decoder against transformers' own, for every family; and which models are left to transformers."""

import pytest
import torch
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

from qzo.model import decoder as module
from qzo.model.decoder import decode, is_plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PLAIN = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, all heads, biases": lambda: LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True)),
    "llama 3's angles": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "llama, yarn": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=48)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
}
LEFT = {
    "a short window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)),
    "angles by length": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=DYNAMIC)),
    "another activation": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu")),
    "sliding layers": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**{k: v for k, v in SMALL.items() if k in ("vocab_size", "hidden_size", "max_position_embeddings")},
                                            num_hidden_layers=2, num_attention_heads=4, ffn_dim=44, word_embed_proj_dim=32)),
}  # fmt: skip


def build(make, dtype=torch.float32):
    torch.manual_seed(0)
    model = make().to(DEVICE, dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def rows(count=3, length=40):
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def theirs(model, input_ids):
    return model.get_decoder()(input_ids=input_ids, use_cache=False)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_equals_transformers(kind, dtype, monkeypatch):
    model = build(PLAIN[kind], dtype)
    for input_ids in (rows(), rows(1, 1), rows(2, 17)):
        expected = theirs(model, input_ids)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.get_decoder()), "forward", None)
            found = decode(model, input_ids)
        assert is_plain(model, input_ids.shape[1]) and found.dtype == dtype
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_to_transformers(kind):
    model = build(LEFT[kind])
    assert not is_plain(model, 40)
    assert torch.equal(decode(model, rows()), theirs(model, rows()))


def test_a_window_as_long_as_the_rows_is_none():
    model = build(LEFT["a short window"])
    assert is_plain(model, 16) and not is_plain(model, 17)
    torch.testing.assert_close(decode(model, rows(2, 16)), theirs(model, rows(2, 16)), rtol=1e-4, atol=1e-4)


def test_training_and_gradients_are_left_to_transformers():
    model = build(PLAIN["llama"])
    assert not is_plain(model.train(), 40) and is_plain(model.eval(), 40)
    model.requires_grad_(True)
    decode(model, rows()).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    with torch.no_grad():
        assert is_plain(model, 40)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padding_on_the_right_reaches_nothing(kind):
    model, input_ids = build(PLAIN[kind]), rows()
    other = input_ids.clone()
    other[:, 30:] = 7
    assert torch.equal(decode(model, input_ids)[:, :30], decode(model, other)[:, :30])


def test_angles_are_made_once_per_length(monkeypatch):
    model, calls = build(PLAIN["llama"]), []
    forward = type(model.model.rotary_emb).forward
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", lambda *a: calls.append(1) or forward(*a))
    for length in (16, 32, 16, 32):
        decode(model, rows(1, length))
    kept = module._angles[model.model.rotary_emb]
    assert len(calls) == len(kept) == 2
    assert torch.equal(kept[16, torch.float32, rows().device][0], kept[32, torch.float32, rows().device][0][:16])
