"""The command line of the example scripts; options that `fastvmt` has as well are those of configs/."""

import argparse
import re
import sys
from pathlib import Path

from diffsynth.cli.arguments import add_options, add_run_options
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.options import LoadOptions

CLIP = Path(__file__).parent / "data" / "source.mp4"


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with dashes or underscores in options; a missing model is an error."""
    dashed = [re.sub(r"^--[\w-]+", lambda name: name[0].replace("_", "-"), word) for word in sys.argv[1:]]
    parser.print_usage = lambda *_: None  # type: ignore[method-assign]  # errors are one line, without usage
    args = parser.parse_args(dashed)
    try:
        checkpoint_folder(args.model_dir)
    except FileNotFoundError as error:
        parser.error(str(error))
    return args


def generation_parser(model_dir: str) -> argparse.ArgumentParser:
    """Return the parser of one generation, by default with the checkpoint in model_dir."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", default=model_dir, help=f"checkpoint folder ({model_dir})")
    parser.add_argument("--output-dir", type=Path, default=Path("results"), help="for the video (results)")
    parser.add_argument(
        "--input-video", type=Path, help=f"the reference ({CLIP.name}, but in No_transfer none)"
    )
    parser.add_argument("--test-latency", action="store_true", help="append the cost to latency.jsonl")
    parser.add_argument("--latency-dir", type=Path, help="folder of latency.jsonl (OUTPUT_DIR)")
    add_run_options(parser)
    add_options(parser, LoadOptions, "the model")
    parser.set_defaults(prompt="A red fox runs through fresh snow in a forest, morning light.", seed=42)
    return parser
