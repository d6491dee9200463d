"""The record of a run: everything that made a video, so that the run can be understood and repeated.

It is written beside the video as JSON (out.mp4.json) and, the same text, into the video's own metadata.
"""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import DEFAULT_FPS, PICTURES, FileOptions, ReferenceOptions, RunOptions
from diffsynth.data import VideoData, save_video
from diffsynth.data.ffmpeg import file_url, run_ffmpeg
from diffsynth.data.files import sha256_of_file, written_whole
from diffsynth.data.frames import read_picture
from diffsynth.data.stream import video_damage
from diffsynth.models.checkpoint_files import files_of
from diffsynth.planning.cost import run_cost
from diffsynth.planning.sizes import ModelSizes
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import sha256_of_frames, sha256_of_video, weights_fingerprint
from diffsynth.version import __version__

FORMAT_KEY = "fastvmt_record"
# 2: references are read in true colours, cropped by whole pixels, and a part of them can be used.
VERSION, READ_VERSIONS = 2, (1, 2)
# Longer texts do not fit into one argument of a process everywhere.
LARGEST_METADATA = 100_000  # bytes
_TOKENIZER_FILES = ("*.json", "spiece.model")
# Objects in a record, and what reading it needs to find there.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "reference": ("path", "sha256"),
    "model": ("folder", "files", "setup"),
    "video": ("frames", "height", "width", "fps", "quality", "frames_sha256"),
    **dict.fromkeys(("options", "pictures", "versions", "device", "cost"), ()),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The record of a video and the run that made it.

    Attributes:
        prompt, negative_prompt, preset: as asked for.
        options: fields of `RunOptions` in force at the end, seed and motion among them.
        reference: path, sha256, frames, fps and the fields of `ReferenceOptions`; None without one.
        pictures: path and sha256 of input_image and end_image, of those that there were.
        model: folder; files with their bytes, and the sha256 of configs and tokenizer; weights, a fingerprint
            of each model as it ran; setup, how it was loaded.
        video: frames, height, width, fields of `FileOptions`, and the hash of the frames before encoding.
        versions: versions of the packages that decide how numbers are rounded.
        device: kind, name and threads; ranks, if several made the run.
        cost: fields of `RunCost`, and the computation in full forwards of the DiT (see `run_cost`).
        created: UTC time in ISO format.
        job: hash of a batch job; None for other runs.
    """

    prompt: str
    negative_prompt: str
    preset: str
    options: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    model: Mapping[str, Any]
    video: Mapping[str, Any]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    cost: Mapping[str, Any]
    created: str
    job: str | None = None
    pictures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON can hold it, for `from_json`."""
        return {FORMAT_KEY: VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, source: str = "the record") -> "RunRecord":
        """Return the record in parsed JSON.

        Args:
            content: the parsed JSON.
            source: where it came from, for errors.

        Raises:
            ValueError: the content is no record, or one of another version.
        """
        if not isinstance(content, dict) or FORMAT_KEY not in content:
            raise ValueError(f"{source} is no record of a run: it lacks {FORMAT_KEY!r}")
        if content[FORMAT_KEY] not in READ_VERSIONS:
            version, read = content[FORMAT_KEY], " and ".join(map(str, READ_VERSIONS))
            raise ValueError(f"{source} is a record of version {version!r}; {read} are read here")
        values = {"pictures": {}} | {name: value for name, value in content.items() if name != FORMAT_KEY}
        names = {item.name for item in fields(cls)}
        if values.keys() != names:
            raise ValueError(f"{source} is no whole record: {', '.join(sorted(values.keys() ^ names))}")
        for name, needed in _NEEDED.items():
            value = values[name]
            without = name == "reference" and value is None
            if not without and not (isinstance(value, dict) and value.keys() >= set(needed)):
                needs = f" with {', '.join(needed)}" if needed else ""
                raise ValueError(f"{source} is no whole record: {name} must be an object{needs}")
        return cls(**values)

    def call_arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that repeat the run, all but input_video.

        Raises:
            ValueError: the options are unknown or not allowed.
        """
        run = RunOptions.from_json(self.options)
        options = {item.name: getattr(run, item.name) for item in fields(run) if item.name != "output_type"}
        prompts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        return {**prompts, "preset": self.preset, "mode": run.mode, **options}


def make_record(
    frames: Sequence[Image.Image],
    *,
    prompt: str,
    negative_prompt: str,
    preset: str,
    options: RunOptions,
    cost: RunCost,
    models: Mapping[str, nn.Module],
    device: torch.device,
    reference: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    file: FileOptions,
    job: str | None = None,
    pictures: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Return the record of a run."""
    sizes = ModelSizes.of(models)
    latents = sizes.latent_shape(options.height, options.width, options.num_frames)
    count = run_cost(sizes.dit, latents, options)
    spread = getattr(models["dit"], "spread", None)
    counted = {"sampling_ffe": count.sampling_ffe, "guidance_ffe": count.guidance_ffe}
    return RunRecord(
        prompt=prompt,
        negative_prompt=negative_prompt,
        preset=preset,
        options=_plain(options.to_json()),
        reference=reference,
        model={**model, "weights": fingerprints(models)},
        video={
            "frames": len(frames),
            "height": frames[0].height,
            "width": frames[0].width,
            **asdict(file),
            "frames_sha256": sha256_of_frames(frames),
        },
        versions={
            "fastvmt": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        device={**describe_device(device), **({"ranks": spread.size} if spread else {})},
        cost=_plain({**asdict(cost), **counted}),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        job=job,
        pictures=dict(pictures or {}),
    )


def describe_pictures(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the `pictures` of a record, by argument; a file that is no picture raises an error here."""
    for name, path in paths.items():
        read_picture(path, name)
    return {
        name: {"path": str(path.resolve()), "sha256": sha256_of_file(path)} for name, path in paths.items()
    }


def describe_reference(
    path: Path, num_frames: int, fps: float | None, used: ReferenceOptions | None = None
) -> dict[str, Any]:
    """Return the `reference` of a record: path, sha256, frames and rate of a video, and the options used."""
    path, used = path.resolve(), used or ReferenceOptions()
    facts = {"path": str(path), "sha256": sha256_of_video(path), "frames": num_frames, "fps": fps}
    return {**facts, **asdict(used)}


def describe_model(folder: Path, setup: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` of a record: folder, files and setup of a checkpoint.

    The files are weights, configs and tokenizer, and by their whole paths the LoRAs (`loras` of the setup,
    path -> strength) and the weights that are loaded instead of the folder's.
    """
    folder = folder.resolve()
    instead = [setup[name] for name in ("dit", "text_encoder", "vae") if setup.get(name)]
    weights = {file for group in files_of(folder) for file in group} if len(instead) < 3 else set()
    weights |= {file.resolve() for entry in instead for group in files_of(entry) for file in group}
    found = {file for pattern in _TOKENIZER_FILES for file in folder.rglob(pattern)}
    others = {file for file in found if "/." not in f"/{file.relative_to(folder).as_posix()}"}
    described: dict[str, dict[str, Any]] = {}
    for file in [*sorted(weights | others), *map(Path, setup.get("loras") or ())]:
        name = file.relative_to(folder) if file.is_relative_to(folder) else file
        described[name.as_posix()] = {"bytes": file.stat().st_size}
        if file in others:
            described[name.as_posix()]["sha256"] = sha256_of_file(file)
    return {"folder": str(folder), "files": described, "setup": dict(setup)}


def fingerprints(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return name -> fingerprint of the weights of each model as it is loaded."""
    return {name: weights_fingerprint(model) for name, model in models.items()}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return kind, name and CPU threads, which with the versions decide how numbers are rounded."""
    named = getattr(getattr(torch, device.type, None), "get_device_name", lambda _: device.type)  # not of mps
    name = named(device)
    if device.type == "cpu":
        facts = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*: (.*)$", facts.read_text(), re.M) if facts.is_file() else None
        name = found[1] if found else platform.processor() or platform.machine()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def differences(
    record: RunRecord,
    reference: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    pictures: Mapping[str, Any],
) -> list[str]:
    """Return a message for each difference between a record and the present reference, model and pictures."""
    found = [
        f"{name} is not the recorded one"
        for name in PICTURES
        if record.pictures.get(name, {}).get("sha256") != pictures.get(name, {}).get("sha256")
    ]
    then = record.reference
    if (then is None) != (reference is None):
        found.append(f"the run had {'no' if then is None else 'a'} reference")
    elif then is not None and reference is not None:
        if then["sha256"] != reference["sha256"]:
            found.append(f"reference {reference['path']} is not the recorded one (its sha256 differs)")
        if "fit" not in then:
            found.append("the record is of version 1, when frames of references had other colours and crops")
    files = record.model["files"]
    for name in sorted(files.keys() | model["files"].keys()):
        was, now = files.get(name), model["files"].get(name)
        if was is None or now is None:
            found.append(f"model file {name} is {'new' if was is None else 'missing'}")
        elif any(was[fact] != now[fact] for fact in was.keys() & now.keys()):
            found.append(f"model file {name} is not the recorded one")
    recorded = record.model.get("weights", {})
    weights = model.get("weights", {})
    changed = [name for name in weights if recorded.get(name, weights[name]) != weights[name]]
    return found + [f"the weights of {name} are not the recorded ones" for name in changed]


def record_path(video: Path) -> Path:
    """Return the path of a video's record: out.mp4 -> out.mp4.json."""
    return video.with_name(video.name + ".json")


def save_with_metadata(frames: Sequence[Image.Image], path: Path, record: RunRecord) -> Path:
    """Save a video with the record in its metadata, unless the record is too long for that."""
    text = json.dumps(record.to_json())
    metadata = ["-metadata", f"comment={text}"] if len(text) <= LARGEST_METADATA else []
    file, source = fields_of(FileOptions, record.video), None
    if file.keep_audio and record.reference is not None:
        source = record.reference["path"]
    return save_video(
        frames,
        path,
        fps=file.fps or DEFAULT_FPS,
        quality=file.quality,
        ffmpeg_params=metadata,
        lossless=file.lossless,
        audio_from=source,
        audio_start=(record.reference or {}).get("start") or 0.0,
    )


def write_record(record: RunRecord, video: Path) -> Path:
    """Write a video's record beside it, whole or not at all, and return its path."""
    path = record_path(video)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record.to_json(), indent=2) + "\n")
    return path


def read_record(path: str | Path) -> RunRecord:
    """Return the record in a JSON file, or in a video's metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"record {path} does not exist")
    if path.suffix.lower() != ".json":
        text = metadata_comment(path)
        if FORMAT_KEY not in text:
            raise ValueError(f"{path} holds no record of a run; give the .json file that stood beside it")
    else:
        text = path.read_text(errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no record of a run: it is not valid JSON ({error})") from error
    return RunRecord.from_json(content, str(path))


def finished_record(video: Path) -> RunRecord | None:
    """Return the record of a finished video, from inside it or, if it is too long for that, from beside it.

    A record that is missing beside the video is written again. None: there is no video, or no record.

    Raises:
        ValueError: the video is not whole, or is not the one that the record beside it describes.
    """
    if not video.exists():
        return None
    inside, beside = _record_of(video), _record_of(record_path(video))
    record = inside or beside
    if record is not None and (problem := _damage(video, record, embedded=inside is not None)):
        raise ValueError(f"{video} is damaged or was replaced ({problem})")
    if inside is not None and inside != beside:
        write_record(inside, video)
    return record


def _damage(video: Path, record: RunRecord, *, embedded: bool) -> str | None:
    """Return what a video lacks of the one that a record describes; None if nothing."""
    told = record.video
    if video.is_dir():
        with suppress(ValueError):
            if sha256_of_frames(VideoData(image_folder=video).raw_data()) == told["frames_sha256"]:
                return None
        return "its frames are not the recorded ones"
    if (
        not embedded
        and video.suffix.lower() != ".gif"
        and len(json.dumps(record.to_json())) <= LARGEST_METADATA
    ):
        return "its record is beside it, but not in it"
    return video_damage(video, (told["frames"], told["height"], told["width"]))


def _record_of(file: Path) -> RunRecord | None:
    with suppress(ValueError, FileNotFoundError):
        return read_record(file)
    return None


def metadata_comment(path: Path) -> str:
    """Return the comment in a video's metadata; empty if it has none."""
    metadata, _ = run_ffmpeg(["-i", file_url(path), "-f", "ffmetadata", "-"])
    match = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", metadata.decode(errors="replace"), re.M | re.I)
    # ffmpeg puts a backslash before characters that mean something in its own format.
    return "" if match is None else re.sub(r"\\(.)", r"\1", match[1])


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return a value as it comes back from JSON: lists for tuples."""
    return json.loads(json.dumps(value))
