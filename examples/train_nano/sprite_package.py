"""Fetch the sprites: the npm package of Microsoft's Fluent emoji (MIT), named by plain English words.

python examples/train_nano/sprite_package.py
Writes small copies into examples/train_nano/sprites, where they are committed; needed only to
change the selection.
"""

import argparse
import io
import logging
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
FOLDER = Path(__file__).parent / "sprites"
SIDE = 96  # pixels of the longer side of a committed copy, three times what a clip shows
CODES = {
    "cat": "1f431",
    "dog": "1f436",
    "panda": "1f43c",
    "frog": "1f438",
    "tiger": "1f42f",
    "lion": "1f981",
    "cow": "1f42e",
    "pig": "1f437",
    "monkey": "1f435",
    "chick": "1f424",
    "octopus": "1f419",
    "ladybug": "1f41e",
    "fish": "1f420",
    "whale": "1f433",
    "bee": "1f41d",
    "snail": "1f40c",
    "crab": "1f980",
    "car": "1f697",
    "bus": "1f68c",
    "rocket": "1f680",
    "ship": "1f6a2",
    "apple": "1f34e",
    "tangerine": "1f34a",
    "lemon": "1f34b",
    "banana": "1f34c",
    "watermelon": "1f349",
    "cherries": "1f352",
    "pizza": "1f355",
    "burger": "1f354",
    "cookie": "1f36a",
    "football": "26bd",
    "baseball": "26be",
    "balloon": "1f388",
    "gift": "1f381",
    "sunflower": "1f33b",
    "cactus": "1f335",
    "mushroom": "1f344",
    "ghost": "1f47b",
    "alien": "1f47d",
    "moon": "1f31d",
    "sun": "1f31e",
    "earth": "1f30d",
    "umbrella": "2602-fe0f",
    "crown": "1f451",
    "bell": "1f514",
    "clock": "23f0",
    "snowman": "26c4",
    "gem": "1f48e",
    "fox": "1f98a",
    "turtle": "1f422",
    "taxi": "1f695",
    "donut": "1f369",
    "robot": "1f916",
    "basketball": "1f3c0",
    "penguin": "1f427",
    "strawberry": "1f353",
}
HELD_OUT_SPRITES = ("fox", "turtle", "taxi", "donut", "robot", "basketball", "penguin", "strawberry")
SPRITES = tuple(name for name in CODES if name not in HELD_OUT_SPRITES)


def fetch_sprites(folder: Path) -> None:
    """Download the npm package and write a WebP copy of each named sprite into `folder`.

    Raises:
        RuntimeError: npm is missing, its registry is not reached, or the package lacks a sprite.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is needed to fetch {PACKAGE}; install Node.js")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        command = [npm, "pack", PACKAGE, "--pack-destination", download]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(download).glob("*.tgz"))
        if result.returncode or not archives:
            raise RuntimeError(
                f"npm could not fetch {PACKAGE}; is its registry reached? npm says: {result.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            for name, code in CODES.items():
                picture = Image.open(io.BytesIO(_member(archive, code))).convert("RGBA")
                picture = picture.crop(picture.getchannel("A").getbbox())
                picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                picture.save(folder / f"{name}.webp", quality=90)


def _member(archive: tarfile.TarFile, code: str) -> bytes:
    for spelling in (code, code.removesuffix("-fe0f")):
        try:
            file = archive.extractfile(f"package/assets/{spelling}.webp")
        except KeyError:
            continue
        if file is not None:
            return file.read()
    raise RuntimeError(f"{PACKAGE} has no sprite {code}")


@cache
def sprite(name: str) -> Image.Image:
    """Return a sprite (RGBA, cropped to its silhouette).

    Raises:
        FileNotFoundError: no sprite has that name, or the sprites were not fetched.
    """
    path = FOLDER / f"{name}.webp"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run examples/train_nano/sprite_package.py")
    return Image.open(path).convert("RGBA")


@cache
def mean_colour(name: str) -> np.ndarray:
    """Return the mean colour [3] of what a sprite covers, 0 to 255."""
    pixels = np.asarray(sprite(name), float)
    weight = pixels[..., 3:] / pixels[..., 3].sum()
    return (pixels[..., :3] * weight).sum((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    fetch_sprites(args.output)
    logger.info("%d sprites in %s", len(CODES), args.output)


if __name__ == "__main__":
    main()
