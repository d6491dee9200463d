"""What ends a command early, and with which exit code."""

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(ValueError):
    """The command line asks for what cannot be done; nothing heavy has run."""


class RunFailedError(RuntimeError):
    """A run could not be finished."""
