"""SIGINT and SIGTERM end a run at the next safe point, so that what was learned is written first."""

import signal
import threading
from types import FrameType
from typing import Self

from qzo.errors import Interrupted


class StopSignals:
    """Context: inside it the first signal is only noted, and `check` raises Interrupted; a second one ends at once."""

    def __init__(self, where: str, do: str):
        self.where, self.do, self.received = where, do, 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._old:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        if self.received:
            raise Interrupted(self.where, self.received, self.do)
