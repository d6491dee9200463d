"""Damaged and hostile inputs for everything that reads files; also for benchmarks/reliability/fuzz.py.

A target writes a case to a file and reads it as the library does. That may succeed, or raise what is
documented; anything else, more than SECONDS of processor time, or memory that grows, is a defect.
"""

import io
import json
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from diffsynth import ModelManager, VideoData
from diffsynth.cli.job_files import read_jobs
from diffsynth.configs.defaults import run_defaults
from diffsynth.jobs.convert import convert_checkpoint
from diffsynth.models.lora_files import read_lora
from diffsynth.prompters.tokenizer import load_tokenizer
from diffsynth.prompters.wan_prompter import clean_prompt
from diffsynth.runs.record import read_record
from diffsynth.runs.state import load_state, save_state
from diffsynth.testing import write_checkpoint, write_clip

SECONDS = 60
GROWTH = 400  # MB of peak memory in all
MOST_TEXT = 300

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """name: for the table. cases: strategy of file contents. file: the name to write to. read: what is tried.
    weight: share of the cases. allowed: what it may raise.
    """

    name: str
    cases: st.SearchStrategy[bytes]
    file: str
    read: Read
    weight: int = 1
    allowed: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)


@dataclass
class Outcome:
    """How the cases of a target ended: names of exceptions, "read" for success.

    slowest: seconds of processor time.
    """

    ends: Counter = field(default_factory=Counter)
    slowest: float = 0.0


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with bytes changed, put in, taken out, or missing at its end."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        # Half of the damage is where formats keep their headers.
        end = len(content) if draw(st.booleans()) else min(len(content), 400)
        at = draw(st.integers(0, max(end - 1, 0)))
        kind = draw(st.sampled_from(("change", "insert", "remove", "repeat", "huge")))
        if kind == "change":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        else:
            content[at : at + 8] = struct.pack("<Q", draw(st.sampled_from((2**31, 2**40, 2**63, 2**64 - 1))))
    kept = draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    return bytes(content[:kept])


_NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from((0, 1, 2**31, 2**62))
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def lying_header(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file whose header says something else than its data."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        entry = header[draw(st.sampled_from(names))]
        key = draw(st.sampled_from(("dtype", "shape", "data_offsets")))
        entry[key] = draw(
            {
                "dtype": st.sampled_from(("F64", "F32", "BF16", "F8_E4M3", "I8", "BOOL", "X9", "")),
                "shape": st.lists(st.sampled_from((0, 1, 2, 64, 2**31, 2**40)), max_size=5),
                "data_offsets": st.lists(
                    st.sampled_from((0, 1, 64, len(whole), 2**40)), min_size=2, max_size=2
                ),
            }[key]
        )
    if draw(st.booleans()):
        header[draw(st.text(max_size=30))] = draw(_JSON)
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.sampled_from((0, 2**40, 2**64 - 1))))
    return struct.pack("<Q", length) + text + whole[8 + size :]


def _lines(keys: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    """JSON lines with right and wrong keys and values."""
    names = st.sampled_from(keys) | st.text(max_size=8)
    paths = st.sampled_from(("../../out.mp4", "/etc/passwd", "a.mp4", "~/x.mp4", "a\0b.mp4", "", ".."))
    line = st.dictionaries(names, _JSON | paths, max_size=5).map(json.dumps)
    return st.lists(line | st.text(max_size=40), max_size=5).map("\n".join).map(_encoded)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _records(whole: dict) -> st.SearchStrategy[bytes]:
    """Records with some fields gone and others replaced."""

    def changed(changes: dict, gone: list[str]) -> bytes:
        return json.dumps({k: v for k, v in {**whole, **changes}.items() if k not in gone}).encode()

    names = st.sampled_from(tuple(whole))
    return st.builds(changed, st.dictionaries(names, _JSON, max_size=3), st.lists(names, max_size=2))


def make_targets(folder: Path, record: dict) -> list[Target]:
    """All targets, with whole files to damage made in a folder; record: that of a run."""
    checkpoint = write_checkpoint(folder / "whole")
    dit = (
        convert_checkpoint(checkpoint, folder / "one") / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    manager = ModelManager(device="cpu")
    manager.load_models([checkpoint])
    model = manager.fetch_model("wan_video_dit")
    layer = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{layer}.lora_A.weight": model.blocks[0].self_attn.q.weight[:2].clone(),
         f"{layer}.lora_B.weight": model.blocks[0].self_attn.q.weight[:, :2].clone()},
        folder / "lora.safetensors",
    )  # fmt: skip
    lora = (folder / "lora.safetensors").read_bytes()
    save_state(folder / "run.state", {"x": model.blocks[0].norm3.weight.clone(), "step": 3}, {"step": 3})
    clip = write_clip(folder / "clip.mp4", num_frames=5, height=32, width=48).read_bytes()
    pictures = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(file, kind)
        pictures[kind] = file.getvalue()
    tokenizer = next(checkpoint.rglob("tokenizer.json")).read_bytes()
    vae, config = (checkpoint / name for name in ("Wan2.1_VAE.pth", "config.json"))

    def load_dit(path: Path) -> object:
        (path.parent / config.name).write_bytes(config.read_bytes())
        return load(path)

    def load(path: Path) -> object:
        return ModelManager(device="cpu").load_models([path])

    def load_config(path: Path) -> object:
        run_defaults(path.parent)
        for file in checkpoint.glob("*diffusion*"):
            if not (path.parent / file.name).exists():
                (path.parent / file.name).symlink_to(file)
        return load(path.parent)

    def picture(path: Path) -> object:
        with VideoData(image_folder=path.parent) as video:
            return [frame.size for frame in video]

    def video(path: Path) -> object:
        with VideoData(path) as frames:
            return [frame.size for frame in frames]

    def jobs(path: Path) -> object:
        return read_jobs(path, path.parent, {})

    def lora_of(path: Path) -> object:
        return read_lora(path, 1.0, model)

    def tokens(path: Path) -> object:
        return load_tokenizer(path.parent)("a cat")

    def prompt(path: Path) -> object:
        return clean_prompt(path.read_bytes().decode("utf-8", "replace"))

    text = st.text(max_size=MOST_TEXT).map(_encoded)
    configs = _JSON.map(json.dumps).map(_encoded) | damaged(config.read_bytes())
    records = _records(record) | damaged(json.dumps(record).encode())
    lines = _lines(("reference", "prompt", "seed", "output", "motion_tau"))
    return [
        Target("DiT, safetensors", damaged(dit) | lying_header(dit), "dit.safetensors", load_dit, 2),
        Target("VAE, .pth", damaged(vae.read_bytes()), "vae.pth", load),
        Target("LoRA", damaged(lora) | lying_header(lora), "l.safetensors", lora_of, 3),
        Target("config.json", configs, "c/config.json", load_config),
        Target("tokenizer", damaged(tokenizer), "t/tokenizer.json", tokens),
        Target("run state", damaged((folder / "run.state").read_bytes()), "run.state", load_state, 2),
        Target("record", records, "r.json", read_record, 2),
        Target("jobs, JSON lines", lines, "jobs.jsonl", jobs, 2),
        Target("jobs, CSV", text | lines, "jobs.csv", jobs),
        Target("prompt", text, "prompt.txt", prompt, 2),
        Target("video", damaged(clip), "clip.mp4", video, 2),
        Target("video, GIF", damaged(pictures.pop("GIF")), "clip.gif", video),
        *(Target(f"picture, {k}", damaged(p), f"{k}/1.{k.lower()}", picture) for k, p in pictures.items()),
    ]


def run_target(target: Target, folder: Path, cases: int, start: int = 0) -> Outcome:
    """Try so many cases; returns how they ended. Raises what is not allowed, or AssertionError for a case of
    more than SECONDS of processor time, with the smallest case that hypothesis finds.
    """
    outcome = Outcome()
    path = folder / "cases" / target.name.replace(", ", "-").replace(" ", "-") / target.file
    path.parent.mkdir(parents=True, exist_ok=True)

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        begun = time.process_time()
        try:
            target.read(path)
            end = "read"
        except target.allowed as error:
            end = type(error).__name__
        seconds = time.process_time() - begun
        assert seconds < SECONDS, f"{seconds:.1f} s"
        outcome.ends[end] += 1
        outcome.slowest = max(outcome.slowest, seconds)

    attempt()
    return outcome


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
