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
