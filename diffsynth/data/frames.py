"""Single frames: fit one to a size, bring any image to RGB, read a folder of them, write PNG files.

A frame is a PIL image of mode RGB, upright. Image sizes are (width, height) as in PIL; arguments and arrays
are height first.
"""

import logging
import math
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffsynth.data.files import unfinished

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Picture = str | Path | Image.Image | np.ndarray  # a file, an image or a uint8 array [H, W, 3]
FITS = ("crop", "pad", "stretch")  # how a frame is brought to another size
logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
EXIF_QUARTER_TURNS = (5, 6, 7, 8)
# PIL refuses pictures of more than 179 million pixels as decompression bombs.
MOST_PICTURE = 178_956_970
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


def checked_int(name: str, value: int, minimum: int = 1) -> int:
    """Return value as an int; ValueError that names it unless it is a whole number >= minimum (no bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def fit_frame(image: Image.Image, height: int, width: int, fit: str = "crop") -> Image.Image:
    """Bring an image to a size in pixels with a bicubic filter; the same object if it has that size already.

    Cropping takes whole pixels around the centre, rounded down, as DiffSynth-Studio and the released FastVMT
    do, so that references give the same latents.

    Args:
        image: mode RGB or L, which is kept.
        height, width: the size in pixels.
        fit: "crop" the side that is too long, "pad" with black, or "stretch".

    Raises:
        TypeError: image is not a PIL image.
        ValueError: height or width is not a positive integer, or fit is unknown.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
    size = (checked_int("width", width), checked_int("height", height))
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    if image.size == size:
        return image
    if fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BICUBIC)
    if fit == "crop":
        image = image.crop(crop_box(image.size, size))
    return image.resize(size, Image.Resampling.BICUBIC)


def crop_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of what cropping leaves; source and target are (width, height)."""
    width, height = source
    if height / width < target[1] / target[0]:
        width = max(1, int(height / target[1] * target[0]))
    else:
        height = max(1, int(width / target[0] * target[1]))
    left, top = (source[0] - width) // 2, (source[1] - height) // 2
    return left, top, left + width, top + height


def warn_of_cropping(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Log a warning if `fit_frame` crops away more than a tenth of a picture; sizes as for `crop_box`."""
    left, top, right, bottom = crop_box(source, target)
    lost = {"width": 1 - (right - left) / source[0], "height": 1 - (bottom - top) / source[1]}
    side = max(lost, key=lambda name: lost[name])
    if lost[side] > 0.1:
        message = "%dx%d -> %dx%d cuts off %.0f %% of the %s; fit pad or stretch keeps it"
        logger.warning(message, *source, *target, 100 * lost[side], side)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in mode RGB, with transparent pixels over black and 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):
        # PIL clips these at 255 instead of scaling, so that most of a 16-bit picture would turn white.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; ValueError names a file that is not readable here or while it is decoded."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def load_image(path: Path) -> Image.Image:
    """Read one image, upright (EXIF orientation applied) and RGB; ValueError names an unreadable file."""
    with _opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def read_picture(picture: Picture, name: str) -> Image.Image:
    """Return a picture, upright and RGB.

    Args:
        picture: a file, an image or a uint8 array [H, W, 3].
        name: name of the argument, for errors.

    Raises:
        TypeError, ValueError: it is not a picture, it is animated, too small or too large, or the file is not
            readable.
    """
    if isinstance(picture, str | Path):
        with _opened(Path(picture)) as opened:
            return read_picture(opened, name)
    if isinstance(picture, Image.Image):
        size, count = picture.size, getattr(picture, "n_frames", 1)
        if count > 1 and picture.format != "MPO":  # a phone's photograph
            raise ValueError(f"{name} must be one picture; it is animated, {count} frames")
    else:
        size = np.shape(picture)[1::-1]
    if size and (min(size) < 8 or math.prod(size) > MOST_PICTURE):
        shown = "x".join(map(str, size))
        raise ValueError(f"{name} must have 8 pixels a side to {MOST_PICTURE} in all; got {shown}")
    if isinstance(picture, Image.Image):
        picture = to_rgb(ImageOps.exif_transpose(picture))
    return next(rgb_frames([picture], name))


def rgb_frames(
    frames: Iterable[Image.Image | np.ndarray] | np.ndarray, name: str = "frames"
) -> Iterator[Image.Image]:
    """Yield every frame as an RGB image.

    Args:
        frames: PIL images or uint8 arrays [H, W, 3] (also from a generator), or one uint8 array [T, H, W, 3].
        name: name of the argument, for errors.

    Raises:
        TypeError: frames is not iterable, or a frame is neither an image nor a uint8 array.
        ValueError: frames is empty, an array has another shape, or a frame differs in size from frame 0.
    """
    if isinstance(frames, (str, bytes, Image.Image)) or not isinstance(frames, Iterable):
        raise TypeError(f"{name} must be an iterable of images or arrays, got {type(frames).__name__}")
    size = None
    for index, frame in enumerate(frames):
        image = _rgb_frame(frame, f"frame {index} of {name}")
        size = size or image.size
        if image.size != size:
            raise ValueError(
                f"frame {index} of {name} is {image.width}x{image.height}, but frame 0 is "
                f"{size[0]}x{size[1]}: all frames must have the same size"
            )
        yield image
    if size is None:
        raise ValueError(f"{name} is empty: at least one frame is needed")


def _rgb_frame(frame: Image.Image | np.ndarray, name: str) -> Image.Image:
    if isinstance(frame, Image.Image):
        return to_rgb(frame)
    if not isinstance(frame, np.ndarray):
        raise TypeError(f"{name} must be a PIL image or a uint8 array, got {type(frame).__name__}")
    if frame.dtype != np.uint8:
        raise TypeError(f"{name} has dtype {frame.dtype}, must be uint8 (0 to 255)")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"{name} has shape {list(frame.shape)}, must be [height, width, 3]")
    return Image.fromarray(np.ascontiguousarray(frame))


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder by suffix, without hidden ones, in natural order (2 before 10)."""

    def natural(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", path.name.lower())
        return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name

    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted((path for path in found if not path.name.startswith(".")), key=natural)


def write_pngs(frames: Iterator[Image.Image], folder: Path, digits: int) -> None:
    """Write frames to folder as 0.png, 1.png, ..., numbers padded to digits; all appear at once, at the end.

    An error leaves none behind. Files that are no images stay; FileExistsError if folder holds images:
    nothing is ever overwritten, and two videos never mix.
    """
    if folder.is_dir() and (present := list_images(folder)):
        raise FileExistsError(f"{folder} already holds images ({present[0].name}, ...): give an empty folder")
    first = next(frames)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, folder=True) as temporary:
        for index, image in enumerate(chain([first], frames)):
            image.save(temporary / f"{index:0{digits}d}.png")
        try:
            temporary.replace(folder)  # whole, if the folder is new or empty
        except OSError:
            folder.mkdir(exist_ok=True)
            for path in list_images(temporary):
                path.replace(folder / path.name)


class ImageFolder:
    """The images of a folder as the frames of a video without a frame rate, in natural order of their names.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder is a file or holds no images.
    """

    fps = None

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise FileNotFoundError(f"image_folder {folder} does not exist")
        if not folder.is_dir():
            raise ValueError(f"image_folder {folder} is not a folder; for a video file give video_file")
        self._paths = list_images(folder)
        if not self._paths:
            raise ValueError(f"image_folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._paths)

    def common_size(self) -> tuple[int, int]:
        """Return (width, height) of all images, from their headers; ValueError names one that differs."""
        first = _upright_size(self._paths[0])
        for path in self._paths[1:]:
            size = _upright_size(path)
            if size != first:
                raise ValueError(
                    f"{path} is {size[0]}x{size[1]}, but {self._paths[0].name} is {first[0]}x{first[1]}: "
                    "give height and width to bring all frames to one size"
                )
        return first

    def frame(self, index: int) -> Image.Image:
        """Return the frame at 0 <= index < len, RGB and upright."""
        return load_image(self._paths[index])

    def stream(self) -> Generator[Image.Image, None, None]:
        """Yield all frames in order, with one in memory at a time."""
        return (load_image(path) for path in self._paths)

    def close(self) -> None:
        """Do nothing, since no file is open between frames."""


def _upright_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION) in EXIF_QUARTER_TURNS
        return (image.height, image.width) if turned else image.size
