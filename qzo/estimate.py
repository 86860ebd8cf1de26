"""What a run needs of its device's memory, by phase, from shapes alone: before a weight is read.

The rules follow what the code keeps: the tensors per token of qzo/model/decoder.py, one scratch for the widest layer where the table
of the kernels can reach it, the logits of one call of the head; on a GPU, what a step allocates stays in the pool of its graphs.
Compared with measured peaks in tests/test_estimate.py.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from qzo_kernels.dispatch import takes_fused
from qzo_kernels.pack import tiled_words

from qzo.data.batches import bucket
from qzo.data.encode import Encoded
from qzo.data.loss import HEAD_POSITIONS
from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.formats import Quantization, format_of, part_of
from qzo.model.packing import field
from qzo.model.zeroqat_format import LatentConfig

SLACK = "allocator, workspaces"  # the part that is of no tensor
PHASES = ("load", "step", "evaluate", "snapshot", "export")
_WORKSPACE = 96 << 20  # cuBLAS, on the streams of eager and of captured work
_SLACK = 0.01  # of everything: what the allocator rounds up and cannot use again
_PROBE = 32  # tokens of that sentence, at most
_STORED, _PACKING = 2, 12  # bytes of a latent on disk, and of one being packed: S in fp32, its quotient, its codes
_PLAIN, _REGRID = 4, 3  # fp32 tensors like a weight: of its noise, product and rounding; of a new grid
_HOLES = 1.25  # activations of two sizes come and go, and leave holes: measured


@dataclass(frozen=True)
class Work:
    """The largest forward of a phase: `rows` of up to `length` tokens, `predictions` of which count, seen by `variants` of the noise.

    cached: tokens per row whose keys and values a generation keeps.
    """

    rows: int
    length: int
    predictions: int
    variants: int = 1
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * bucket(self.length)


def largest(encoded: Sequence[Encoded]) -> Work:
    """The work of one example that is as large as any, in rows, tokens and predictions."""
    rows = max(len(e.rows) for e in encoded)
    predictions = max(sum(len(option.tokens) for option in e.options) for e in encoded)
    return Work(rows, max(len(row) for e in encoded for row in e.rows), predictions)


@dataclass(frozen=True)
class Linear:
    """A quantized weight [rows, cols] of a decoder layer, by number; None outside of them."""

    rows: int
    cols: int
    layer: int | None = None


@dataclass(frozen=True)
class Shapes:
    """A model's quantized Linears, the elements of each other tensor by name, and its dimensions as transformers' config has them."""

    linears: tuple[Linear, ...]
    others: dict[str, int]
    quantization: Quantization
    config: dict
    streamed: bool = False  # the codes of the decoder layers lie in host memory, but for those of two
    embedded: bool = False  # a batch comes with its rows of embeddings, from host memory
    noisy_codes: bool = False  # forwards go through the scratch, for the noise is on the codes
    residuals: bool = False  # 2 bytes beside each code
    latents: tuple[Linear, ...] = ()  # FakeQuantLinears, which are not among `linears`
    latent_bytes: int = 4  # of a latent weight: 4 where they move, else as the folder has them
    latents_streamed: bool = False  # they lie in host memory, but for those of two decoder layers
    regrid: bool = False  # their grids are made anew in every forward

    def host_codes(self) -> Counter[int]:
        """Bytes of codes in host memory by decoder layer."""
        inside = [linear for linear in self.linears if self.streamed and linear.layer is not None]
        return sum((Counter({linear.layer: self.code_bytes(linear)}) for linear in inside), Counter())

    def host_latents(self) -> Counter[int]:
        """Bytes of latents in host memory by decoder layer."""
        found: Counter[int] = Counter()
        for linear in self.latents if self.latents_streamed else ():
            found[linear.layer] += self.latent_bytes * linear.rows * linear.cols
        return found

    def code_bytes(self, linear: Linear) -> int:
        return 4 * linear.rows * tiled_words(linear.cols, field(self.quantization.bits))

    @classmethod
    def of(cls, folder: Folder, quantization: Quantization) -> "Shapes":
        """Raises BadInput where no tensor is quantized."""
        from transformers import AutoConfig

        linears, others, layout = [], {}, format_of(quantization)
        for tensor in folder.tensors:
            part = part_of(folder, tensor, quantization)
            if part is None or part[1] == "codebooks":
                others[tensor] = torch.Size(folder.shape(tensor)).numel()
            elif part[1] == layout.CODES:
                inside = re.search(r"(?:^|\.)layers\.(\d+)\.", tensor)
                linears.append(Linear(*layout.shape(folder, part[0], quantization), int(inside[1]) if inside else None))
        if not linears:
            raise BadInput(str(folder.path), "a quantization config and no quantized tensor", ", ".join(layout.PARTS))
        # With the defaults of what config.json leaves out.
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False).to_dict()
        return cls(tuple(linears), others, quantization, config)

    @classmethod
    def of_latent(cls, folder: Folder, config: LatentConfig, moving: Collection[str] | None, regrid: bool) -> "Shapes":
        """Of a latent checkpoint in which weights of the last names `moving` move (None: all; none: no weight), and the others are packed."""
        from transformers import AutoConfig

        names = {name.removesuffix(".low") for name in folder.tensors if name.endswith(".low")}
        own = {f"{name}.{key}" for name in names for key in ("weight", "low", "high", "factor", "move")}
        others = {name: torch.Size(folder.shape(name)).numel() for name in folder.tensors if name not in own}
        packed, latents = [], []
        for name in sorted(names):
            inside = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
            linear = Linear(*folder.shape(f"{name}.weight"), int(inside[1]) if inside else None)
            (packed if moving and name.rpartition(".")[2] not in moving else latents).append(linear)
        if not latents:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise BadInput("latent_layers", ", ".join(moving or ()) or "none", f"some of {known or 'the Linears, of which the folder has none'}")
        stored = 2 if moving is not None and not moving else 4
        document = AutoConfig.from_pretrained(folder.path, trust_remote_code=False).to_dict()
        return cls(tuple(packed), others, config, document, latents=tuple(latents), latent_bytes=stored, regrid=regrid)

    @property
    def hidden(self) -> int:
        return self.config["hidden_size"]

    @property
    def heads(self) -> tuple[int, int]:
        """(elements of all queries, of all keys) of a token."""
        count = self.config["num_attention_heads"]
        size = self.config.get("head_dim") or self.hidden // count
        return count * size, (self.config.get("num_key_value_heads") or count) * size


@dataclass(frozen=True)
class Estimate:
    """phase -> part -> bytes on the device."""

    phases: dict[str, dict[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))


def estimate(shapes: Shapes, step: Work, evaluation: Work, dtype: torch.dtype, device: str, captured: bool = True) -> Estimate:
    """The memory of a run on `device` ("cpu" or "cuda") in `dtype`; captured: its steps become CUDA graphs."""
    weights = _weights(shapes, dtype)
    phases = {"load": weights | _packing(shapes, weights), "step": weights | _forward(shapes, step, dtype, device)}
    # What is free after a step is free for an evaluation, but for the pool of the graphs.
    kept = {"scratch": phases["step"]["scratch"]}
    if captured and device == "cuda":
        kept["CUDA graphs"] = phases["step"]["activations"] + phases["step"]["logits"]
    forward = _forward(shapes, evaluation, dtype, device)
    phases["evaluate"] = weights | forward | kept | {"scratch": max(forward["scratch"], kept["scratch"])}
    phases["snapshot"] = weights | kept
    # Written on the host; then a process of its own reads it again and compares the logits of a sentence.
    phases["export"] = weights | _forward(shapes, Work(1, _PROBE, _PROBE), dtype, device)
    found = {}
    for phase, parts in phases.items():
        slack = int(_SLACK * sum(parts.values())) + (_WORKSPACE if device == "cuda" else 0)
        found[phase] = parts | {SLACK: slack}
    return Estimate(found)


def _weights(shapes: Shapes, dtype: torch.dtype) -> dict[str, int]:
    found = {"codes": 2 * max(shapes.host_codes().values(), default=0), "scales": 0, "zeros, order": 0}
    quantization = shapes.quantization
    for linear in shapes.linears:
        groups = -(-linear.cols // quantization.group(linear.cols))
        if not shapes.streamed or linear.layer is None:
            found["codes"] += shapes.code_bytes(linear)
        found["scales"] += 4 * linear.rows * groups
        found["zeros, order"] += (not quantization.sym) * linear.rows * groups + 8 * quantization.desc_act * linear.cols
        # Sums of codes, by which rows rounded about a point of their own are multiplied.
        found["zeros, order"] += 4 * linear.rows * groups * (getattr(quantization, "activations", 16) < 16)
    if shapes.residuals:
        found["residuals"] = sum(2 * linear.rows * linear.cols for linear in shapes.linears)
    if shapes.latents:
        groups = [linear.rows * -(-linear.cols // quantization.group(linear.cols)) for linear in shapes.latents]
        found["latents"] = shapes.latent_bytes * sum(linear.rows * linear.cols for linear in shapes.latents)
        if shapes.latents_streamed:
            found["latents"] = 2 * max(shapes.host_latents().values())
        # Bounds, factor, move, step, zero and unit; the offset.
        found["grids"] = 4 * (7 * sum(groups) + sum(linear.rows for linear in shapes.latents))
    return found | {"embeddings, norms, head": sum(shapes.others.values()) * dtype.itemsize}


def _packing(shapes: Shapes, weights: dict[str, int]) -> dict[str, int]:
    """What the decoder layer that is read and packed last takes beyond all that is held in the end."""
    if not (shapes.linears and shapes.latents):
        return {}
    layers: Counter[int] = Counter()
    for linear in shapes.linears:
        # Bounds, factor, move, step and zero go with the latents.
        layers[linear.layer] += linear.rows * (_STORED * linear.cols + 24 * -(-linear.cols // shapes.quantization.group(linear.cols)))
    last = max(layers.values()) + _PACKING * max(linear.rows * linear.cols for linear in shapes.linears)
    read = 0 if shapes.latents_streamed else weights["latents"] * _STORED // shapes.latent_bytes
    return {"a layer being packed": max(0, last + read - weights["latents"] - weights["embeddings, norms, head"])}


def _forward(shapes: Shapes, work: Work, dtype: torch.dtype, device: str) -> dict[str, int]:
    size, hidden, (queries, keys) = dtype.itemsize, shapes.hidden, shapes.heads
    inner = shapes.config.get("intermediate_size") or shapes.config.get("ffn_dim") or 4 * hidden
    # The residual and its norm stay while the attention holds its inputs before and after the rotation, or the MLP three tensors.
    per_token = 2 * hidden + max(2 * (queries + keys) + keys, 3 * inner)
    cache = 2 * keys * shapes.config["num_hidden_layers"] * work.rows * work.cached
    embedded = shapes.embedded * hidden * work.tokens * (1 + work.variants)  # as they come, and for every variant
    scored = min(work.predictions, max(1, HEAD_POSITIONS // work.variants)) * work.variants
    widest, latent = (max((linear.rows * linear.cols for linear in linears), default=0) for linears in (shapes.linears, shapes.latents))
    # The effective weights of a pair; in plain PyTorch, and where a grid is made, with intermediate ones in fp32.
    of_latents = latent * (size * min(work.variants, 2) + 4 * (_PLAIN if device != "cuda" else _REGRID * shapes.regrid))
    return {
        "scratch": max(widest * size * _dequantizes(shapes, work, dtype, device), of_latents),
        "activations": int(_HOLES * per_token * work.tokens * work.variants + cache + embedded) * size,
        # As the head gives them, in fp32, and the exponentials of the sum.
        "logits": scored * shapes.config["vocab_size"] * (size + 8),
    }


def _dequantizes(shapes: Shapes, work: Work, dtype: torch.dtype, device: str) -> bool:
    bits, group = shapes.quantization.bits, shapes.quantization.group
    if device != "cuda" or shapes.noisy_codes or shapes.quantization.codebook:
        return True
    return not all(takes_fused(work.tokens, dtype, bits, group(linear.cols), linear.cols) for linear in shapes.linears)
