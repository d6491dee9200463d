"""The options of the command line, generated from the dataclasses in configs/ that state them."""

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from diffsynth.configs.caches import CACHES
from diffsynth.configs.fields import Choice, Kind, Number, OrNone, Switch, Whole, options_of
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.kinds import CacheKind
from diffsynth.configs.options import (
    MOTION_PREFIX,
    PICTURES,
    WIDE_DTYPES,
    FileOptions,
    LoadOptions,
    ReferenceOptions,
    RunOptions,
    SavingOptions,
    Shorthands,
    call_options,
)
from diffsynth.jobs.errors import UsageError

NOT_OFFERED = ("output_type", "motion")  # a command writes a file; motion has an option for each number


def flag(name: str) -> str:
    """Return the option of a name: "num_frames" -> "--num-frames"."""
    return "--" + name.replace("_", "-")


def option_words(name: str, value: Any) -> list[str]:
    """Return the words of the command line that give an option a value."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    stated = call_options().get(name)
    name = (stated and stated[0].short) or name
    parts = value if isinstance(value, tuple) else (value,)
    text = ",".join(str(part).removesuffix(".0") for part in parts)
    # A value such as -3,0,1 would be read as an option.
    return [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]


def reader(kind: Kind) -> Callable[[str], Any]:
    """Return a function that reads a kind of value from text, for argparse."""

    def read(text: str) -> Any:
        try:
            return kind.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {kind}; got {text!r}") from error

    return read


whole, number = reader(Whole()), reader(Number())


def add_options(
    parser: argparse._ActionsContainer,
    owner: type,
    title: str | None,
    *,
    prefix: str = "",
    only: Collection[str] | None = None,
    but: Collection[str] = NOT_OFFERED,
) -> None:
    """Add the options of a dataclass as a group; those that are not given are absent from the namespace.

    Offered are the names of `only` (None: all) that are not in `but`, on the command line with the prefix.
    Without a title the parser is the group.
    """
    group = parser if title is None else parser.add_argument_group(title)
    for name, (stated, default) in options_of(owner).items():
        if name in but or (only is not None and name not in only):
            continue
        kind = stated.kind.kind if isinstance(stated.kind, OrNone) else stated.kind
        text = stated.help
        if isinstance(stated.kind, OrNone) and stated.kind.none:
            text = f"{text}; none: {stated.kind.none}"
        elif default is not None and default != "" and not isinstance(default, bool):
            told = ",".join(map(str, default)) if isinstance(default, tuple) else default
            text = f"{text} ({told})"
        how: dict[str, Any] = {"dest": prefix + name, "default": argparse.SUPPRESS}
        if isinstance(kind, Switch):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": reader(stated.kind), "metavar": kind.metavar}
        if isinstance(kind, Choice | CacheKind):
            how |= {"choices": tuple(CACHES if isinstance(kind, CacheKind) else kind.known), "metavar": None}
        names = [flag(prefix + name)] + ([flag(stated.short)] if stated.short else [])
        group.add_argument(*names, help=text.replace("%", "%%"), **how)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of one video: prompts, the pipeline's call, motion, the file."""
    group = parser.add_argument_group("what is shown")
    texts = ("what the video should show", "what it should not show; the model's by default")
    for name, text in zip(("--prompt", "--negative-prompt"), texts, strict=True):
        group.add_argument(name, metavar="TEXT", default=argparse.SUPPRESS, help=text)
    for picture, (name, does) in PICTURES.items():
        text = f"picture that the video {does}, for a model that takes one"
        group.add_argument(flag(name), dest=picture, type=Path, metavar="FILE", help=text)
    add_call_options(parser)
    add_options(parser, ReferenceOptions, "what is used of the reference")
    add_options(parser, FileOptions, "the file")


def pictures_of(options: argparse.Namespace) -> dict[str, Path]:
    """Return the paths of the pictures that were named, by argument of the call."""
    return {name: path for name in PICTURES if (path := getattr(options, name)) is not None}


def add_call_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the pipeline's call."""
    add_options(parser, Shorthands, "how it is made")
    add_options(parser, RunOptions, "the run (defaults: the published method's; a model may declare others)")
    title = "motion (defaults: FastVMT's; a model may declare others)"
    add_options(parser, MotionGuidance, title, prefix=MOTION_PREFIX, but=("mode", "sf"))


def add_models_dir(parser: argparse._ActionsContainer) -> None:
    """Add the folder of the models."""
    text = "where models are (models)"
    parser.add_argument("--models-dir", type=Path, default=Path("models"), metavar="DIR", help=text)


def add_saving_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the state of a long run is kept."""
    group = parser.add_argument_group("long runs")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="save the run as it proceeds in .OUT.run, which is removed after success, and continue an "
        "unfinished one that is there; --no-resume discards it",
    )
    group.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="the folder, instead of .OUT.run")
    add_options(group, SavingOptions, None, but=("resume",))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs, where and how."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        help="nano, 1.3b, 14b or a checkpoint folder; by default the largest complete one below "
        "--models-dir, else nano",
    )
    add_models_dir(group)
    add_options(group, LoadOptions, None)
    group.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=_lora,
        default=argparse.SUPPRESS,
        metavar="FILE[=X]",
        help="merge a LoRA into the DiT at strength X (1); may be given several times",
    )


def _lora(text: str) -> tuple[str, float]:
    """Read a LoRA's absolute path and strength, "style.safetensors=0.8"; the strength is 1 by default."""
    file, _, strength = text.rpartition("=")
    if not file or Path(text).is_file():
        file, strength = text, "1"
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"the LoRA {file} does not exist")
    return str(Path(file).resolve()), number(strength)


def check_shard(given: Mapping[str, Any], several: bool) -> None:
    """Raise UsageError if --shard is given for one process, or with what has the DiT's blocks elsewhere."""
    others = ("offload", "persistent", "compile", "vram_budget_gb", "dtype")
    clashing = [name for name in others if str(given.get(name)) not in ("None", "False", *WIDE_DTYPES)]
    if given["shard"] and (clashing or not several):
        problem = f"takes no {option_words(clashing[0], 1)[0]}" if clashing else "needs --gpus N"
        raise UsageError(f"--shard keeps a share of the DiT's blocks in each process; it {problem}")
