"""Fetch published Wan weights into models/, from ModelScope or Hugging Face.

python examples/download_model.py --model 1.3b
python examples/download_model.py --model all --output_dir /data/models --source huggingface
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.jobs.download import SOURCES, DownloadError, download, missing_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the models that the command line names; return the exit code, 1 if one could not be fetched."""
    parser = argparse.ArgumentParser(description="Fetch published Wan weights.")
    parser.add_argument("--model", choices=[*PUBLISHED, "all"], required=True, help="which model to fetch")
    parser.add_argument("--output_dir", type=Path, default=Path("models"), help="where model folders are")
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="the hub to fetch from")
    options = parser.parse_args(arguments)
    for name in PUBLISHED if options.model == "all" else [options.model]:
        checkpoint = PUBLISHED[name]
        folder = options.output_dir / checkpoint.folder
        if missing := missing_files(folder, checkpoint):
            print(f"{checkpoint.name}: fetching {len(missing)} files from {options.source} into {folder}")
            print("\n".join(f"  {line}" for line in missing))
        try:
            download(checkpoint, options.output_dir, options.source)
        except DownloadError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{checkpoint.name}: complete in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
