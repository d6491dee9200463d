"""Measured quality of motion transfer: references with known motion x prompts x methods -> rows of numbers.

A pair is a synthetic reference and a prompt that names another shape and other colours. Seeds of references
are held out from training; settings are to be tuned on pairs of the split "tune" and reported on "test",
half of whose references have shapes and trajectories that training never shows.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import metrics
from benchmarks.quality.adherence import check_prompt
from benchmarks.quality.contact_sheet import save_strip
from benchmarks.quality.methods import Method
from benchmarks.synthetic.clips import (
    COLOURS,
    HELD_OUT_SHAPES,
    HELD_OUT_TRAJECTORIES,
    LEAST_CONTRAST,
    PLAIN,
    SHAPES,
    SyntheticClip,
    make_clip,
)
from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import chunks_to_uint8, video_to_tensor
from diffsynth.evaluation.tracking import track_object
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.planning.cost import guidance_cost, guided_share, run_cost
from diffsynth.planning.sizes import ModelSizes

logger = logging.getLogger(__name__)

# First numbers of the seeds of references; training has 1 to 3.
SPLITS = {"test": 101, "tune": 102}
VARIATIONS = ("shaded", "checkered", "spin", "growth")
_PROMPT_SEED = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A reference clip, and a prompt with the shape, colour and background that it names.

    held_out: whether the reference's shape and trajectory are ones that training never shows. variation: what
    the reference's scene has beyond a plain object on a plain background, one of VARIATIONS, or "plain".
    """

    index: int
    split: str
    clip: SyntheticClip
    shape: str
    colour: str
    background: str
    prompt: str
    held_out: bool
    variation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The results of one run. Metrics are None where they mean nothing, or if the run failed (see `error`).

    Errors in pixels (see `metrics`); found: share of frames with an object; *_right: 1 or 0; *_consistency: 1
    is perfect. seconds: the whole call; denoising_seconds, guidance_seconds: parts of it.
    forward_equivalents: operations of the denoising in full DiT forwards, by count (see `guidance_cost`).
    settings: what the run was made with, as JSON.
    """

    split: str
    pair: int
    method: str
    seed: int
    held_out: bool
    variation: str
    settings: str
    trajectory_error: float | None = None
    relative_trajectory_error: float | None = None
    displacement_error: float | None = None
    velocity_cosine: float | None = None
    flow_error: float | None = None
    found: float | None = None
    shape_right: float | None = None
    colour_right: float | None = None
    background_right: float | None = None
    object_consistency: float | None = None
    background_consistency: float | None = None
    seconds: float | None = None
    denoising_seconds: float | None = None
    guidance_seconds: float | None = None
    gradient_evaluations: float | None = None
    forward_equivalents: float | None = None
    seen: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.split, self.pair, self.method, self.seed


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is still to be made."""

    pair: Pair
    method: Method
    seed: int


def make_pairs(
    count: int, split: str = "test", *, num_frames: int = 17, height: int = 64, width: int = 64
) -> list[Pair]:
    """The first `count` pairs of a split; pair i is the same for every count.

    Of four pairs in a row of the same kind one has a variation. In "test" every second reference has a
    held-out shape and trajectory. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return [_make_pair(i, split, (num_frames, height, width)) for i in range(count)]


def _make_pair(index: int, split: str, size: tuple[int, int, int]) -> Pair:
    seed = (SPLITS[split], index)
    held_out = split == "test" and index % 2 == 1
    variation = VARIATIONS[index // 8 % 4] if index // 2 % 4 == 3 else "plain"
    options = PLAIN if variation == "plain" else replace(PLAIN, **{variation: 1.0})
    if held_out:
        options = replace(options, shapes=HELD_OUT_SHAPES, trajectories=HELD_OUT_TRAJECTORIES)
    num_frames, height, width = size
    clip = make_clip(seed, num_frames=num_frames, height=height, width=width, options=options)
    own, ground = clip.objects[-1], clip.background[1]
    rng = np.random.default_rng((*seed, _PROMPT_SEED))
    shape = str(rng.choice([name for name in SHAPES if name != own.shape]))
    free = [name for name in COLOURS if name not in (own.colour, ground)]
    clear = [(a, b) for a in free for b in free if _contrast(a, b) > LEAST_CONTRAST]
    colour, background = clear[rng.integers(len(clear))]
    worded = make_clip(seed, num_frames=1, options=PLAIN, shape=shape, colour=colour, background=background)
    return Pair(
        index=index, split=split, clip=clip, shape=shape, colour=colour, background=background,
        prompt=worded.caption, held_out=held_out, variation=variation,
    )  # fmt: skip


def _contrast(one: str, other: str) -> float:
    return float(np.linalg.norm(np.subtract(COLOURS[one], COLOURS[other])))


def run_pair(
    pipe: WanVideoPipeline, pair: Pair, method: Method, seed: int, videos: Path | None = None
) -> Row:
    """Make one video and measure it; a run that fails gives a row that names the error.

    seed: a pair's runs with different seeds differ in their noise, and so do different pairs'.
    videos: a folder for the frames, one strip of pictures a run: see `strip_name`.
    """
    row = Row(
        split=pair.split, pair=pair.index, method=method.name, seed=seed, held_out=pair.held_out,
        variation=pair.variation, settings=settings_of(pipe, method),
    )  # fmt: skip
    started = time.perf_counter()
    try:
        frames, cost = _make_video(pipe, pair, method, seed)
    except (ValueError, RuntimeError) as error:
        logger.warning("pair %d, %s, seed %d failed: %s", pair.index, method.name, seed, error)
        return replace(row, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - started
    if videos is not None:
        save_strip(frames, videos / strip_name(pair, method.name, seed))
    return replace(row, seconds=seconds, **cost, **_measure(frames, pair, method))


def strip_name(pair: Pair, method: str, seed: int) -> str:
    """The file name of a run's strip."""
    words = "".join(letter if letter.isalnum() else "_" for letter in method)
    return f"{pair.split}_{pair.index:03d}_{words}_{seed}.png"


def settings_of(pipe: WanVideoPipeline, method: Method) -> str:
    """All that a method's runs are made with, apart from the weights, as JSON."""
    sampling = asdict(pipe.defaults)
    del sampling["motion"]
    return json.dumps({**sampling, **method.arguments}, default=_plain, sort_keys=True)


def _plain(value: object) -> object:
    return asdict(value)


def _make_video(
    pipe: WanVideoPipeline, pair: Pair, method: Method, seed: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Frames uint8 [T, H, W, 3], and the numbers of a Row that say what they cost."""
    num_frames, height, width = pair.clip.frames.shape[:3]
    if method.reconstructs:
        with torch.no_grad():
            latents = pipe.vae.encode(video_to_tensor(pair.clip.frames, num_frames, height, width))
            video = pipe.vae.decode(latents, num_frames=num_frames)
        return chunks_to_uint8([video], num_frames), {}
    (made,) = pipe.run(
        pair.prompt,
        input_video=pair.clip.frames if method.takes_reference else None,
        num_frames=num_frames,
        height=height,
        width=width,
        seed=1000 * pair.index + seed,
        tiled=False,
        output_type="np",
        progress_bar_cmd=iter,
        **method.arguments,
    )
    return made.frames, {
        "denoising_seconds": made.cost.time_gen,
        "guidance_seconds": sum(made.cost.time_guidance),
        "gradient_evaluations": made.cost.gradient_evaluations,
        "forward_equivalents": _full_forwards(pipe, made.options, made.cost.gradient_evaluations),
    }


def _full_forwards(pipe: WanVideoPipeline, options: RunOptions, evaluations: int) -> float:
    """Return the counted cost of a run's denoising."""
    sizes = ModelSizes.of(pipe.residency.models)
    latents = sizes.latent_shape(options.height, options.width, options.num_frames)
    counted = run_cost(sizes.dit, latents, options, checkpoint="none")
    if options.motion is None:
        return counted.sampling_ffe
    share = guided_share(sizes.dit, latents, options.motion)
    steps = options.num_inference_steps
    return counted.sampling_ffe + guidance_cost(
        options.motion, pipe.dit.num_layers, steps, evaluations, share=share
    )


def _measure(frames: np.ndarray, pair: Pair, method: Method) -> dict[str, float | str | None]:
    """The metrics of a Row."""
    track, truth = track_object(frames), pair.clip.centroids[-1]
    steady, still = metrics.temporal_consistency(frames, track)
    numbers = {
        "trajectory_error": metrics.trajectory_error(track, truth),
        "relative_trajectory_error": metrics.relative_trajectory_error(track, truth),
        "displacement_error": metrics.displacement_error(track, truth),
        "velocity_cosine": metrics.velocity_cosine(track, truth),
        "flow_error": metrics.flow_error(frames, pair.clip) if find_spec("cv2") else None,
        "found": float(track.found.mean()),
        "object_consistency": steady,
        "background_consistency": still,
    }
    if method.reconstructs:
        return numbers
    seen = check_prompt(frames, pair.shape, pair.colour, pair.background, track)
    return numbers | {
        "shape_right": float(seen.shape_right),
        "colour_right": float(seen.colour_right),
        "background_right": float(seen.background_right),
        "seen": f"{seen.colour_seen} {seen.shape_seen} on {seen.background_seen}",
    }


def evaluate(
    pipe: WanVideoPipeline,
    pairs: Sequence[Pair],
    methods: Sequence[Method],
    seeds: Sequence[int],
    rows_path: str | Path,
    videos: Path | None = None,
) -> list[Row]:
    """Run every pair with every method and seed; each row is appended to rows_path when it is there.

    Runs whose rows are there already are not made again, failed ones neither. Returns the rows of these
    pairs, methods and seeds. Raises ValueError as `missing_jobs`.
    """
    for job in missing_jobs(pipe, pairs, methods, seeds, rows_path):
        append_row(run_pair(pipe, job.pair, job.method, job.seed, videos), rows_path)
    wanted = {key for key, _ in _jobs(pairs, methods, seeds)}
    return [row for row in read_rows(rows_path) if row.key in wanted]


def missing_jobs(
    pipe: WanVideoPipeline,
    pairs: Sequence[Pair],
    methods: Sequence[Method],
    seeds: Sequence[int],
    rows_path: str | Path,
) -> list[Job]:
    """The runs of which rows_path has no row, pair by pair; what draws no noise is run with one seed.

    Raises ValueError if the file has rows of one of these methods that were made with other settings.
    """
    rows = read_rows(rows_path)
    for method in methods:
        settings = settings_of(pipe, method)
        if any(row.method == method.name and row.settings != settings for row in rows):
            raise ValueError(
                f"{rows_path} has rows of {method.name!r} that were made with other settings; "
                "give another file, or the method another name"
            )
    there = {row.key for row in rows}
    return [job for key, job in _jobs(pairs, methods, seeds) if key not in there]


def _jobs(
    pairs: Sequence[Pair], methods: Sequence[Method], seeds: Sequence[int]
) -> Iterator[tuple[tuple[str, int, str, int], Job]]:
    for pair in pairs:
        for method in methods:
            for seed in seeds[:1] if method.reconstructs else seeds:
                yield (pair.split, pair.index, method.name, seed), Job(pair, method, seed)


def append_row(row: Row, path: str | Path) -> None:
    """Add a row to a file of JSON lines; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file, none if there is no file. A last line that a killed run left unfinished is cut off.

    Raises ValueError for another line that is no row.
    """
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]


def _row(line: str, place: str) -> Row:
    """Raises ValueError, naming the place, for a line that is no row."""
    try:
        return Row(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{place}, is no row of this evaluation ({error}): {line[:80]!r}") from error
