"""The command line of `fastvmt`: its commands, their options and examples. It needs no torch."""

import argparse
import re
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from diffsynth.cli.arguments import (
    add_call_options,
    add_model_options,
    add_models_dir,
    add_options,
    add_run_options,
    add_saving_options,
    number,
    reader,
    whole,
)
from diffsynth.configs.checkpoints import PUBLISHED, published_key
from diffsynth.configs.descriptors import DEFAULT_MODE, flow_modes
from diffsynth.configs.fields import Number, Whole
from diffsynth.configs.options import DTYPES, TILING, FileOptions, LoadOptions, ReferenceOptions, RunOptions
from diffsynth.jobs.download import SOURCES
from diffsynth.jobs.errors import UsageError
from diffsynth.version import __version__

ENDS = ("shortest", "longest")
_REFERENCE = "a video file, or a folder of images"
_OVERWRITE = "replace OUT if it exists"

# A section a command: its name in brackets, its usage if it has its own, examples. The first is of `fastvmt`.
_SECTION = re.compile(r"^\[(\w*)\] ?([^\n]*)(.*?)\n+(?=\[|\Z)", re.MULTILINE | re.DOTALL)
_TOLD = {m[1]: m for m in _SECTION.finditer(Path(__file__).with_name("examples.txt").read_text())}

# What --help shows of the commands that have some eighty options.
_COMMON = (
    "reference", "jobs", "output", "output_dir", "prompt", "input_image", "model", "preset", "mode", "seed",
    "num_inference_steps", "num_frames", "motion_scale", "offload", "vram_budget_gb", "resume", "gif", "help",
    "help_all",
)  # fmt: skip


# Examples keep their line breaks, and options have a column that most of them fit in.
_HELP = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)


class _Help(argparse.Action):
    """Prints the help of a long command: the options most used, those of a group, or all."""

    def __call__(self, parser: Any, _options: object, value: Any, option: str | None = None) -> NoReturn:
        sys.stdout.write(parser.help_of("" if option == "--help-all" else value))
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError where argparse's own would end the process.

    With `common`, the destinations of the options most used, --help shows these and --help-all all.
    """

    def __init__(self, *, examples: str = "", common: Collection[str] = (), **options: Any) -> None:
        options.setdefault("add_help", not common)
        epilog = f"examples:{examples}" if examples else None
        super().__init__(allow_abbrev=False, formatter_class=_HELP, epilog=epilog, **options)
        self._common = common
        if common:
            text = "the options most used; with a word, those of a group: motion, run, model, ..."
            self.add_argument("-h", "--help", action=_Help, nargs="?", const=None, metavar="GROUP", help=text)
            self.add_argument("--help-all", action=_Help, nargs=0, help="all options")

    def help_of(self, group: str | None) -> str:
        """Return the help with the options most used (None), those of a group, or all ("")."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        found = False
        for section in self._action_groups:
            named = bool(group) and str(group) in re.findall(r"\w+", str(section.title).split(" (")[0])
            actions = [a for a in section._group_actions if group == "" or named or a.dest in self._common]
            if actions and (named or not group):
                found = True
                formatter.start_section(section.title)
                formatter.add_arguments(actions)
                formatter.end_section()
        if not found:
            titles = [str(section.title).split(" (")[0] for section in self._action_groups[2:]]
            self.error(f"--help {group}: there is no such group; give a word of: {', '.join(titles)}")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message and where the options are listed."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    """Return the parser of the whole command."""
    parser = Parser(
        prog="fastvmt",
        description="Video motion transfer without training: a reference's motion, a prompt's content.",
        examples=_TOLD[""][3],
    )
    parser.add_argument("--version", action="version", version=f"fastvmt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = Parser(add_help=False)
    group = shared.add_argument_group("what is printed")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress")
    group.add_argument("-v", "--verbose", action="store_true", help="tell the choices that are made")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")

    def command(name: str, text: str) -> Parser:
        # The long lists of options are told below, by group.
        _, usage, examples = _TOLD[name].groups()
        usage = f"fastvmt {name} {usage} [options]" if usage else None
        common = _COMMON if name in ("transfer", "batch", "plan") else ()
        told: dict[str, Any] = {"help": text, "description": text, "usage": usage, "common": common}
        return commands.add_parser(name, parents=[shared], examples=examples, **told)

    _add_transfer(command("transfer", "Make a video that moves as a reference does and shows a prompt."))
    _add_inspect(command("inspect", "Show the motion that a reference would transfer; generates nothing."))
    _add_compare(command("compare", "Put videos beside each other, with labels."))
    _add_evaluate(command("evaluate", "Measure how well a video follows a reference's motion."))
    _add_plan(command("plan", "Predict memory and cost of a run, and the settings that fit into a card."))
    _add_download(
        command("download", "Fetch published weights, continuing where an earlier download stopped.")
    )
    doctor = command("doctor", "Check this installation: versions, device, memory, ffmpeg, models.")
    add_models_dir(doctor)
    text = "run the self-test there: cpu, cuda, cuda:1, mps, ... (some 20 s)"
    doctor.add_argument("--device", metavar="DEVICE", help=text)
    _add_batch(command("batch", "Make many videos with one load of the model."))
    _add_decode(command("decode", "Make the video of final latents that a run left."))
    _add_ui(command("ui", "Serve a web page that does all this, on this machine alone by default."))
    completion = command("completion", "Print a script for the shell's tab completion.")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _add_transfer(parser: Parser) -> None:
    add = parser.add_argument
    add("reference", nargs="?", type=Path, metavar="REF", help=_REFERENCE)
    text = "video file; a free name in the current folder, of reference, mode and seed, by default"
    add("-o", "--output", type=Path, metavar="OUT", help=text)
    add("--overwrite", action="store_true", help=_OVERWRITE)
    text = "also write OUT-beside.gif: reference and result, with the objects' paths where each has but one"
    add("--gif", action="store_true", help=text)
    add("--from", dest="record", type=Path, metavar="RECORD", help="repeat a record's run")
    add("--force", action="store_true", help="with --from: although something changed")
    add("--gpus", type=reader(Whole(1)), metavar="N", help="spread the run over N processes")
    add("--shard", action="store_true", help="with several processes: each keeps a share of the DiT's blocks")
    wait, text = reader(Number(above=0)), "seconds after which a process without answer ends the run (600)"
    add("--rank-timeout", type=wait, default=600, metavar="S", help=text)
    _add_run(parser)


def _add_inspect(parser: Parser) -> None:
    add = parser.add_argument
    add("reference", type=Path, metavar="REF", help=f"{_REFERENCE}, or a run's record")
    add("-o", "--output", type=Path, metavar="DIR", help="folder for the result (REF-motion)")
    add("--overwrite", action="store_true", help="replace what is in DIR")
    add("--mode", choices=flow_modes(), default=DEFAULT_MODE, help=f"of the flow ({DEFAULT_MODE})")
    add("--sigma", type=number, default=0.7, metavar="X", help="noise level, in (0, 1] (0.7)")
    add_options(parser, RunOptions, "the size; as for transfer", only=("height", "width"))
    add_options(parser, ReferenceOptions, "what is used of the reference")
    add_model_options(parser)


def _add_compare(parser: Parser) -> None:
    add = parser.add_argument
    add("videos", nargs="+", type=Path, metavar="VIDEO", help="two or more, in this order")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="video file")
    add("--labels", nargs="+", metavar="TEXT", help="one for each video; file names")
    add("--height", type=whole, default=256, metavar="N", help="of each video, pixels (256)")
    add("--columns", type=whole, metavar="N", help="in a row; up to three, else a square")
    add("--until", choices=ENDS, default=ENDS[0], help=f"which video ends it ({ENDS[0]})")
    add("--paths", action="store_true", help="draw the way of each video's largest object")
    add("--fps", type=number, metavar="X", help="frames a second; the first video's")
    add("--overwrite", action="store_true", help=_OVERWRITE)


def _add_evaluate(parser: Parser) -> None:
    add = parser.add_argument
    add("generated", type=Path, metavar="OUT", help="the video to measure")
    add("reference", type=Path, metavar="REF", help="the video whose motion it follows")
    add("--prompt", help="what the video should show; measured with a CLIP")
    add("--clip", type=Path, metavar="DIR", help="folder of a CLIP")
    add("--grid", type=whole, default=40, metavar="N", help="points in a row and column (40)")
    add("--device", default="auto", help="where CLIP runs (auto)")
    add_options(parser, ReferenceOptions, "what is used of the reference; as for transfer")


def _add_ui(parser: Parser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where to listen (127.0.0.1: this machine alone)")
    add("--port", type=reader(Whole(0, 65535)), default=7860, metavar="N", help="0: a free one (7860)")
    add("--auth", metavar="USER:PASSWORD", help="ask for these; also FASTVMT_AUTH")
    add("--auth-file", type=Path, metavar="FILE", help="ask for what its first line says")
    more = "another name of the page, as of a proxy"
    add("--allow-host", action="append", default=[], metavar="NAME", help=more)
    add("-o", "--output-dir", default="videos", metavar="DIR", help="folder of the videos (videos)")
    add("--max-upload", type=reader(Number(above=0)), default=200, metavar="MB", help="of a reference (200)")
    add("--max-frames", type=whole, default=2000, metavar="N", help="of a reference (2000)")
    add("--max-minutes", type=number, metavar="N", help="that a run may take (no limit)")
    add("--shared", action="store_true", help="visitors see all videos; so at 127.0.0.1 without a proxy")
    add("--max-waiting", type=whole, default=32, metavar="N", help="runs in the queue (32)")
    add_model_options(parser)


def _add_plan(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", help="a name to download, which needs no weights here; else as for transfer")
    add_models_dir(parser)
    add("--dtype", choices=DTYPES, help="of the weights (bfloat16)")
    add("--gpus", type=reader(Whole(1)), metavar="N", help="predict the run over N of them, too")
    add("--shard", action="store_const", const=True, help="as for transfer, with --gpus")
    speed, text = reader(Number(above=0)), "TFLOP/s that one computes, with --gpus (400)"
    add("--tflops", type=speed, default=400, metavar="X", help=text)
    add("--gb-per-s", type=speed, default=200, metavar="X", help="GB/s that one sends, with --gpus (200)")
    add_call_options(parser)


def _add_download(parser: Parser) -> None:
    parser.add_argument(
        "model", type=lambda name: published_key(name) or name, choices=[*PUBLISHED, "all"], help="which size"
    )
    add_models_dir(parser)
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0], help=f"the hub ({SOURCES[0]})")


def _add_batch(parser: Parser) -> None:
    add = parser.add_argument
    add("jobs", type=Path, metavar="JOBS", help="a .jsonl or .csv file, a job a line")
    add("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="made if missing")
    add("--overwrite", action="store_true", help="replace outputs made in another way")
    workers = "processes that each load the model; with --ray actors, one a GPU or CPU by default"
    add("--workers", type=reader(Whole(1)), metavar="N", help=workers)
    text = "work on Ray: a cluster's address, or this machine"
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help=text)
    _add_run(parser)


def _add_decode(parser: Parser) -> None:
    add = parser.add_argument
    add("latents", type=Path, metavar="LATENTS", help="latents-*.safetensors of a run's folder")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="video file")
    add("--overwrite", action="store_true", help=_OVERWRITE)
    add("--model", help="as for transfer; its VAE must be that of the run")
    add_models_dir(parser)
    add_options(parser, LoadOptions, "where it runs", only=("device", "vae_dtype"))
    add_options(parser, RunOptions, "how it is decoded", only=TILING)
    add_options(parser, FileOptions, "the file", but=("keep_audio",))


def _add_run(parser: Parser) -> None:
    add_run_options(parser)
    add_saving_options(parser)
    add_model_options(parser)
