"""The page's messages about errors."""

import errno
import logging

from diffsynth.planning.ladder import MemoryRanOutError, is_out_of_memory
from diffsynth.webui.queue import QueueFullError

logger = logging.getLogger(__name__)

# These messages are shown to the user as they are.
_CLEAR = (ValueError, TypeError, FileNotFoundError, MemoryRanOutError, QueueFullError)
LONGEST = 600


def failure_text(error: BaseException) -> str:
    """A sentence or two for whoever asked for the run; the log gets the whole of an unforeseen error."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, _CLEAR):
        return text[:LONGEST]
    if is_out_of_memory(error):
        return (
            "Memory ran out. Choose a smaller size, fewer frames or the preset fast; "
            f"the page goes on working. ({text.splitlines()[0][:200]})"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: the video could not be written. ({error.strerror})"
    logger.error("a job failed", exc_info=error)
    return f"The run failed: {text[:LONGEST]}"
