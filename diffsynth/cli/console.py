"""Where a command's messages go: results to stdout, everything else to stderr."""

import json
import os
import sys
from dataclasses import dataclass
from typing import TextIO

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Console:
    """The output of a command."""

    json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """Write a line of the result for people; with json it is left out, since the object says it."""
        if not self.json:
            _write(sys.stdout, text)

    def note(self, text: str) -> None:
        """Write a line that is good to know, unless quiet."""
        if not self.quiet:
            _write(sys.stderr, text)

    def problem(self, text: str) -> None:
        """Write what went wrong; this is never silenced."""
        _write(sys.stderr, text)

    def result(self, value: object) -> None:
        """Write the result for scripts, only with json."""
        if self.json:
            _write(sys.stdout, json.dumps(value))


def _write(stream: TextIO, text: str) -> None:
    # A name that the terminal's encoding lacks must not end a run.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        # Whoever read has gone, as `head` does: what is done stays done. Python flushes again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
