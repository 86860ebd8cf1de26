"""Folders of other formats than GPTQ with random codes, packed here field by field as the layouts are published."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Dense = dict[str, torch.Tensor]


def pack(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Whole numbers [R, C] -> int32 [R, ceil(C·bits/32)]; field i of a word holds column order[i] of the word's."""
    per = 32 // bits
    order = order or tuple(range(per))
    rows, cols = values.shape
    words = torch.zeros(rows, -(-cols // per), dtype=torch.int64)
    for field, column in enumerate(order):
        part = values[:, column::per].long() << (bits * field)
        words[:, : part.shape[1]] |= part
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def random_linear(shape: torch.Size, bits: int, size: int, sym: bool, g_idx: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """codes [N, K], zeros [N, G], scales [N, G] in fp16, and the weight in fp32."""
    rows, groups = shape[0], -(-shape[1] // size)
    codes = torch.randint(0, 1 << bits, shape)
    zeros = torch.full((rows, groups), 1 << (bits - 1)) if sym else torch.randint(0, 1 << bits, (rows, groups))
    scales = ((1 + torch.rand(rows, groups)) / (1 << bits)).half()
    return codes, zeros, scales, scales.float()[:, g_idx] * (codes - zeros[:, g_idx])


def _write(base: Path, out: Path, config: dict, make, dense_part: str = "") -> tuple[Path, Dense]:
    """make(name, shape) -> (tensors to store, weight) of a Linear. Returns the folder and the weights of the same model in fp32."""
    shutil.copytree(base, out)
    stored, dense = {}, {}
    torch.manual_seed(7)
    for name, value in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight") and not (dense_part and dense_part in name):
            module = name.removesuffix(".weight")
            parts, dense[name] = make(module, value.shape)
            stored.update({f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()})
        else:
            stored[name], dense[name] = value, value.float()
    save_file(stored, out / "model.safetensors")
    document = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**document, "quantization_config": config}))
    return out, dense


def make_awq(base: Path, out: Path, size: int = 32, sym: bool = False, but: str = "") -> tuple[Path, Dense]:
    def make(module, shape):
        whole = shape[1] if size == -1 else size
        codes, zeros, scales, weight = random_linear(shape, 4, whole, sym, torch.arange(shape[1]) // whole)
        return {"qweight": pack(codes.t(), 4, AWQ_ORDER), "qzeros": pack(zeros.t(), 4, AWQ_ORDER), "scales": scales.t()}, weight

    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": size, "zero_point": not sym}
    return _write(base, out, {**config, "modules_to_not_convert": [but] if but else None}, make, but)


def make_compressed(base: Path, out: Path, bits: int = 4, size: int = 32, sym: bool = False, order: bool = False) -> tuple[Path, Dense]:
    def make(module, shape):
        whole = shape[1] if size == -1 else size
        g_idx = torch.arange(shape[1]) // whole
        g_idx = g_idx[torch.randperm(shape[1])] if order else g_idx
        codes, zeros, scales, weight = random_linear(shape, bits, whole, sym, g_idx)
        parts = {"weight_packed": pack(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(shape)}
        if not sym:
            parts["weight_zero_point"] = pack(zeros.t(), bits).t()
        return parts | ({"weight_g_idx": g_idx.int()} if order else {}), weight

    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    weights |= {"actorder": "group"} if order else {}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return _write(base, out, config, make)


def make_int8(base: Path, out: Path, sym: bool = True) -> tuple[Path, Dense]:
    """LLM.int8, which is always symmetric."""

    def make(module, shape):
        weight, scb = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0]) + 0.1
        parts = {"weight": weight, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, (scb / 127)[:, None] * weight

    return _write(base, out, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": None}, make)


NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)


def make_4bit(base: Path, out: Path, kind: str = "nf4", size: int = 8, nested: int = 0, sym: bool = True) -> tuple[Path, Dense]:
    """bitsandbytes; nested: how many absmax share one of the second quantization, 0 for none."""
    levels = torch.tensor(NF4 if kind == "nf4" else FP4 + tuple(-x for x in FP4))

    def make(module, shape):
        codes, blocks = torch.randint(0, 16, shape), shape[0] * shape[1] // size
        nibbles = codes.view(-1, 2)
        state = {"quant_type": kind, "blocksize": size, "dtype": "float16", "shape": list(shape)}
        parts = {"weight": (nibbles[:, :1] * 16 + nibbles[:, 1:]).to(torch.uint8), "weight.quant_map": levels.clone()}
        absmax = torch.rand(blocks) + 0.1
        if nested:
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.7}
            inner, outer, table = torch.randint(0, 256, (blocks,)), torch.rand(-(-blocks // nested)), torch.linspace(-1, 1, 256)
            parts |= {"weight.absmax": inner.to(torch.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": table}
            absmax = table[inner] * outer[torch.arange(blocks) // nested] + 0.7
        else:
            parts["weight.absmax"] = absmax
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts, absmax[torch.arange(codes.numel()) // size].view(shape) * levels[codes]

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(nested)}
    return _write(base, out, config, make)


def make_aqlm(base: Path, out: Path, count: int, bits: int) -> tuple[Path, Dense]:
    """`count` codebooks of 2**bits random vectors; the same codebooks for every Linear."""
    books = torch.randn(count, 1 << bits, 1, 8, generator=torch.Generator().manual_seed(5)).half()

    def make(module, shape):
        rows, groups = shape[0], shape[1] // 8
        plain = torch.randint(0, 1 << bits, (rows, groups, count))
        scales = ((0.5 + torch.rand(rows, 1, 1, 1)) / shape[1] ** 0.5).half()
        whole = sum(books[c, :, 0].float()[plain[..., c]] for c in range(count))
        small = torch.int16 if bits == 16 else torch.int8
        codes = torch.where(plain >= 1 << (bits - 1), plain - (1 << bits), plain).to(small)
        return {"codes": codes, "codebooks": books.clone(), "scales": scales}, whole.flatten(1) * scales[:, 0, 0].float()

    config = {"quant_method": "aqlm", "num_codebooks": count, "nbits_per_codebook": bits, "in_group_size": 8, "out_group_size": 1,
              "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight", "model.embed_tokens.weight"]}  # fmt: skip
    return _write(base, out, config, make)
