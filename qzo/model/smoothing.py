"""Where a decoder layer is smoothed (ZeroQAT, arXiv 2509.00031; OmniQuant, arXiv 2308.13137), exactly, for every family.

    Y = [(X - δ) ⊘ s]·[s ⊙ W] + [B + W δ]           s > 0 and δ fp32, per channel of X

A Site is one X: its s and δ, who makes X (and so shifts and scales it: the fold) and which Linears read it:

    site       X                       made by                        read by         entries
    attention  input of q, k, v        the norm before                q, k, v         H
    query_key  q and k, s only         q_proj ⊘ s, k_proj ⊙ s         each other      rotary: [heads of k, D/2], else [heads of k, D]
    value      v, and the mean of v    v_proj                         o_proj          [heads of v, D]
    mlp        input of gate, up, fc1  the norm before                gate, up; fc1   H
    inner      input of down, fc2      the reader takes (X - δ) ⊘ s   down; fc2       I

- Grouped queries: an entry of `value` serves the channel of all query heads that read this head of v, an entry of `query_key` those
  that read this head of k. Rows of attention sum to 1, so a δ of v arrives at o_proj unchanged.
- Rotary embedding mixes channels i and i + D/2 of a head: they share an entry. (It turns them by an angle, which a common factor
  passes and two factors, or a δ, do not: `query_key` has no δ.)
- q_norm and k_norm (Qwen3) would undo a factor on q_proj: it goes into their weights, which all heads share: [D/2] entries.
- A norm is a fold only where nothing else reads its output: not in models that normalize after attention (OPT-350m), whose Linears
  take (X - δ) ⊘ s themselves, as `inner` does everywhere: an activation function passes neither δ nor, but for ReLU, s.
- Scaling rows of a producer leaves its own rounding as it is, since each row has its own grid; only columns are made easier.

s enters as an exponent rule (SmoothQuant, arXiv 2211.10438): s = max|X - δ|^a / max|W|^(1 - a), both per channel, scaled to a geometric mean of 1; δ = (min X + max X) / 2.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qzo.errors import BadInput


class Site(nn.Module):
    """`scale` and `shift` fp32 [entries], 1 and 0 at first; no shift (None) where a site has no δ."""

    def __init__(self, entries: int, shifted: bool, device: torch.device):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(entries, device=device), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(entries, device=device), requires_grad=False) if shifted else None


@dataclass(frozen=True)
class Channels:
    """How a module sees a site: its channel c has entry index[c] (None: entry c). `inverse`: 1/s in place of s, as k has it against q."""

    site: Site
    index: Tensor | None = None
    inverse: bool = False

    def scale(self) -> Tensor:
        """fp32 [C]."""
        scale = self.site.scale.reciprocal() if self.inverse else self.site.scale
        return scale if self.index is None else scale[self.index]

    def shift(self) -> Tensor | None:
        """fp32 [C]."""
        shift = self.site.shift
        return shift if shift is None or self.index is None else shift[self.index]


@dataclass(frozen=True)
class Place:
    """A site among the modules of its layer, by name: `makers` shift and scale X, `readers` undo it. Without makers the readers do both."""

    site: Site
    makers: dict[str, Channels] = field(default_factory=dict)
    readers: dict[str, Channels] = field(default_factory=dict)


def places(layer: nn.Module) -> dict[str, Place]:
    """The sites of a decoder layer of transformers, whose weights are in memory. Raises BadInput, by name, for what cannot be smoothed."""
    attention, opt = layer.self_attn, hasattr(layer, "fc1")
    device = attention.q_proj.weight.device
    before = not opt or layer.do_layer_norm_before
    first, second = ("self_attn_layer_norm", "final_layer_norm") if opt else ("input_layernorm", "post_attention_layernorm")
    last = "fc2" if opt else "mlp.down_proj"
    return {
        "attention": _input(layer, first if before else None, [f"self_attn.{name}_proj" for name in "qkv"], device),
        "query_key": _query_key(attention, rotary=not opt, device=device),
        "value": _value(attention, f"self_attn.{'out' if opt else 'o'}_proj", device),
        "mlp": _input(layer, second if before else None, ["fc1"] if opt else ["mlp.gate_proj", "mlp.up_proj"], device),
        "inner": _input(layer, None, [last], device),
    }


def _input(layer: nn.Module, norm: str | None, readers: list[str], device: torch.device) -> Place:
    site = Site(layer.get_submodule(readers[0]).in_features, True, device)
    # A LayerNorm without weights has nothing to fold into.
    folds = norm is not None and layer.get_submodule(norm).weight is not None
    return Place(site, {norm: Channels(site)} if folds else {}, {name: Channels(site) for name in readers})


def _query_key(attention: nn.Module, rotary: bool, device: torch.device) -> Place:
    dim = attention.head_dim
    entries = dim // 2 if rotary else dim
    inside = torch.arange(dim, device=device) % entries
    if hasattr(attention, "q_norm"):
        if len(attention.q_norm.weight) != dim or len(attention.k_norm.weight) != dim:
            given = f"q_norm and k_norm of {len(attention.q_norm.weight)} and {len(attention.k_norm.weight)} channels"
            raise BadInput("smoothing", given, f"norms of one head of {dim}", "Smoothing does not know this attention.")
        site = Site(entries, False, device)
        return Place(site, {"self_attn.q_norm": Channels(site, inside), "self_attn.k_norm": Channels(site, inside, inverse=True)})
    heads, groups = attention.k_proj.out_features // dim, attention.q_proj.out_features // attention.k_proj.out_features
    site = Site(heads * entries, False, device)
    keys = (torch.arange(heads, device=device)[:, None] * entries + inside).flatten()
    return Place(site, {"self_attn.q_proj": Channels(site, _per_query_head(keys, dim, groups)),
                        "self_attn.k_proj": Channels(site, keys, inverse=True)})  # fmt: skip


def _value(attention: nn.Module, reader: str, device: torch.device) -> Place:
    rows, dim = attention.v_proj.out_features, attention.head_dim
    site = Site(rows, True, device)
    index = _per_query_head(torch.arange(rows, device=device), dim, attention.q_proj.out_features // rows)
    return Place(site, {"self_attn.v_proj": Channels(site)}, {reader: Channels(site, index)})


def _per_query_head(index: Tensor, dim: int, groups: int) -> Tensor:
    """[heads · dim] of key heads to [heads · groups · dim] of the query heads that read them, each key head's in a row."""
    return index.view(-1, 1, dim).expand(-1, groups, dim).flatten()
