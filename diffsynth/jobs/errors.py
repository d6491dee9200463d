"""What ends a task early."""


class UsageError(ValueError):
    """The user asks for what cannot be done; nothing heavy has run."""


class RunFailedError(RuntimeError):
    """A run could not be finished."""
