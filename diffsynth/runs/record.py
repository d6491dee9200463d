"""The record of a run: everything that made a video, so that the run can be understood and repeated.

It stands beside the video as JSON (out.mp4.json) and, the same text, in the video's own metadata.
"""

import json
import os
import platform
import re
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import diffsynth
from diffsynth.caches.choose import CacheOptions
from diffsynth.configs.cache_tables import MagRatios
from diffsynth.configs.options import RunOptions
from diffsynth.data.files import (
    checkpoint_files,
    sha256_of_files,
    sha256_of_frames,
    sha256_of_video,
)
from diffsynth.data.writer import save_video
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.guidance import NO_TRANSFER
from diffsynth.planning.cost import run_cost
from diffsynth.planning.sizes import sizes_of
from diffsynth.runs.cost import RunCost

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

MARK = "fastvmt_record"
VERSION = 1
# Longer texts do not fit into one argument of a process everywhere.
LARGEST_METADATA = 100_000  # bytes
_NOT_OF_THE_CALL = ("motion", "cache", "output_type")
# Objects in a record, and what reading it needs to find there.
_NEEDED = {
    "options": (),
    "reference": ("path", "sha256"),
    "model": ("folder", "files", "setup"),
    "video": ("fps", "quality", "frames_sha256"),
    "versions": (),
    "device": (),
    "cost": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What made a video.

    prompt, negative_prompt, preset: of the call. options: fields of `RunOptions`, as resolved, seed
    and motion among them. reference: path, sha256, frames, fps; None without one. model: folder, files with
    bytes and sha256 (None if not hashed), and `setup`, how it was loaded. video: frames, height, width, fps,
    quality and the hash of the frames before encoding. versions, device: where it ran. cost: fields of
    `RunCost`, seconds, losses, gradient evaluations and peak memory among them, and what was to be computed
    in full forwards of the DiT (see `run_cost`). created: time, UTC. job: the hash of a batch's job.
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

    def to_json(self) -> dict[str, Any]:
        """What `json.dump` takes and `from_json` reads."""
        return {MARK: VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, source: str = "the record") -> "RunRecord":
        """Raises ValueError, naming the source, for what is no record, or one of another version."""
        if not isinstance(content, dict) or MARK not in content:
            raise ValueError(f"{source} is no record of a run: it lacks {MARK!r}")
        if content[MARK] != VERSION:
            raise ValueError(f"{source} is a record of version {content[MARK]!r}; {VERSION} is read here")
        values = {name: value for name, value in content.items() if name != MARK}
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise ValueError(f"{source} is no whole record: {', '.join(sorted(values.keys() ^ names))}")
        for name, needed in _NEEDED.items():
            value = values[name]
            if name == "reference" and value is None:
                continue
            if not isinstance(value, dict) or not value.keys() >= set(needed):
                needs = f" with {', '.join(needed)}" if needed else ""
                raise ValueError(f"{source} is no whole record: {name} must be an object{needs}")
        return cls(**values)

    def call_arguments(self) -> dict[str, Any]:
        """The keywords of the pipeline's call that repeat the run, all but input_video.

        Raises ValueError for options that the record should not have, or numbers that are not allowed.
        """
        known = {field.name for field in fields(RunOptions)}
        if self.options.keys() != known:
            raise ValueError(f"the record's options differ: {', '.join(sorted(self.options.keys() ^ known))}")
        given = {name: _as_tuple(v) for name, v in self.options.items() if name not in _NOT_OF_THE_CALL}
        motion, cache = self.options["motion"], self.options["cache"]
        for name, value in {"motion": motion, "cache": cache}.items():
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"the record's {name} must be an object or null; got {value!r:.80}")
        return {
            **given,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "preset": self.preset,
            "motion": None if motion is None else MotionGuidance.for_mode(motion.get("mode"), motion),
            "mode": NO_TRANSFER if motion is None else None,
            "cache": None if cache is None else _cache_from_json(cache),
        }


def make_record(
    pipe: "WanVideoPipeline",
    frames: Sequence[Image.Image],
    *,
    prompt: str,
    negative_prompt: str,
    preset: str,
    reference: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    fps: float,
    quality: float,
    job: str | None = None,
) -> RunRecord:
    """The record of the pipeline's last call, which gave these frames.

    reference: from `describe_reference`; model: from `describe_model`.
    """
    options: RunOptions = pipe.options
    cost: RunCost = pipe.costs[-1]
    return RunRecord(
        prompt=prompt,
        negative_prompt=negative_prompt,
        preset=preset,
        options=_plain(_options_to_json(options)),
        reference=reference,
        model=model,
        video={
            "frames": len(frames),
            "height": frames[0].height,
            "width": frames[0].width,
            "fps": fps,
            "quality": quality,
            "frames_sha256": sha256_of_frames(frames),
        },
        versions={
            "fastvmt": diffsynth.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        device=describe_device(pipe.device),
        cost=_plain({**asdict(cost), **_counted_ffe(pipe, options)}),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        job=job,
    )


def describe_reference(path: Path, num_frames: int, fps: float | None) -> dict[str, Any]:
    """path, sha256, frames and rate of a reference video: the `reference` of a record."""
    path = path.resolve()
    return {"path": str(path), "sha256": sha256_of_video(path), "frames": num_frames, "fps": fps}


def describe_model(folder: Path, setup: Mapping[str, Any], hashed: bool = True) -> dict[str, Any]:
    """Folder, files and setup of a checkpoint: the `model` of a record; without hashes unless hashed.

    The files of its LoRAs (`loras` of the setup, path to strength) are among them, by their whole paths.
    """
    folder = folder.resolve()
    files = [*checkpoint_files(folder), *map(Path, setup.get("loras") or ())]
    hashes: Mapping[Path, str | None] = sha256_of_files(files) if hashed else dict.fromkeys(files)
    described = {}
    for file in files:
        name = file.relative_to(folder) if file.is_relative_to(folder) else file
        described[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": hashes[file]}
    return {"folder": str(folder), "files": described, "setup": dict(setup)}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind, name and CPU threads: what decides, with the versions, how numbers are rounded."""
    name = _cpu_name() if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def differences(
    record: RunRecord, reference: Mapping[str, Any] | None, model: Mapping[str, Any]
) -> list[str]:
    """What is not as it was when the record was made: one text for each; empty if the run can be repeated.

    reference, model: as they are now, described as for a record.
    """
    found = []
    then = record.reference
    if (then is None) != (reference is None):
        found.append(f"the run had {'no' if then is None else 'a'} reference")
    elif then is not None and then["sha256"] != reference["sha256"]:
        found.append(f"reference {reference['path']} is not the recorded one (its sha256 differs)")
    files = record.model["files"]
    for name in sorted(files.keys() | model["files"].keys()):
        was, now = files.get(name), model["files"].get(name)
        if was is None or now is None:
            found.append(f"model file {name} is {'new' if was is None else 'missing'}")
        elif any(
            was[fact] != now[fact] and None not in (was[fact], now[fact]) for fact in ("bytes", "sha256")
        ):
            found.append(f"model file {name} is not the recorded one")
    return found


def record_path(video: Path) -> Path:
    """Where the record of a video stands: out.mp4 -> out.mp4.json."""
    return video.with_name(video.name + ".json")


def save_with_metadata(
    frames: Sequence[Image.Image], path: Path, record: RunRecord, *, fps: float, quality: float
) -> Path:
    """`save_video` with the record in the video's metadata, unless it is too long for that."""
    text = json.dumps(record.to_json())
    metadata = ["-metadata", f"comment={text}"] if len(text) <= LARGEST_METADATA else []
    return save_video(frames, path, fps=fps, quality=quality, ffmpeg_params=metadata)


def write_record(record: RunRecord, video: Path) -> Path:
    """Write a video's record beside it, whole or not at all; return its path."""
    path = record_path(video)
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}.json")
    try:
        temporary.write_text(json.dumps(record.to_json(), indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_record(path: str | Path) -> RunRecord:
    """The record in a JSON file, or in a video's metadata.

    Raises FileNotFoundError for a missing file, ValueError for one that holds no record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"record {path} does not exist")
    if path.suffix.lower() != ".json":
        text = _metadata_comment(path)
        if MARK not in text:
            raise ValueError(f"{path} holds no record of a run; give the .json file that stood beside it")
    else:
        text = path.read_text(errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no record of a run: it is not valid JSON ({error})") from error
    return RunRecord.from_json(content, str(path))


def _metadata_comment(path: Path) -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path.absolute()}"]
    result = subprocess.run(
        [*command, "-f", "ffmetadata", "-"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    match = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", result.stdout.decode(errors="replace"), re.M | re.I)
    # ffmpeg puts a backslash before characters that mean something in its own format.
    return "" if match is None else re.sub(r"\\(.)", r"\1", match[1])


def _counted_ffe(pipe: "WanVideoPipeline", options: RunOptions) -> dict[str, float]:
    sizes = sizes_of(pipe, None)
    count = run_cost(
        sizes.dit,
        sizes.latent_shape(options.height, options.width, options.num_frames),
        num_steps=options.num_inference_steps,
        motion=options.motion,
        with_negative=options.cfg_scale != 1,
        cfg_interval=options.cfg_interval,
        cache=options.cache,
    )
    return {"sampling_ffe": count.sampling_ffe, "guidance_ffe": count.guidance_ffe}


def _options_to_json(options: RunOptions) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    cache = options.cache
    described = asdict(cache) if isinstance(cache, CacheOptions) else cache and {"name": repr(cache)}
    return {**values, "motion": options.motion and asdict(options.motion), "cache": described}


def _cache_from_json(cache: Mapping[str, Any]) -> CacheOptions:
    ratios = cache.get("ratios")
    return CacheOptions(**{**cache, "ratios": None if ratios is None else MagRatios.from_json(ratios)})


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", facts.read_text(), re.M) if facts.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: lists for tuples."""
    return json.loads(json.dumps(value))
