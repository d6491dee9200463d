"""`fastvmt download`: fetch published weights."""

from argparse import Namespace

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.jobs.download import download, missing_files


def run(options: Namespace, console: Console) -> int:
    """Fetch the missing files of one size, or of all."""
    folders = {}
    for name in PUBLISHED if options.model == "all" else [options.model]:
        checkpoint = PUBLISHED[name]
        folder = options.models_dir / checkpoint.folder
        missing = missing_files(folder, checkpoint)
        if missing:
            heading = f"{checkpoint.name}: {len(missing)} files from {options.source} into {folder}"
            console.note("\n  ".join([heading, *missing]))
        folders[name] = str(download(checkpoint, options.models_dir, options.source))
        console.say(f"{checkpoint.name}: complete in {folder}")
    console.result({"models": folders})
    return DONE
