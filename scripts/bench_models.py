"""Models of bench_step with random weights, built where they will run; a task's batch; and the steps they are timed with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from qzo_kernels.pack import tiled_words
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qzo.data.batches import Batch
from qzo.model.uniform import LayerTensors
from qzo.model.linear import QuantLinear, Scratch

BITS, GROUP, SPREAD = 4, 128, 0.02
CONFIGS = {
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 64},
}


def config(like: str) -> LlamaConfig:
    return LlamaConfig(**CONFIGS[like], max_position_embeddings=4096, use_cache=False, tie_word_embeddings=False)


def skeleton(like: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model without its weights, on meta."""
    with torch.device("meta"):
        return LlamaForCausalLM(config(like)).to(dtype).eval().requires_grad_(False)


def fill(model: LlamaForCausalLM, device: torch.device) -> None:
    """Random values for every parameter still on meta; the rotary frequencies are computed."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                made = torch.empty(value.shape, dtype=value.dtype, device=device)
                made.fill_(1.0) if value.dim() == 1 else made.normal_(0.0, SPREAD)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)


def dense_model(like: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The 16-bit model."""
    model = skeleton(like, dtype)
    fill(model, device)
    return model


def quantized_model(like: str, device: torch.device, dtype: torch.dtype, bits: int = BITS) -> tuple[LlamaForCausalLM, dict[str, QuantLinear]]:
    """The same with quantized linears, groups of 128, but for the head, and their map by name."""
    model, scratch, layers = skeleton(like, dtype), Scratch(), {}
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            rows, cols = module.out_features, module.in_features
            codes = torch.randint(-(1 << 31), 1 << 31, (rows, tiled_words(cols, bits)), dtype=torch.int32, device=device)
            # Codes are uniform in -2^(bits - 1) ... 2^(bits - 1) - 1, whose root mean square is 0.29 times their number.
            scales = (0.5 + torch.rand(rows, -(-cols // GROUP), device=device)).mul_(SPREAD / (0.29 * 2**bits))
            layer = QuantLinear(f"model.{name}", LayerTensors(codes, scales, None, None), bits, GROUP, cols, None, scratch)
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, layer)
            layers[layer.name] = layer
    fill(model, device)
    return model, layers


def batch_of(rows: int, length: int, vocabulary: int, device: torch.device) -> Batch:
    """Random tokens, two options of one token at the last position of every row: the shape of SST-2."""
    row = torch.arange(rows)
    options = torch.tensor([vocabulary // 3, vocabulary // 2]).expand(rows, 2)[:, :, None]
    mask = torch.ones(rows, 2, 1, dtype=torch.bool)
    batch = Batch(
        input_ids=torch.randint(0, vocabulary, (rows, length)), positions=row * length + length - 1,
        pair_position=row[:, None, None].expand(rows, 2, 1).contiguous(), pair_token=options.contiguous(), pair_mask=mask,
        option_mask=mask.any(2), labels=torch.randint(0, 2, (rows,)), tokens=rows * length,
    )  # fmt: skip
    return batch.to(device)


def eager_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The same loss through transformers alone, logits of the last position only."""
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1).logits[:, 0].float()
    return nn.functional.cross_entropy(logits.gather(1, batch.pair_token[:, :, 0]), batch.labels)


def two_forwards(model: LlamaForCausalLM, batch: Batch) -> None:
    for _ in range(2):
        eager_loss(model, batch)


class MeZO:
    """MeZO (arXiv 2305.17333), Algorithm 1, on all parameters, z drawn again from the step's seed each time:

        w <- w + eps z,  l+;   w <- w - 2 eps z,  l-;   w <- w + eps z;   d = (l+ - l-) / 2 eps;   w <- w - lr d z

    in_place: w is moved by one fused addition; otherwise by the products and the sum as they stand, each a new tensor, which is
    how the authors' program runs.
    """

    def __init__(self, model: nn.Module, in_place: bool, eps: float = 1e-3, lr: float = 1e-9):
        self.parameters: Sequence[nn.Parameter] = list(model.parameters())
        self.in_place, self.eps, self.lr, self.seed = in_place, eps, lr, 0

    def _move(self, amount: Callable[[Tensor], Tensor], scale: float) -> None:
        torch.manual_seed(self.seed)
        for w in self.parameters:
            z = torch.normal(0.0, 1.0, size=w.shape, device=w.device, dtype=w.dtype)
            if self.in_place:
                w.data.add_(z, alpha=scale)
            else:
                w.data = w.data + amount(z)

    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step; returns d."""
        self.seed += 1
        losses = []
        for sign in (1, -2):
            self._move(lambda z, s=sign: s * z * self.eps, sign * self.eps)
            losses.append(loss())
        self._move(lambda z: 1 * z * self.eps, self.eps)
        d = ((losses[0] - losses[1]) / (2 * self.eps)).item()
        self._move(lambda z: -(self.lr * (d * z)), -self.lr * d)
        return d


PARTS = [  # the first whose word is in a kernel's name
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax_warp")),
    ("update", ("_update_kernel", "update_")),
    ("noise", ("_noise_kernel", "_noisy_weight")),
    ("perturb", ("_perturb",)),
    ("dequantize", ("_dequantize_kernel", "dequantize")),
    ("norms, rotary, SwiGLU", ("rms_norm", "rotary", "silu")),
    ("matmul", ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk", "split_k", "matmul", "fused", "cublas")),
]


def part_of(kernel: str) -> str:
    """Which part of a step a kernel belongs to, by its name."""
    lowered = kernel.lower()
    return next((part for part, words in PARTS if any(word in lowered for word in words)), "other")


def parts(kernels: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Milliseconds of each part, from (kernel, milliseconds); and the largest kernels of "other"."""
    total: dict[str, float] = {}
    for name, time in kernels:
        total[part_of(name)] = total.get(part_of(name), 0.0) + time
    rest = sorted(((time, name) for name, time in kernels if part_of(name) == "other"), reverse=True)[:8]
    return {"ms": dict(sorted(total.items(), key=lambda item: -item[1])), "largest of other": [f"{time:.3f} {name[:100]}" for time, name in rest]}
