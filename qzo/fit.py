"""Whether a run fits its device: the estimate for a recipe, the micro-batch that fits, and what would lower it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from qzo.data.encode import Encoded
from qzo.data.generation import NEW_TOKENS
from qzo.errors import OutOfMemory
from qzo.estimate import PHASES, SLACK, Estimate, Shapes, Work, estimate, largest
from qzo.memory import available, gigabytes
from qzo.model.files import Folder
from qzo.model.formats import Quantization
from qzo.model.load import pick_device, pick_dtype
from qzo.recipe import Recipe

_SURE = 0.9  # of the estimate, which is right within a tenth
_FEW_TOKENS = 384  # of an evaluation, whatever the step has: no more scratch, little memory


def evaluation_size(one: Work, examples: int, variants: int) -> int:
    """Examples like `one` per forward of an evaluation: as much as a step of `examples` has at once, or some few tokens."""
    return max(examples * variants, _FEW_TOKENS // one.tokens, 1)


def _generating(prompts: Work) -> Work:
    """The work of answering them: one prediction per row at a time, keys and values kept."""
    rows = prompts.rows * prompts.variants
    return Work(rows, prompts.length, rows, 1, prompts.length + NEW_TOKENS)


def _kept(shapes: Shapes, offload: str, device: str) -> Shapes:
    """With what `offload` leaves on the host."""
    embedded = offload != "none" and not shapes.config.get("tie_word_embeddings")
    others = {name: count for name, count in shapes.others.items() if not (embedded and "embed_tokens" in name)}
    return replace(shapes, others=others, embedded=embedded, streamed=offload == "codes" and device == "cuda",
                   latents_streamed=offload == "latents" and device == "cuda")  # fmt: skip


def _shapes(recipe: Recipe, folder: Folder, quantization: Quantization) -> Shapes:
    if recipe.method == "zeroqat":
        return Shapes.of_latent(folder, quantization, recipe.latent_layers, bool(recipe.quantizer))
    quzo = recipe.method == "quzo"
    return replace(Shapes.of(folder, quantization), noisy_codes=quzo, residuals=quzo and recipe.feedback)


class Fit:
    """A recipe against its device, from the shapes in the model's folder, the encoded training examples and the number of evaluated ones.

    `micro` is the number of examples per forward: the recipe's; that of the run which goes on, `begun`; or the batch halved until
    the estimate fits.
    """

    def __init__(
        self, recipe: Recipe, folder: Folder, quantization: Quantization, encoded: Sequence[Encoded], evaluated: int, generation: bool,
        begun: int | None = None,
    ):  # fmt: skip
        self.recipe, self.evaluated, self.generation = recipe, evaluated, generation
        self.one = largest(encoded)
        self.whole = _shapes(recipe, folder, quantization)
        self.device: torch.device = pick_device(recipe.device)
        self.dtype = pick_dtype(recipe.dtype, self.device)
        self.shapes = _kept(self.whole, recipe.offload, self.device.type)
        self.available = available(self.device, recipe.device_memory)
        self.micro = recipe.micro_batch or begun or self._that_fits()

    def _that_fits(self) -> int:
        size = self.recipe.batch_size
        while size > 1 and self.available is not None and self.estimate(size).peak > self.available:
            size = -(-size // 2)
        return size

    def _variants(self, stacked: bool) -> int:
        return 2 * self.recipe.directions if stacked else 1

    @property
    def evaluation(self) -> int:
        """Examples per forward of an evaluation."""
        return evaluation_size(self.one, self.micro, self._variants(self.recipe.stacked))

    def _work(self, examples: int, variants: int = 1) -> Work:
        one = self.one
        return Work(examples * one.rows, one.length, examples * one.predictions, variants)

    def estimate(self, micro: int | None = None, stacked: bool | None = None, offload: str | None = None) -> Estimate:
        """With `micro` examples per forward, both signs stacked or not, and what stays on the host (default: as the run will)."""
        micro = self.micro if micro is None else micro
        variants = self._variants(self.recipe.stacked if stacked is None else stacked)
        evaluation = self._work(min(evaluation_size(self.one, micro, variants), self.evaluated))
        if self.generation:
            evaluation = _generating(evaluation)
        step = self._work(micro, variants)
        if self.recipe.objective == "f1":
            step = _generating(step)
        shapes = self.shapes if offload is None else _kept(self.whole, offload, self.device.type)
        return estimate(shapes, step, evaluation, self.dtype, self.device.type)

    def savings(self) -> list[tuple[str, int]]:
        """(a setting, the bytes that it saves), the largest first; none that saves less than a hundredth."""
        now = self.estimate()
        found = [(text, now.peak - peak) for text, peak in self._alternatives(now)]
        return sorted((pair for pair in found if pair[1] > now.peak / 100), key=lambda pair: -pair[1])

    def _alternatives(self, now: Estimate) -> Iterator[tuple[str, int]]:
        if self.micro > 1:
            yield f"micro_batch={self.micro // 2}", self.estimate(self.micro // 2).peak
        if self.recipe.stacked and self.recipe.offload not in ("codes", "latents"):
            yield "stacked=false", self.estimate(stacked=False).peak
        if self.recipe.offload == "none":
            yield "offload=embeddings", self.estimate(offload="embeddings").peak
        if self.recipe.offload != "codes" and not self.recipe.dense and self.recipe.method == "qzo":
            yield "offload=codes stacked=true", self.estimate(stacked=True, offload="codes").peak
        if self.recipe.offload != "latents" and self.shapes.latents and self.recipe.latent_layers != [] and not self.recipe.quantizer:
            yield "offload=latents stacked=true", self.estimate(stacked=True, offload="latents").peak
        bits = self.shapes.quantization.bits
        if bits > 2 and not self.shapes.streamed and not self.shapes.latents:
            fewer = max(2, bits // 2 + bits % 2)
            yield f"a model of {fewer} bits", now.peak - now.phases["load"]["codes"] * (bits - fewer) // bits

    def advice(self) -> str:
        """The two settings that would lower the peak most, in words."""
        return ", ".join(f"{text} ({gigabytes(size)} less)" for text, size in self.savings()[:2])

    def check(self) -> None:
        """Raises OutOfMemory for a run that cannot fit, with the numbers."""
        peak = self.estimate().peak
        if self.available is not None and peak * _SURE > self.available:
            do = self.advice()
            raise OutOfMemory(
                "device memory", f"about {gigabytes(peak)} needed", f"at most the {gigabytes(self.available)} available",
                (f"Lower it: {do}; " if do else "") + "`qzo tune … --dry-run` shows the parts.",
            )  # fmt: skip

    def table(self) -> str:
        """Phases across, parts down; in MB where all of it is less than a GB."""
        found = self.estimate()
        unit, size, digits = ("GB", 1e9, 2) if found.peak >= 1e9 else ("MB", 1e6, 1)
        parts = dict.fromkeys(part for phase in PHASES for part in found.phases[phase])
        shown = [part for part in (*(p for p in parts if p != SLACK), SLACK) if any(found.phases[phase].get(part) for phase in PHASES)]
        lines = [[unit, *PHASES]]
        lines += [[part, *(f"{found.phases[phase].get(part, 0) / size:.{digits}f}" for phase in PHASES)] for part in shown]
        lines.append(["together", *(f"{found.total(phase) / size:.{digits}f}" for phase in PHASES)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) for line in lines)
