"""Checks of what is asked for that need no PyTorch, whose import takes seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth.configs.checkpoints import checkpoint_folder, published_key
from diffsynth.configs.defaults import published_defaults, run_defaults
from diffsynth.configs.descriptors import NO_TRANSFER
from diffsynth.configs.options import PICTURES
from diffsynth.jobs.errors import UsageError

# Names of options that are files which must exist, and what a message calls such a file.
_FILES = {
    "reference": "video file", "generated": "video file", "videos": "video file",
    "jobs": "jobs file", "record": "record", **dict.fromkeys(PICTURES, "picture"),
}  # fmt: skip


def check_request(options: Mapping[str, Any], reference: Path | None, picture: bool) -> None:
    """Raise UsageError if the reference of a video is missing, or its prompt, which a picture may replace."""
    if reference is None and options.get("mode") != NO_TRANSFER:
        raise UsageError("a reference video is missing; for a video from text alone give --mode No_transfer")
    if "prompt" not in options and not picture:
        raise UsageError("--prompt is missing: what shall the video show?")
    if isinstance(prompt := options.get("prompt"), str) and not prompt.strip():
        raise UsageError("--prompt is empty: what shall the video show?")


def _check_video(path: Path) -> None:
    """Raise ValueError if a reference is a text, or a folder without images."""
    if path.is_dir():
        from diffsynth.data.frames import IMAGE_SUFFIXES, list_images

        if not list_images(path):
            raise ValueError(f"folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    elif path.is_file() and path.suffix not in (".json", ".m3u8", ".y4m"):  # records, videos that are texts
        with path.open("rb") as file:
            start = file.read(200)
        if start.isascii() and b"\0" not in start:
            raise ValueError(f"video file {path} is {'a text and no video' if start else 'empty'}")


def check_early(options: Mapping[str, Any]) -> None:
    """Check the parsed options of a command.

    Raises:
        UsageError: something is missing.
        FileNotFoundError: a file or the model does not exist.
        ValueError: the model has no such preset.
    """
    for name, kind in _FILES.items():
        asked = options.get(name)
        for path in asked if isinstance(asked, list) else [asked]:
            if isinstance(path, Path) and not path.exists():
                raise FileNotFoundError(f"{kind} {path} does not exist")
            if isinstance(path, Path) and kind == "video file":
                _check_video(path)
    if options["command"] == "transfer" and options["record"] is None:
        check_request(options, options["reference"], options.get("input_image") is not None)
        out = options["output"]
        if out is not None and out.is_file() and not options["overwrite"] and out != options["reference"]:
            # A record, beside the video or inside it, may be that of the same request.
            beside, small = out.with_name(f"{out.name}.json"), out.stat().st_size < 2**26
            if small and not beside.exists() and b"frames_sha256" not in out.read_bytes():
                raise UsageError(f"output {out} exists; give another name, or --overwrite")
    model = None if options["command"] == "download" else options.get("model")
    if model is not None:
        if options["command"] == "plan" and (key := published_key(model)):
            defaults = published_defaults(key)
        else:
            defaults = run_defaults(checkpoint_folder(model, options["models_dir"]))
        defaults.with_preset(options.get("preset", "exact"))
