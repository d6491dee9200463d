"""Where a command's words go: results to stdout, everything else to stderr."""

import json
import sys
from dataclasses import dataclass

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Console:
    """json: stdout holds one JSON object and nothing else. quiet: no progress and no notes."""

    json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line of the result for people; with json it is left out, since the object says it."""
        if not self.json:
            _write(sys.stdout, text)

    def note(self, text: str) -> None:
        """A line that is good to know."""
        if not self.quiet:
            _write(sys.stderr, text)

    def problem(self, text: str) -> None:
        """What went wrong; never silenced."""
        _write(sys.stderr, text)

    def result(self, value: object) -> None:
        """The result for scripts; only with json."""
        if self.json:
            _write(sys.stdout, json.dumps(value))


def _write(stream: object, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
