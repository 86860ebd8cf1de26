"""Fake quantization in plain PyTorch, the arithmetic of ZeroQAT (arXiv 2509.00031): the definition of correct for kernels to come.

Weights, asymmetric and uniform, by row and group of columns; c_low, c_high fp32 [N, G] are the logits of LWC's two bounds:

    low  = sigmoid(c_low) · min(0, min_g W)      high = sigmoid(c_high) · max(0, max_g W)
    Δ    = max((high - low) / (2^b - 1), FLOOR)  z    = round(-low / Δ), a code: 0 … 2^b - 1
    Q(W) = Δ · (clamp(round(W / Δ) + z, 0, 2^b - 1) - z)

A logit of 3 keeps 95 % of a side, +infinity all of it: rounding to nearest without clipping. The range holds 0, so that z is a code and a
packed checkpoint can store it. (Δ, z) are computed apart from Q: once per update, and frozen across the ± pair of a step.

Activations, by row (a token; a token and head for q, k, v of attention), with nothing learned or kept:

    Δ = max((max x - min x) / (2^b - 1), FLOOR),   z = round(-min x / Δ),   x̂ = Δ · (clamp(round(x / Δ) + z, 0, 2^b - 1) - z)

The range is the row's own, without 0 if 0 is not in it. 16 bits are no quantization. All in fp32, ties to even.
"""
