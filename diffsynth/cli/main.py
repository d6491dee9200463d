"""`fastvmt`: reads the command line, runs the command, turns an error into a line and an exit code."""

import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from diffsynth.cli.console import BAD_USAGE, FAILED, INTERRUPTED, Console
from diffsynth.cli.parser import build_parser
from diffsynth.jobs.early import check_early
from diffsynth.jobs.errors import UsageError

# Loaded on use: most of them need torch.
_ALIKE = ("transfer", "compare", "evaluate", "plan", "download", "doctor", "batch", "decode", "completion")
COMMANDS = {name: f"diffsynth.cli.{name}" for name in _ALIKE}
COMMANDS |= {"inspect": "diffsynth.cli.inspect_motion", "ui": "diffsynth.webui.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fastvmt` with arguments, or those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad arguments, 130 interrupted.
    """
    # Read when torch starts: fewer gaps between tensors, and what `deterministic` needs.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    try:
        options = build_parser().parse_args(arguments)
    except UsageError as error:
        return _failed(Console(json="--json" in arguments), error, BAD_USAGE)
    except SystemExit as done:  # after --help and --version
        return int(done.code or 0)
    options.arguments = arguments
    console = Console(json=options.json, quiet=options.quiet)
    reason: Exception
    with _log_to_stderr(logging.INFO if options.verbose else logging.WARNING):
        try:
            check_early(vars(options))
            run: Callable[[Namespace, Console], int] = import_module(COMMANDS[options.command]).run
            return run(options, console)
        except KeyboardInterrupt as stop:
            return _failed(console, str(stop) or "interrupted", INTERRUPTED)
        except (ValueError, TypeError, FileNotFoundError) as error:
            code, reason = BAD_USAGE, error
        except (RuntimeError, OSError, ImportError, MemoryError) as error:
            code, reason = FAILED, error
        if options.debug:
            console.problem("".join(traceback.format_exception(reason)))
        return _failed(console, reason, code)


def _failed(console: Console, reason: object, code: int) -> int:
    text = str(reason) or type(reason).__name__
    console.problem(f"fastvmt: {text}")
    console.result({"error": text, "exit_code": code})
    return code


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    logger = logging.getLogger("diffsynth")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


if __name__ == "__main__":
    sys.exit(main())
