"""A hosted demo: the page of `fastvmt ui` with the demo model, within limits that suit visitors."""

import os
import sys
from collections.abc import Mapping

from diffsynth.cli.main import main


def arguments(environment: Mapping[str, str]) -> list[str]:
    """Return the command line of the page; the host names the address under which it is reached."""
    limits = ["--max-minutes", "3", "--max-upload", "20", "--max-frames", "200", "--max-waiting", "8"]
    known = ["--allow-host", environment["SPACE_HOST"]] if "SPACE_HOST" in environment else []
    model = ["--model", environment.get("FASTVMT_MODEL", "nano")]
    return ["ui", "--host", "0.0.0.0", "--port", "7860", "-o", "/tmp/videos", *model, *limits, *known]


if __name__ == "__main__":
    sys.exit(main(arguments(os.environ)))
