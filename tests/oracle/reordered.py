"""Run in a process of its own, with compressed-tensors 0.9.4 on the path: the last series that knows actorder=group.

    reordered.py compress FOLDER   model.safetensors of 16 bits -> symmetric 4 bits, groups of 32 in a random order
    reordered.py decompress FOLDER OUT   its weights as the library unpacks them
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file

ARGS = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_g_idx")


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    cols = weight.shape[1]
    g_idx = (torch.arange(cols) // 32)[torch.randperm(cols)].int()
    groups = weight[:, torch.argsort(g_idx)].view(len(weight), -1, 32)
    scales = groups.abs().amax(2) / 7.5
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    made = PackedQuantizationCompressor().compress_weight(weight, scales, ARGS, zero_point=zeros, g_idx=g_idx)
    return {**made, "weight_scale": scales, "weight_g_idx": g_idx}


def main(verb: str, folder: str, out: str = "") -> None:
    torch.manual_seed(0)
    path, made = Path(folder) / "model.safetensors", {}
    tensors = load_file(path)
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if verb == "compress" and name.endswith("_proj.weight"):
            made.update({f"{module}.{key}": tensor for key, tensor in compress(value).items()})
        elif part == "weight_packed":
            parts = {key: tensors[f"{module}.{key}"] for key in PARTS}
            made[f"{module}.weight"] = PackedQuantizationCompressor().decompress_weight(parts, ARGS)
        elif part not in PARTS:
            made[name] = value
    save_file({name: value.contiguous() for name, value in made.items()}, out or path)


main(*sys.argv[1:])
