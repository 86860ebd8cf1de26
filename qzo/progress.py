"""One line of progress for work that takes long.

Not rich.progress: it hides the cursor, and the second signal of a run (signals.py) ends the process before it is shown again.
"""

import math
import shutil
import sys
from time import monotonic
from typing import Any, Self, TextIO


class Progress:
    """`label done/total field value … ETA`, on stderr.

    On a terminal one line is rewritten, at most ten times a second; elsewhere a line is added at most every `every`
    seconds. The first state and the one where all is done always show. As a context manager it closes itself.
    """

    def __init__(self, label: str, total: int, start: int = 0, stream: TextIO | None = None, every: float = 5.0, after: float = 0.0):
        """`start`: what was done before, in a resumed run; it does not count for the ETA. Nothing shows in the first `after` seconds."""
        self._label, self._total, self._start = label, total, start
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every, self._after = 0.1 if self._terminal else every, after
        self._began, self._shown, self._width = monotonic(), -math.inf, 0

    def update(self, done: int, **fields: Any) -> None:
        """Show that `done` of the total is done; floats among the fields are shown with four digits."""
        now = monotonic()
        if now - self._began < self._after or done < self._total and now - self._shown < self._every:
            return
        self._shown = now
        parts = [f"{self._label} {done}/{self._total}"]
        for key, value in fields.items():
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        if self._start < done < self._total:
            left = (now - self._began) / (done - self._start) * (self._total - done)
            parts.append(f"ETA {_duration(left)}")
        self._print("  ".join(parts))

    def close(self) -> None:
        """End the line of a terminal."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        if self._terminal:
            text = text[: max(shutil.get_terminal_size().columns - 1, 10)]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


class Steps:
    """The line of a run, once per `every` steps, from the lines of metrics.jsonl as they are written.

    loss and |d| are means over the steps since the last one, of those that are finite; tokens/s counts no evaluation.
    """

    def __init__(self, progress: Progress, every: int, total: int, tokens: int = 0):
        """`tokens`: those of the steps before."""
        self._progress, self._every, self._total = progress, every, total
        self._tokens, self._since, self._newest = tokens, monotonic(), tokens
        self._losses: list[float | None] = []
        self._sizes: list[float | None] = []

    def __call__(self, line: dict[str, Any]) -> None:
        if "step" not in line:
            self._tokens, self._since = self._newest, monotonic()
            return
        self._newest = line["tokens"]
        self._losses.append(line["loss"])
        self._sizes.append(line["abs_d"])
        done = line["step"] + 1
        if done % self._every and done != self._total:
            return
        now = monotonic()
        fields = {"loss": _mean(self._losses, ".4f"), "|d|": _mean(self._sizes, ".3g"), "lr": f"{line['lr']:.3g}"}
        if now > self._since and self._newest > self._tokens:
            fields["tokens/s"] = f"{(self._newest - self._tokens) / (now - self._since):.0f}"
        self._progress.update(done, **fields, GB=f"{line['peak_memory'] / 1e9:.2f}")
        self._tokens, self._since, self._losses, self._sizes = self._newest, now, [], []


class Still:
    """Says once, on standard error, that d was exactly 0 in so many steps in a row: both signs had the same loss, and nothing moved.

    As Steps, it is called with the lines of metrics.jsonl. A skipped step has no d and is not one of them.
    """

    MANY = 20

    def __init__(self, direction: str):
        """`direction`: the recipe's."""
        self._do = "Raise eps, or batch_size"
        if direction == "realized":
            self._do = "No weight may be left within eps of a bound between codes: lower lr, raise eps, or use direction=latent"
        self._count, self._said = 0, False

    def __call__(self, line: dict[str, Any]) -> None:
        if "step" not in line:
            return
        self._count = self._count + 1 if line["abs_d"] == 0 and not line["skipped"] else 0
        if self._count == self.MANY and not self._said:
            self._said = True
            print(f"warning: |d| was 0 in the last {self.MANY} steps, so nothing moved. {self._do}; then --restart.", file=sys.stderr)


def _mean(values: list[float | None], form: str) -> str:
    finite = [value for value in values if value is not None]
    return f"{sum(finite) / len(finite):{form}}" if finite else "nan"


def _duration(seconds: float) -> str:
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}h{minute:02d}m" if hours else f"{minute}m{second:02d}s" if minute else f"{second}s"
