"""Errors that end a task early."""


class UsageError(ValueError):
    """Raised for a request that cannot be fulfilled, before anything heavy has run."""


class RunFailedError(RuntimeError):
    """Raised when a run cannot be finished."""
