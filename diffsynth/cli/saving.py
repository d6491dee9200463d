"""Which arguments of a run save it as it proceeds, by the options of a command."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from diffsynth.cli.arguments import flag
from diffsynth.configs.fields import options_of
from diffsynth.configs.options import SavingOptions
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.task import saving_folder


def saving_arguments(options: Namespace, output: Path | None) -> dict[str, Any]:
    """Return the arguments of the run that `add_saving_options` asks for; empty if nothing is saved.

    Raises:
        UsageError: there is no folder for it, or details are given where nothing is saved.
    """
    given = {name: value for name, value in vars(options).items() if name in options_of(SavingOptions)}
    resume = given.pop("resume", None)
    if resume is None and options.checkpoint_dir is None:
        if given:
            raise UsageError(f"{flag(min(given))} needs --resume or --checkpoint-dir")
        return {}
    if options.checkpoint_dir is None and output is None:
        raise UsageError("--resume needs -o OUT, or --checkpoint-dir")
    folder = options.checkpoint_dir or saving_folder(output)
    return {"checkpoint_dir": folder, "resume": resume is not False, **given}
