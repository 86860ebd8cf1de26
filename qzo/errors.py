"""Errors that a user sees: where · what was given · what was expected · what to do. No traceback."""


class QzoError(Exception):
    """Base of every error qzo raises on purpose; `exit_code` is the process's exit code."""

    exit_code = 1

    def __init__(self, where: str, given: str, expected: str = "", do: str = ""):
        self.where, self.given, self.expected, self.do = where, given, expected, do
        parts = [f"{where}: {given}"]
        if expected:
            parts.append(f"expected {expected}")
        message = "; ".join(parts)
        super().__init__(f"{message}. {do}" if do else message)


class RunFailed(QzoError):
    """The run itself failed (exit code 1): diverged, damaged run folder, failed verification."""


class BadInput(QzoError):
    """The user's input cannot be used (exit code 2)."""

    exit_code = 2


class OutOfMemory(QzoError):
    """The device's memory does not suffice (exit code 3)."""

    exit_code = 3


class Interrupted(QzoError):
    """Stopped by a signal after what was learned has been written (exit code 128 + signal)."""

    def __init__(self, where: str, signal: int, do: str = ""):
        super().__init__(where, "interrupted", do=do)
        self.exit_code = 128 + signal
