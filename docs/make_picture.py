"""Make the README's moving picture and the sheet of all videos that were drawn for it.

python docs/make_picture.py [--model nano] [--prompts "..." "..." "..."] [--output_dir docs]

Each row is a shipped clip (reference), the prompt alone (no transfer) and the prompt with the clip's motion
(transferred). Seeds are 0, 1, 2, 3; the moving picture shows seed 0 of each row, the sheet all of them.
Red is the object's path in the video, blue the path of the reference's object. With --modes it makes the
README's strip instead: the last frame of one clip and seed in each mode and preset, and its seconds.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.evaluation import draw_trajectories, track_object
from diffsynth.evaluation.grid import picture_grid

HERE = Path(__file__).parent
CLIPS = HERE.parent / "examples" / "data"
# By shipped clip; --prompts are others, for a model of other words.
PROMPTS = {
    "bounce": "a blue star on a yellow background",
    "circle": "a red triangle on a white background",
    "zigzag": "a green ring on a black background",
}
SEEDS = range(4)
TILE = 256  # pixels
COLUMNS = ("reference", "no transfer", "transferred")
STRIP_TILE = 170  # pixels; as wide as its labels
COLOURS = 160  # of the moving picture
MODES: dict[str, dict[str, str]] = {
    "No_transfer": {"mode": "No_transfer"},
    "effi_AMF": {},
    "AMF": {"mode": "AMF"},
    "FlowMotion": {"mode": "FlowMotion"},
    "effi_AMF, balanced": {"preset": "balanced"},
    "effi_AMF, fast": {"preset": "fast"},
}
Row = dict[str, list[Image.Image]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", nargs=len(PROMPTS), help="one for each clip: " + ", ".join(PROMPTS))
    parser.add_argument("--modes", action="store_true", help="make the strip of modes")
    parser.add_argument("--output_dir", type=Path, default=HERE)
    args = parser.parse_args()
    prompts = dict(zip(PROMPTS, args.prompts, strict=True)) if args.prompts else PROMPTS
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    if args.modes:
        strip(pipe, "bounce", prompts["bounce"]).save(args.output_dir / "modes.png", optimize=True)
        return
    drawn = {(clip, seed): videos(pipe, clip, prompts[clip], seed) for clip in prompts for seed in SEEDS}
    rows = {prompts[clip]: drawn[clip, SEEDS[0]][0] for clip in prompts}
    save_moving(rows, args.output_dir / "transfer.gif")
    sheet(drawn, prompts).save(args.output_dir / "transfer_all.png", optimize=True)
    errors = {f"{clip}, seed {seed}": found[1] for (clip, seed), found in drawn.items()}
    print(json.dumps(errors, indent=1))
    for column in COLUMNS[1:]:
        print(f"{column}: median path error {np.median([e[column] for e in errors.values()]):.1f} px of 64")


def videos(pipe: WanVideoPipeline, clip: str, prompt: str, seed: int) -> tuple[Row, dict[str, float]]:
    """Return the tiles of a row with their paths, and the path error of its videos in pixels."""
    video = VideoData(CLIPS / f"{clip}.mp4")
    without = pipe(prompt, seed=seed, mode="No_transfer", progress_bar_cmd=iter)
    moved = pipe(prompt, seed=seed, input_video=video, progress_bar_cmd=iter)
    size = moved[0].size
    reference = [frame.resize(size, Image.Resampling.LANCZOS) for frame in video]
    path = track_object(reference).centroids
    tiles, errors = {"reference": draw_trajectories(reference, [path])}, {}
    for name, frames in zip(COLUMNS[1:], (without, moved), strict=True):
        own = track_object(frames).centroids
        errors[name] = round(float(np.linalg.norm(own - path, axis=1).mean()), 1)
        tiles[name] = draw_trajectories(frames, [own, path])
    return tiles, errors


def strip(pipe: WanVideoPipeline, clip: str, prompt: str) -> Image.Image:
    """Return the last frames of seed 0 in each mode with the paths, and the seconds."""
    video = VideoData(CLIPS / f"{clip}.mp4")
    reference = [frame.resize((64, 64), Image.Resampling.LANCZOS) for frame in video]
    path = track_object(reference).centroids
    tiles, labels = [draw_trajectories(reference, [path])[-1]], ["reference"]
    for name, choice in MODES.items():
        motion = {} if name == "No_transfer" else {"input_video": video}
        started = time.perf_counter()
        frames = pipe(prompt, seed=0, progress_bar_cmd=iter, **motion, **choice)
        seconds = time.perf_counter() - started
        tiles.append(draw_trajectories(frames, [track_object(frames).centroids, path])[-1])
        labels.append(f"{name}: {seconds:.0f} s")
        print(labels[-1])
    tiles = [tile.resize((STRIP_TILE, STRIP_TILE), Image.Resampling.LANCZOS) for tile in tiles]
    return picture_grid([tiles], [labels])


def save_moving(rows: dict[str, Row], file: Path) -> None:
    """Write the rows as a GIF that repeats, with the prompt above each."""
    length = min(len(row["reference"]) for row in rows.values())
    captions = [f'"{prompt}"' for prompt in rows]
    pages = [
        picture_grid([[row[c][t] for c in COLUMNS] for row in rows.values()], [COLUMNS], captions)
        for t in range(length)
    ]
    palette = pages[length // 2].quantize(COLOURS, dither=Image.Dither.NONE)
    first, *others = (page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages)
    times = [90] * (length - 1) + [900]  # milliseconds; the last frame, with the whole path, stays
    first.save(file, save_all=True, append_images=others, duration=times, loop=0, optimize=True)


def sheet(drawn: dict[tuple[str, int], tuple[Row, dict[str, float]]], prompts: dict[str, str]) -> Image.Image:
    """Return the last frames, with the whole paths: a row for each clip and way, a column for each seed."""
    pictures, captions, labels = [], [], []
    for clip, prompt in prompts.items():
        for column in COLUMNS[1:]:
            found = [drawn[clip, seed] for seed in SEEDS]
            shown = [row["reference"][-1] for row, _ in found[:1]] + [row[column][-1] for row, _ in found]
            pictures.append([tile.resize((TILE // 2, TILE // 2), Image.Resampling.LANCZOS) for tile in shown])
            captions.append(f'{column}: "{prompt}"')
            labels.append(
                ["reference", *(f"{seed}: {e[column]} px" for seed, (_, e) in zip(SEEDS, found, strict=True))]
            )
    return picture_grid(pictures, labels, captions)


if __name__ == "__main__":
    main()
