"""Path error of motion transfer on clips of sprites, with and without a picture, and a sheet to look at.

python -m benchmarks.quality.picture_motion --model models/Wan2.2-TI2V-nano --pairs 8 --output results/picture
--apart moves the picture's object by up to a third of the side; the truth then is the path moved along.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.quality.methods import standard_methods
from diffsynth import WanVideoPipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_nano"))
from sprite_package import HELD_OUT_SPRITES, SPRITES
from sprite_scenes import SpriteClip, make_sprite_clip

from benchmarks.synthetic.clips import PLAIN, make_clip

logger = logging.getLogger(__name__)
SHOWN = (0, 4, 8, 12, 16)
PAIRS_KIND = 220  # seeds of these pairs, apart from those of training
NOT_PLAIN = ("gradient", "striped", "checkered", "mottled")


def plain_clip(seed: tuple[int, ...], name: str, motion: Any) -> SpriteClip:
    """Return a clip of a sprite before one colour, so that its place is known in a generated video, too."""
    for attempt in range(100):
        clip = make_sprite_clip((*seed, attempt), name=name, motion=motion)
        flat = np.ptp(clip.background.reshape(-1, 3), axis=0).max() == 0
        if flat and not any(word in clip.caption for word in NOT_PLAIN):
            return clip
    raise RuntimeError("no plain background in 100 attempts")


def make_pair(index: int, names: tuple[str, ...], apart: bool) -> tuple[SpriteClip, SpriteClip]:
    """Return a reference and the clip that a perfect transfer to another sprite would make."""
    rng = np.random.default_rng((PAIRS_KIND, index))
    motion = make_clip((PAIRS_KIND, index), options=PLAIN)
    first, second = rng.choice(names, 2, replace=False)
    reference = make_sprite_clip((PAIRS_KIND, index, 0), name=str(first), motion=motion)
    truth = plain_clip((PAIRS_KIND, index, 1), str(second), motion)
    return reference, replace(truth, frames=moved_apart(rng, truth.frames)) if apart else truth


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


def centres(frames: np.ndarray) -> np.ndarray:
    """Return the object's centre [T, 2] in each frame: what differs from the commonest colour."""
    ground = np.median(frames.reshape(-1, 3), axis=0)
    difference = np.abs(frames - ground).max(-1)
    found = []
    for frame in difference:
        mask = frame > (40 if (frame > 40).sum() > 4 else 20)
        found.append(np.argwhere(mask).mean(0) + 0.5 if mask.sum() > 2 else np.full(2, 32.0))
    return np.array(found)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean() + 1e-10))


def generate(
    pipe: WanVideoPipeline, clip: SpriteClip, reference: SpriteClip, picture: bool, **options: Any
) -> np.ndarray:
    """Return the frames for the clip's caption, and its first frame if `picture`."""
    arguments = {"input_video": as_images(reference.frames), "output_type": "np", **options}
    if options.get("mode") == "No_transfer":
        del arguments["input_video"]
    if picture:
        arguments["input_image"] = Image.fromarray(clip.frames[0])
    return pipe(clip.caption, progress_bar_cmd=iter, **arguments)


def as_images(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/Wan2.2-TI2V-nano")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--unseen", action="store_true", help="sprites that were never trained on")
    parser.add_argument("--apart", action="store_true", help="the picture's object is elsewhere")
    parser.add_argument("--only", choices=("text", "picture"))
    parser.add_argument("--lr", type=float, nargs=2, default=(0.02, 0.013), help="with a picture")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path("results/picture_motion"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    declared = next(method.motion for method in standard_methods(pipe) if method.name == "effi_AMF")
    assert declared is not None
    gentle = replace(declared, lr=tuple(args.lr))
    cases = [
        ("text", False, {"mode": "No_transfer", "cfg_scale": args.cfg}),
        ("text + motion", False, {"motion": declared, "cfg_scale": args.cfg}),
        ("picture", True, {"mode": "No_transfer", "cfg_scale": 1.0}),
        ("picture + motion", True, {"motion": gentle, "cfg_scale": 1.0}),
    ]
    if args.apart:
        cases.append(("picture + motion, not aligned", True, {**cases[-1][2], "align": "none"}))
    cases = [case for case in cases if args.only in (None, case[0].split()[0])]
    rows: dict[str, list] = {name: [] for name, *_ in cases}
    sheet = []
    for index in range(args.pairs):
        reference, truth = make_pair(index, HELD_OUT_SPRITES if args.unseen else SPRITES, args.apart)
        strips = [reference.frames, truth.frames]
        path = centres(truth.frames.astype(float))
        for name, picture, options in cases:
            frames = generate(pipe, truth, reference, picture, seed=index, **options)
            error = np.linalg.norm(centres(frames.astype(float)) - path, axis=1).mean()
            rows[name].append((error, psnr(frames, truth.frames), psnr(frames[0], truth.frames[0])))
            strips.append(frames)
            logger.info("%d %s: %s: %.1f px", index, name, truth.caption, error)
        sheet.append(np.concatenate([np.concatenate(strip[list(SHOWN)], 1) for strip in strips], 1))
        Image.fromarray(np.concatenate(sheet)).save(args.output / "sheet.png")
    for name, values in rows.items():
        mean, median = np.mean(values, axis=0), np.median(values, axis=0)
        line = {"error": mean[0], "median": median[0], "psnr": mean[1], "first_frame": mean[2]}
        logger.info("%s", json.dumps({"case": name, **{key: round(v, 2) for key, v in line.items()}}))


if __name__ == "__main__":
    main()
