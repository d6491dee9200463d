"""Errors that end a task early."""

import errno
import os

_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)


class UsageError(ValueError):
    """Raised for a request that cannot be fulfilled, before anything heavy has run."""


def disk_is_at_fault(error: BaseException | None) -> bool:
    """Return whether an error, or one behind it, says that a disk is full, read-only or broken."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return True
        if any(os.strerror(number) in str(error) for number in _DISK_ERRORS):  # in ffmpeg's words
            return True
        error = error.__cause__ or error.__context__
    return False


class RunFailedError(RuntimeError):
    """Raised when a run cannot be finished."""
