"""The forward of a decoder as a step measures it: no cache, no mask, few kernels, nothing that waits for the device.

The modules are transformers' own, and so are the roundings: other shapes of the same arithmetic, h = h + f(norm(h)).
"""

from weakref import WeakKeyDictionary

import torch
from qzo_kernels.ops_asym import fake_quantize_rows
from qzo_kernels.ops_elementwise import rms_norm, rotary, silu_mul
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qzo.model.qat import FoldedNorm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Frequencies of the other types depend on the length of the input.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Tables of angles by (length, dtype), kept as long as their module: a captured graph reads them.
_angles: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def is_plain(model: nn.Module, length: int) -> bool:
    """Whether `decode` itself computes rows of `length` tokens, rather than transformers."""
    decoder, config = model.get_decoder(), model.config
    if config.model_type not in FAMILIES or config.hidden_act != "silu" or decoder.training:
        return False
    rope, window = decoder.rotary_emb.rope_type, getattr(config, "sliding_window", None)
    if rope not in _ROPE_TYPES or window is not None and length > window:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()))


def decode(model: nn.Module, input_ids: Tensor, embedded: Tensor | None = None) -> Tensor:
    """Hidden states [R, T, H] after the final norm, for input_ids int64 [R, T] whose rows are padded on the right.

    embedded [R, T, H]: their embeddings, where they are at hand. Causal without a mask: what stands in a padded place reaches no place before it.
    """
    decoder = model.get_decoder()
    if not is_plain(model, input_ids.shape[1]):
        return decoder(input_ids=input_ids, use_cache=False)[0]
    hidden = decoder.embed_tokens(input_ids) if embedded is None else embedded
    cos, sin = _tables(decoder.rotary_emb, hidden)
    normed, hidden = _norm(decoder.layers[0].input_layernorm, hidden)
    following = [*(layer.input_layernorm for layer in decoder.layers[1:]), decoder.norm]
    for layer, norm in zip(decoder.layers, following, strict=True):
        attended = _attention(layer.self_attn, normed, cos, sin)
        normed, hidden = _norm(layer.post_attention_layernorm, attended, hidden)
        mlp = layer.mlp
        changed = mlp.down_proj(silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))
        normed, hidden = _norm(norm, changed, hidden)
    return normed


def _norm(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, bias = norm.folded() if isinstance(norm, FoldedNorm) else (norm.weight, None)
    normed, hidden = rms_norm(x, weight, norm.variance_epsilon, residual)
    return (normed if bias is None else normed + bias), hidden


def _attention(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    if hasattr(attention, "q_norm"):
        q, k = _norm_heads(attention.q_norm, q), _norm_heads(attention.k_norm, k)
    q, k = rotary(q, k, cos, sin)
    v = v.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q, k, v = (fake_quantize_rows(t, getattr(attention, "operand_bits", 16)) for t in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _norm_heads(norm: nn.Module, x: Tensor) -> Tensor:
    return _norm(norm, x.unflatten(-1, (-1, len(norm.weight))))[0].flatten(2)


def _tables(rope: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of the places 0 … T − 1, in the dtype and on the device of `like` [R, T, H]."""
    tables = _angles.setdefault(rope, {})
    key = (like.shape[1], like.dtype, like.device)
    if key not in tables:
        cos, sin = rope(like, torch.arange(like.shape[1], device=like.device)[None])
        tables[key] = cos[0].contiguous(), sin[0].contiguous()
    return tables[key]
