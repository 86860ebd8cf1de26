"""Initial clipping and smoothing of ZeroQAT, one decoder layer in memory at a time, by forwards alone.

Two streams of calibration windows go through the layers: those of the 16-bit model and those of the model quantized so far. Of a layer

    E = mean ‖F(h) - F̂(ĥ)‖²          F the 16-bit layer on its stream, F̂ the quantized one on the other

is measured. In this order, each kept only where it lowers E:
1. smoothing, site by site: δ on or off, exponent a of the rule s = max|X - δ|^a / max|W|^(1 - a), or no scale (only with low-bit activations);
2. clipping, Linear by Linear in call order (quantize/clipping.py), on the inputs that the quantized Linears before it produce.

Out comes per layer what a target moves later: {"<linear>.low", "<linear>.high": fp32 [N, G], "<site>.scale", "<site>.shift": fp32}.
The paper lets a first-order reconstruction of the block do this (OmniQuant); this project has no backward pass.
"""
