"""Files of a run that have to survive a crash, and what a user is told when the disk does not take them."""

import errno
import os
from pathlib import Path

from qzo.errors import RunFailed


def disk_error(path: Path, error: Exception, number: int | None = None) -> RunFailed:
    """The error for a file that cannot be read or written; `number`: errno, where `error` has none of its own."""
    number = number or getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        do = "Free some space or raise the limit, then resume the run: it goes on from its journal."
    else:
        do = "Check the disk and the permissions of the folder, then resume the run."
    return RunFailed(str(path), f"cannot be read or written ({reason})", do=do)


def fsync_path(path: Path) -> None:
    """A file, or the names in a folder, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
