"""Whether a run fits its device: the estimate for a recipe, the micro-batch that fits, and what would lower it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from qzo.data.batches import bucket
from qzo.data.encode import Encoded
from qzo.errors import OutOfMemory
from qzo.estimate import PHASES, SLACK, Estimate, Shapes, Work, estimate, work_of
from qzo.evaluate import NEW_TOKENS
from qzo.memory import available, gigabytes
from qzo.model.files import Folder
from qzo.model.gptq_format import GptqConfig
from qzo.model.load import pick_device, pick_dtype
from qzo.recipe import Recipe

_SURE = 0.9  # of the estimate, which is right within a tenth
_FEW_TOKENS = 384  # of an evaluation, whatever the step has: no more scratch, little memory


def evaluation_size(encoded: Sequence[Encoded], examples: int, variants: int) -> int:
    """Examples per forward of an evaluation: as much as a step of `examples` has at once, or some few tokens."""
    work = work_of(encoded, 1)
    return max(examples * variants, _FEW_TOKENS // (work.rows * bucket(work.length)), 1)


def _kept(shapes: Shapes, offload: str, device: str) -> Shapes:
    """With what `offload` leaves on the host."""
    shared = shapes.config.get("tie_word_embeddings")
    others = {name: count for name, count in shapes.others.items() if offload == "none" or shared or "embed_tokens" not in name}
    return replace(shapes, others=others, streamed=offload == "codes" and device == "cuda")


class Fit:
    """A recipe against its device, from the shapes in the model's folder and the encoded training examples."""

    def __init__(self, recipe: Recipe, folder: Folder, quantization: GptqConfig, encoded: Sequence[Encoded], generation: bool):
        self.recipe, self.encoded, self.generation = recipe, encoded, generation
        self.whole = Shapes.of(folder, quantization)
        self.device: torch.device = pick_device(recipe.device)
        self.dtype = pick_dtype(recipe.dtype, self.device)
        self.shapes = _kept(self.whole, recipe.offload, self.device.type)
        self.available = available(self.device, recipe.device_memory)

    def estimate(self, micro: int, stacked: bool | None = None, offload: str | None = None) -> Estimate:
        """With `micro` examples per forward, both signs stacked or not, and what stays on the host (default: as the recipe says)."""
        stacked = self.recipe.stacked if stacked is None else stacked
        variants = 2 * self.recipe.directions if stacked else 1
        step = work_of(self.encoded, micro, variants)
        evaluation = work_of(self.encoded, evaluation_size(self.encoded, micro, variants))
        if self.generation:
            new = evaluation.length + NEW_TOKENS
            evaluation = Work(evaluation.rows, evaluation.length, evaluation.rows, 1, new)
        shapes = self.shapes if offload is None else _kept(self.whole, offload, self.device.type)
        return estimate(shapes, step, evaluation, self.dtype, self.device.type)

    def micro(self) -> int:
        """Examples per forward: the recipe's, or the batch halved until the estimate fits."""
        size = self.recipe.micro_batch or self.recipe.batch_size
        while not self.recipe.micro_batch and size > 1 and self._too_large(size, 1.0):
            size = -(-size // 2)
        return size

    def _too_large(self, micro: int, sure: float) -> bool:
        return self.available is not None and self.estimate(micro).peak * sure > self.available

    def savings(self, micro: int) -> list[tuple[str, int]]:
        """(a setting, the bytes that it saves), the largest first; none that saves less than a hundredth."""
        now = self.estimate(micro).peak
        found = [(text, now - peak) for text, peak in self._alternatives(micro)]
        return sorted((pair for pair in found if pair[1] > now / 100), key=lambda pair: -pair[1])

    def _alternatives(self, micro: int) -> Iterator[tuple[str, int]]:
        if micro > 1:
            yield f"micro_batch={micro // 2}", self.estimate(micro // 2).peak
        if self.recipe.stacked and self.recipe.offload != "codes":
            yield "stacked=false", self.estimate(micro, stacked=False).peak
        if self.recipe.offload == "none":
            yield "offload=embeddings", self.estimate(micro, offload="embeddings").peak
        if self.recipe.offload != "codes" and not self.recipe.dense:
            yield "offload=codes stacked=true", self.estimate(micro, stacked=True, offload="codes").peak
        bits = self.shapes.quantization.bits
        if bits > 2:
            codes = self.estimate(micro).phases["load"]["codes"] * (not self.shapes.streamed)
            yield f"a model of {(fewer := max(2, bits // 2 + bits % 2))} bits", self.estimate(micro).peak - codes * (bits - fewer) // bits

    def advice(self, micro: int) -> str:
        """The two settings that would lower the peak most, in words."""
        return ", ".join(f"{text} ({gigabytes(size)} less)" for text, size in self.savings(micro)[:2])

    def check(self, micro: int) -> None:
        """Raises OutOfMemory for a run that cannot fit, with the numbers."""
        if self._too_large(micro, _SURE):
            do = self.advice(micro)
            raise OutOfMemory(
                "device memory", f"about {gigabytes(self.estimate(micro).peak)} needed", f"at most the {gigabytes(self.available)} available",
                (f"Lower it: {do}; " if do else "") + "`qzo tune … --dry-run` shows the parts.",
            )  # fmt: skip

    def table(self, micro: int) -> str:
        """Phases across, parts down; in MB where all of it is less than a GB."""
        found = self.estimate(micro)
        unit, size, digits = ("GB", 1e9, 2) if found.peak >= 1e9 else ("MB", 1e6, 1)
        parts = dict.fromkeys(part for phase in PHASES for part in found.phases[phase])
        shown = [part for part in (*(p for p in parts if p != SLACK), SLACK) if any(found.phases[phase].get(part) for phase in PHASES)]
        lines = [[unit, *PHASES]]
        lines += [[part, *(f"{found.phases[phase].get(part, 0) / size:.{digits}f}" for phase in PHASES)] for part in shown]
        lines.append(["together", *(f"{found.total(phase) / size:.{digits}f}" for phase in PHASES)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) for line in lines)
