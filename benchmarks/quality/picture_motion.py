"""Quality of motion transfer on clips of sprites, with and without a picture, and a sheet to look at.

python -m benchmarks.quality.picture_motion --model models/Wan2.2-TI2V-nano --pairs 8 --output results/picture
--apart moves the picture's object by up to a third of the side; the truth then is the path moved along.
--references half makes every other reference one that is unlike what the model was trained on (`unlike`).

Of each video: error, the mean distance to the true path in pixels, and its median over videos; length, of the
path over the true one; right, whether the object of the last frame is most like its own sprite; along, PSNR
to the truth moved along the video's path; first_frame and psnr, to the truth; background, the share of its
pixels that have the right colour. variety: mean difference of two seeds around their objects.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.quality.methods import standard_methods
from benchmarks.quality.picture_metrics import (
    background_right,
    centres,
    nearest_sprite,
    path_length,
    psnr,
    psnr_along,
    variety,
)
from benchmarks.quality.unlike import CAMERA_MOVE, KINDS, make_unlike_frames
from diffsynth import WanVideoPipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_nano"))
from sprite_package import HELD_OUT_SPRITES, SPRITES
from sprite_scenes import MOTION, SpriteClip, make_sprite_clip

from benchmarks.synthetic.clips import PLAIN, make_clip

logger = logging.getLogger(__name__)
SHOWN = (0, 4, 8, 12, 16)
PAIRS_KIND = 220  # seeds of these pairs, apart from those of training
REFERENCES = ("ordinary", "half", "unlike")
NOT_PLAIN = ("gradient", "striped", "checkered", "mottled")


def plain_clip(seed: tuple[int, ...], name: str, motion: Any) -> SpriteClip:
    """Return a clip of a sprite before one colour, so that its place is known in a generated video, too."""
    for attempt in range(100):
        clip = make_sprite_clip((*seed, attempt), name=name, motion=motion)
        flat = np.ptp(clip.background.reshape(-1, 3), axis=0).max() == 0
        if flat and not any(word in clip.caption for word in NOT_PLAIN):
            return clip
    raise RuntimeError("no plain background in 100 attempts")


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturePair:
    """A reference, uint8 [T, H, W, 3], and the clip that a perfect transfer to sprite `name` would make."""

    kind: str
    reference: np.ndarray
    name: str
    truth: SpriteClip


def make_pair(index: int, names: Sequence[str], apart: bool, references: str = "ordinary") -> PicturePair:
    """Return a pair; `references` is one of REFERENCES. The same arguments give the same pair."""
    rng = np.random.default_rng((PAIRS_KIND, index))
    unlike = references == "unlike" or (references == "half" and index % 2 == 1)
    kind = KINDS[index // (2 if references == "half" else 1) % len(KINDS)] if unlike else "ordinary"
    camera = replace(PLAIN, radius=MOTION.radius, camera=float(kind == CAMERA_MOVE))
    motion = make_clip((PAIRS_KIND, index), options=camera)
    first, second = map(str, rng.choice(names, 2, replace=False))
    if unlike:
        reference = make_unlike_frames((PAIRS_KIND, index), kind, motion)
    else:
        reference = make_sprite_clip((PAIRS_KIND, index, 0), name=first, motion=motion).frames
    truth = plain_clip((PAIRS_KIND, index, 1), second, motion)
    truth = replace(truth, frames=moved_apart(rng, truth.frames)) if apart else truth
    return PicturePair(kind=kind, reference=reference, name=second, truth=truth)


def moved_apart(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Return frames of a plain background whose object is elsewhere by up to a third of the side."""
    side, path = frames.shape[1], centres(frames.astype(float))
    for _ in range(1000):
        offset = rng.integers(-side // 3, side // 3 + 1, 2)
        away = path + offset
        if np.abs(offset).max() > side // 8 and away.min() > side / 8 and away.max() < side * 7 / 8:
            break
    else:
        raise RuntimeError("the object's path leaves no room to move it")
    out = np.roll(frames, tuple(offset), axis=(1, 2))
    for axis, moved in enumerate(offset.tolist(), 1):  # what came in from the other side
        beyond = slice(0, moved) if moved > 0 else slice(side + moved, side)
        np.moveaxis(out, axis, 0)[beyond] = np.median(frames.reshape(-1, 3), axis=0)
    return out


def measured(frames: np.ndarray, pair: PicturePair) -> dict[str, float]:
    """Return the numbers of one video that the top of this file lists."""
    truth, path = pair.truth.frames, centres(pair.truth.frames)
    own = centres(frames)
    last = pair.truth.motion.layers[-1, len(frames) - 1]
    return {
        "error": float(np.linalg.norm(own - path, axis=1).mean()),
        "length": path_length(own) / path_length(path),
        "right": float(nearest_sprite(frames[-1], last) == pair.name),
        "along": psnr_along(frames, truth),
        "first_frame": psnr(frames[0], truth[0]),
        "psnr": psnr(frames, truth),
        "background": background_right(frames, truth),
    }


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of the rows' numbers, and the median error."""
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    numbers = {"error": means["error"], "median": float(np.median([row["error"] for row in rows])), **means}
    return {name: round(value, 3 if name == "variety" else 2) for name, value in numbers.items()}


def generate(pipe: WanVideoPipeline, pair: PicturePair, picture: bool, **options: Any) -> np.ndarray:
    """Return the frames for the clip's caption, and its first frame if `picture`."""
    reference = [Image.fromarray(frame) for frame in pair.reference]
    arguments = {"input_video": reference, "output_type": "np", **options}
    if options.get("mode") == "No_transfer":
        del arguments["input_video"]
    if picture:
        arguments["input_image"] = Image.fromarray(pair.truth.frames[0])
    return pipe(pair.truth.caption, progress_bar_cmd=iter, **arguments)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/Wan2.2-TI2V-nano")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1, help="videos of each case and pair")
    parser.add_argument("--unseen", action="store_true", help="sprites that were never trained on")
    parser.add_argument("--apart", action="store_true", help="the picture's object is elsewhere")
    parser.add_argument("--references", choices=REFERENCES, default=REFERENCES[0])
    parser.add_argument("--only", choices=("text", "picture"))
    parser.add_argument("--lr", type=float, nargs=2, default=(0.02, 0.013), help="with a picture")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path("results/picture_motion"))
    return parser.parse_args()


def cases_of(pipe: WanVideoPipeline, args: argparse.Namespace) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Return what is compared: name -> whether it gets the picture, and options of the call."""
    declared = next(method.motion for method in standard_methods(pipe) if method.name == "effi_AMF")
    assert declared is not None
    gentle = {"motion": replace(declared, lr=tuple(args.lr)), "cfg_scale": 1.0}
    cases: dict[str, tuple[bool, dict[str, Any]]] = {
        "text": (False, {"mode": "No_transfer", "cfg_scale": args.cfg}),
        "text + motion": (False, {"motion": declared, "cfg_scale": args.cfg}),
        "picture": (True, {"mode": "No_transfer", "cfg_scale": 1.0}),
        "picture + motion": (True, gentle),
    }
    if args.apart:
        cases["picture + motion, not aligned"] = (True, {**gentle, "align": "none"})
    return {name: case for name, case in cases.items() if args.only in (None, name.split()[0])}


def main() -> None:
    args = read_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    cases = cases_of(pipe, args)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    sheet = []
    for index in range(args.pairs):
        try:
            pair = make_pair(index, HELD_OUT_SPRITES if args.unseen else SPRITES, args.apart, args.references)
        except RuntimeError as error:
            logger.info("%d is left out: %s", index, error)
            continue
        strips = [pair.reference, pair.truth.frames]
        for name, (picture, options) in cases.items():
            seeds = range(index, index + 1000 * args.seeds, 1000)
            videos = [generate(pipe, pair, picture, seed=seed, **options) for seed in seeds]
            found = [measured(video, pair) for video in videos]
            with (args.output / "rows.jsonl").open("a") as file:
                named = {"pair": index, "case": name, "references": pair.kind}
                file.writelines(f"{json.dumps({**named, **row})}\n" for row in found)
            if len(videos) > 1:
                found[0]["variety"] = variety(videos)
            rows.setdefault((pair.kind, name), []).extend(found)
            strips.append(videos[0])
            errors = ", ".join(f"{row['error']:.1f}" for row in found)
            logger.info("%d %s (%s): %s: %s px", index, name, pair.kind, pair.truth.caption, errors)
        sheet.append(np.concatenate([np.concatenate(strip[list(SHOWN)], 1) for strip in strips], 1))
        Image.fromarray(np.concatenate(sheet)).save(args.output / "sheet.png")
    for (kind, name), values in sorted(rows.items()):
        line = {"references": kind, "case": name, "videos": len(values), **summary(values)}
        logger.info("%s", json.dumps(line))


if __name__ == "__main__":
    main()
