"""The fake-quantized modules of ZeroQAT (arXiv 2509.00031). What is stored, and what a forward sees as a function of it.

A FakeQuantLinear has, for a weight of N rows, K columns, G = ceil(K / group_size) groups:

    weight    [N, K] fp32 or bf16: the latent W, as in the checkpoint: neither smoothed nor rounded. Moved by a target `latent`
    bias      [N] or None: B, as in the checkpoint
    low, high [N, G] fp32: logits of the clipping bounds (LWC). Moved by a target `quantizer`
    s, δ      of the places before and after it, fp32: they belong to a Site (model/smoothing.py), which several modules share.
              Moved by a target `quantizer`
    step, zero [N, G] fp32 and offset [N]: the frozen grid (Δ, z) and the bias. `refresh()` makes them of all of the above, once per
              update: a step's ± pair sees one grid, and one bias. A target may also move Δ and z themselves, after a refresh.

    S = s_in ⊙ W ⊘ s_out                            [N, K]: the smoothed weight; (Δ, z) are those of S
    y = Q_a(x) · Q(S; Δ, z)ᵀ + offset               offset = (B + W δ_in - δ_out) ⊘ s_out, with W before rounding

x is what the module before it already shifted and scaled, or, at a site without such a module, (x - δ_in) ⊘ s_in is taken here.
The step that W[n, k] itself sees is Δ[n, g]·s_out[n] / s_in[k]. A forward stores nothing: no effective weight outlives it.

A FoldedNorm is an RMSNorm or LayerNorm whose weight w ⊘ s and bias (b - δ) ⊘ s are made in every forward ([H] numbers); b is 0 where
the norm has none: δ needs a bias that RMSNorm models lack. q_norm and k_norm of a head are folded in the same way, with s alone.

q, k and v are quantized by token and head as they enter the attention product (after rotary embedding), to `operand_bits` of their
attention module. Softmax and its product stay in the model's dtype.
"""
