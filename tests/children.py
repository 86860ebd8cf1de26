"""The command line in a forked child: it has everything imported already, and can be killed, limited or patched."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from qzo.cli import main

CRASHED = 99


class Child:
    """Runs `qzo ARGUMENTS` at once, after `before()`; `wait` gives its exit code (minus a signal's number) and output."""

    def __init__(self, *arguments: object, before: Callable[[], object] = lambda: None):
        out, inside = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run([str(argument) for argument in arguments], before, inside)
        os.close(inside)
        self._out = out

    @staticmethod
    def _run(arguments: Sequence[str], before: Callable[[], object], inside: int) -> None:
        code = CRASHED
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(inside, 1)
            os.dup2(inside, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)
            before()
            code = main(list(arguments))
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> tuple[int, str]:
        with os.fdopen(self._out, "rb") as file:
            text = file.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


def kill_at(owner: object, name: str, call: int, after: bool = False) -> None:
    """From now on this process kills itself (as `kill -9` does) at the `call`-th call of owner.name, counted from 1."""
    original, calls = getattr(owner, name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, counted)
