"""Where the state of a long run is kept while it runs, and that it goes when the video is there."""

from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffsynth.cli.errors import UsageError
from diffsynth.runs.checkpoint import LOCK, clear_checkpoints


def saving_arguments(options: Namespace, output: Path | None) -> dict[str, Any]:
    """The keywords of the pipeline's call that `add_saving_options` asks for; empty if nothing is saved.

    Raises UsageError if there is no place for it, or details are given where nothing is saved.
    """
    details = {name: getattr(options, name) for name in ("checkpoint_every", "checkpoint_minutes")}
    given = {name: value for name, value in details.items() if value is not None}
    if options.resume is None and options.checkpoint_dir is None:
        if given:
            raise UsageError(f"--{min(given).replace('_', '-')} needs --resume or --checkpoint-dir")
        return {}
    if options.checkpoint_dir is None and output is None:
        raise UsageError("--resume needs -o OUT, or --checkpoint-dir")
    folder = options.checkpoint_dir or default_folder(output)
    return {"checkpoint_dir": folder, "resume": options.resume is not False, **given}


def default_folder(output: Path) -> Path:
    """The hidden folder beside a video: out/fox.mp4 -> out/.fox.mp4.run."""
    return output.with_name(f".{output.name}.run")


def forget(folder: Path, output: Path | None) -> None:
    """Remove what a run left in its folder, and the folder too if it is the default one."""
    clear_checkpoints(folder)
    if output is not None and folder == default_folder(output):
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put something of their own there
            folder.rmdir()
