"""`qzo tune --dry-run`: what would be run, and how large it is, without loading the weights."""

import re
from collections import Counter

from qzo.memory import gigabytes
from qzo.model.load import load_tokenizer, pick_device, pick_dtype
from qzo.recipe import Recipe, to_yaml
from qzo.run import claim
from qzo.tune import load_data, quantized_folder


def plan(recipe: Recipe, name: str, restart: bool = False) -> str:
    """The resolved recipe, the run's folder and state, the data, the work, and the bytes of the weights."""
    where, header = claim(recipe, name, restart)
    folder, config = quantized_folder(recipe)
    train, validation, _ = load_data(recipe, load_tokenizer(folder), folder.fit_length(recipe.max_length))
    rows = sum(len(e.rows) for e in train) / len(train)
    tokens = sum(len(row) for e in train for row in e.rows) / len(train)
    forwards = 2 * recipe.directions * recipe.batch_size * recipe.steps * rows
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    codes = scales = scratch = others = 0
    hosted: Counter[str] = Counter()  # bytes of codes in host memory, by decoder layer
    for tensor in folder.tensors:
        module, _, kind = tensor.rpartition(".")
        shape = folder.shape(tensor)
        count = 1
        for size in shape:
            count *= size
        if kind == "qweight":
            inside = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
            if inside and recipe.offload == "codes" and device.type == "cuda":
                hosted[inside[1]] += 4 * count
            else:
                codes += 4 * count
            scratch = max(scratch, count * 32 // config.bits * dtype.itemsize)
        elif kind == "scales":
            scales += 4 * count
        elif kind not in ("qzeros", "g_idx"):
            others += count * dtype.itemsize
    codes += 2 * max(hosted.values(), default=0)
    parts = {"codes": codes, "scales": scales, "embeddings, norms, head": others, "scratch": scratch}
    passes, host = -(-recipe.batch_size // (recipe.micro_batch or recipe.batch_size)), sum(hosted.values())
    bus = [f"codes in host memory: {gigabytes(host)}; {gigabytes(host * passes)} cross the bus in a step"] if hosted else []
    return "\n".join(
        [
            to_yaml(recipe).rstrip(),
            "",
            f"run folder: {where.path} ({'continues' if header else 'new'})",
            f"model: {config.bits} bits, group {config.group_size}, {config.version}; on {device.type} in {str(dtype)[6:]}",
            f"data: {len(train)} training examples ({rows:.3g} rows and {tokens:.0f} tokens each), {len(validation)} for evaluation",
            f"work: {recipe.steps} steps, {forwards:.0f} example-forwards",
            "memory of the weights: " + ", ".join(f"{key} {gigabytes(size)}" for key, size in parts.items())
            + f", together {gigabytes(sum(parts.values()))}; activations come on top",
            *bus,
        ]
    )  # fmt: skip
