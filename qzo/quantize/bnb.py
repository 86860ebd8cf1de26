"""bitsandbytes' own quantizers, tensor by tensor: LLM.int8 (arXiv 2208.07339), NF4 and FP4 (arXiv 2305.14314).

int8: W[n, k] = q·SCB[n]/127, SCB the largest absolute value of a row; nf4 and fp4: W[n, k] = absmax[n, k // B]·level[code]. All
round to nearest, without data. What is written is what transformers saves: see model/bnb8_format.py and bnb4_format.py.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import BadInput
from qzo.model.bnb4_format import LEVELS
from qzo.model.bnb8_format import scales_of
from qzo.model.files import one_line
from qzo.model.save import FolderWriter
from qzo.model.uniform import Quantization
from qzo.quantize.walk import Walk, finite_weight, relative_error

METHODS = ("int8", *LEVELS)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # codes per absmax that the library has


def settings(method: str, bits: int | None, block: int | None) -> Quantization:
    """What will be written; None: 8 bits and whole rows for int8, 4 bits and blocks of 64 for the others. Raises BadInput for what the
    method does not have, and where the library is missing."""
    width, sizes = (8, (-1,)) if method == "int8" else (4, _BLOCKS)
    if bits not in (None, width):
        raise BadInput("bits", f"{bits} with method {method}", str(width))
    block = (-1 if method == "int8" else 64) if block is None else block
    if block not in sizes:
        raise BadInput("group_size", f"{block} with method {method}", " or ".join(map(str, sizes)))
    library(method)
    return Quantization(width, block, version=f"bitsandbytes-{width}bit", codebook=method != "int8")


def library(method: str) -> ModuleType:
    """bitsandbytes.functional. Raises BadInput where it cannot be imported."""
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput("method", f"{method}, and no bitsandbytes ({one_line(error)})", "the package",
                       "pip install 'qzo[bitsandbytes]', or use method gptq or rtn.") from error  # fmt: skip
    return functional


def quantize_weight(weight: Tensor, method: str, block: int) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of a Linear by the end of their names, the weight that they say in fp32) of weight [N, K] in fp16, bf16 or fp32."""
    functional = library(method)
    if method == "int8":
        # A copy, as the library may write to it; in fp16, which it takes.
        codes, scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16, copy=True))
        parts = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, codes.float() * scales_of(scb)[:, None]
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=method)
    parts = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return parts, functional.dequantize_4bit(packed, state).float()


class BnbWalk(Walk):
    """Quantizes the Linears of all decoder layers by `method`, one of METHODS; further arguments as Walk takes them."""

    def __init__(self, method: str, *arguments: Any):
        super().__init__(*arguments)
        self.method = method

    def _quantize(self, name: str, layer: nn.Module, subset: list[str], hessian: Tensor | None, writer: FolderWriter) -> float:
        full = f"{name}.{subset[0]}"
        weight = finite_weight(self.folder, full, self.device)
        parts, restored = quantize_weight(weight, self.method, self.config.group_size)
        for part, value in parts.items():
            writer.add(f"{full}.{part}", value)
        return relative_error(weight.float(), restored, None)

    def documents(self, names: list[str]) -> tuple[dict[str, Any], dict[str, dict]]:
        from transformers import BitsAndBytesConfig

        # Named one by one: by default a reader would quantize some that are not.
        skipped = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and name not in set(names)]
        how: dict[str, Any] = {"llm_int8_skip_modules": skipped}
        if self.method == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, **how).to_dict(), {}
        how |= {"bnb_4bit_quant_type": self.method, "bnb_4bit_compute_dtype": self.folder.read(f"{names[0]}.weight").dtype}
        return BitsAndBytesConfig(load_in_4bit=True, **how).to_dict(), {}
