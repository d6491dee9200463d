"""Clips of sprites over backgrounds, moved as `benchmarks.synthetic.clips` moves its shapes.

The motion comes from `make_clip`: its maps from an object's coordinates to pixels stay, its pictures are
replaced.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sprite_package import SPRITES, mean_colour, sprite
from synthetic import COLOURS, SceneOptions, SyntheticClip, make_clip, signed_distance

SCENERY: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "meadow": ((150, 205, 240), (95, 170, 80)),
    "beach": ((120, 190, 235), (230, 205, 150)),
    "sea": ((190, 225, 245), (40, 110, 175)),
    "night": ((25, 30, 70), (20, 55, 45)),
    "snow": ((175, 200, 225), (240, 244, 248)),
    "room": ((225, 205, 180), (140, 95, 65)),
}
PATTERNS = ("striped", "checkered", "mottled")
SUPERSAMPLING = 2
# Objects are four tokens wide or more, since smaller ones melt, and simple motion is most frequent.
MOTION = SceneOptions(radius=(0.24, 0.31), second_object=0.08, camera=0.1, spin=0.1, growth=0.08)
# A background covers half a picture beyond each edge, so that the camera may pan.
BEYOND = 0.5
_FLIP = Image.Transpose.FLIP_LEFT_RIGHT


@dataclass(frozen=True, kw_only=True, slots=True)
class SpriteScenes:
    """What a random clip is drawn from.

    Attributes:
        sprites: names of the sprites.
        shapes_only: probability of a clip of coloured shapes alone, as `make_clip` draws it.
        motion: options of the motion, and of the clips of shapes.
        second_is_shape: probability that the second object of a sprite's clip is a shape.
    """

    sprites: tuple[str, ...] = SPRITES
    shapes_only: float = 0.25
    motion: SceneOptions = MOTION
    second_is_shape: float = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class SpriteClip:
    """A clip of sprites and the clip of shapes that its motion is from; frames uint8 [T, H, W, 3]."""

    frames: np.ndarray
    caption: str
    motion: SyntheticClip
    background: np.ndarray


def make_sprite_clip(
    seed: int | tuple[int, ...],
    *,
    num_frames: int = 17,
    scenes: SpriteScenes | None = None,
    name: str | None = None,
    motion: SyntheticClip | None = None,
) -> SpriteClip:
    """Make a random clip of 64x64 pixels; the same seed and arguments give the same clip.

    Args:
        seed: of what is drawn, and of the motion.
        num_frames: frames of the clip.
        scenes: what it is drawn from.
        name: the sprite in front; it excludes a clip of shapes alone. By default it is drawn.
        motion: a clip whose objects and camera move as in the new one. By default it is drawn.
    """
    scenes = SpriteScenes() if scenes is None else scenes
    if motion is None:
        motion = make_clip(seed, num_frames=num_frames, options=scenes.motion)
    rng = np.random.default_rng((7, *np.atleast_1d(seed)))
    if rng.random() < scenes.shapes_only and name is None:
        return SpriteClip(
            frames=motion.frames, caption=motion.caption, motion=motion, background=motion.frames[0]
        )
    names = [name or str(rng.choice(scenes.sprites)) for _ in motion.objects]
    names[:-1] = [str(rng.choice(scenes.sprites)) for _ in motion.objects[:-1]]
    if len(names) > 1 and rng.random() < scenes.second_is_shape:
        names[0] = ""
    mirrored = rng.random(len(names)) < 0.5
    height, width = motion.frames.shape[1:3]
    world, place = _draw_world(rng, mean_colour(names[-1]), SUPERSAMPLING * min(height, width))
    grounds = camera_views(world, motion.layers[0], height, width)
    frames = np.empty_like(motion.frames)
    for t, ground in enumerate(grounds):
        picture = ground
        for item, own, flip, maps in zip(motion.objects, names, mirrored, motion.layers[1:], strict=True):
            if own:
                picture = _with_sprite(picture, own, bool(flip), maps[t])
            else:
                picture = _with_shape(picture, item.shape, item.colour, maps[t])
        frames[t] = np.asarray(_reduced(picture))
    words = [own or f"{item.colour} {item.shape}" for item, own in zip(motion.objects, names, strict=True)]
    caption = " and ".join(_with_article(word) for word in reversed(words))
    background = np.asarray(_reduced(grounds[0]))
    return SpriteClip(frames=frames, caption=f"{caption} on {place}", motion=motion, background=background)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _reduced(picture: Image.Image) -> Image.Image:
    return picture.reduce(SUPERSAMPLING)


def _draw_world(rng: np.random.Generator, avoid: np.ndarray, side: int) -> tuple[Image.Image, str]:
    """Return a background from -BEYOND to 1 + BEYOND, and the words for it."""
    size = round(side * (1 + 2 * BEYOND))
    rows, columns = np.mgrid[0:size, 0:size] / side - BEYOND
    kind = rng.choice(["plain", "gradient", "scenery", "pattern"], p=[0.35, 0.2, 0.25, 0.2])
    first = _draw_colour(rng, avoid)
    if kind == "scenery":
        scenery = str(rng.choice(list(SCENERY)))
        pixels = _scenery(rng, scenery, rows, columns)
        words = f"a {scenery} background"
    elif kind == "gradient":
        second = str(rng.choice([name for name in COLOURS if name != first]))
        along = rng.choice([0, 1])
        share = (columns if along else rows).clip(0, 1)[..., None]
        pixels = (1 - share) * _colour(rng, first) + share * _colour(rng, second)
        words = f"{_with_article(first)} and {second} gradient background"
    elif kind == "pattern":
        pattern = str(rng.choice(PATTERNS))
        pixels = _pattern(rng, pattern, rows, columns) * _colour(rng, first)
        words = f"a {pattern} {first} background"
    else:
        pixels = np.broadcast_to(_colour(rng, first), (size, size, 3))
        words = f"{_with_article(first)} background"
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)), words


def _draw_colour(rng: np.random.Generator, avoid: np.ndarray) -> str:
    far = [name for name, rgb in COLOURS.items() if np.linalg.norm(np.subtract(rgb, avoid)) > 90]
    return str(rng.choice(far or list(COLOURS)))


def _colour(rng: np.random.Generator, name: str) -> np.ndarray:
    """Return a shade near the named colour [3]."""
    return np.array(COLOURS[name], float) + rng.normal(0, 8, 3)


def _scenery(rng: np.random.Generator, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return sky and ground with a wavy horizon, and in half of them a sun or a cloud: [H, W, 3]."""
    sky, ground = (np.array(rgb, float) + rng.normal(0, 6, 3) for rgb in SCENERY[name])
    height = 0.0 if name in ("room", "sea") else rng.uniform(0, 0.06)
    horizon = rng.uniform(0.5, 0.75) + height * np.sin(rng.uniform(4, 9) * columns + rng.uniform(0, 6))
    below = ((rows - horizon) * 40 + 0.5).clip(0, 1)[..., None]
    shade = (1 + 0.25 * (rows - horizon)).clip(0.7, 1.15)[..., None]
    pixels = (1 - below) * sky * shade + below * ground * (2 - shade)
    if rng.random() < 0.5:
        centre, radius = rng.uniform([0.08, 0.1], [0.25, 0.9]), rng.uniform(0.06, 0.13)
        stretch = 1.0 if name in ("night", "room") else rng.choice([1.0, 2.0])
        distance = np.hypot(rows - centre[0], (columns - centre[1]) / stretch)
        cover = ((radius - distance) * 60 + 0.5).clip(0, 1)[..., None]
        bright = np.array([250, 250, 250] if stretch == 2 else [255, 225, 110], float)
        pixels = pixels + cover * (bright - pixels)
    return pixels


def _pattern(rng: np.random.Generator, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the brightness [H, W, 1] of a pattern, at most about 1."""
    if name == "mottled":
        cells = int(rng.integers(12, 28))
        rough = Image.fromarray(rng.uniform(0.55, 1.1, (cells, cells)).astype(np.float32))
        return np.asarray(rough.resize(rows.shape[::-1], Image.Resampling.BICUBIC))[..., None]
    period = rng.uniform(5, 9)
    if name == "checkered":
        odd = (np.floor(rows * period / 2) + np.floor(columns * period / 2)) % 2
        return 1 - 0.3 * odd[..., None]
    angle = rng.uniform(0, np.pi)
    wave = np.sin(2 * np.pi * period * (np.cos(angle) * rows + np.sin(angle) * columns))
    return (0.85 + 0.15 * np.tanh(3 * wave))[..., None]


def camera_views(world: Image.Image, camera: np.ndarray, height: int, width: int) -> list[Image.Image]:
    """Return what the camera shows of the background, frame by frame, at SUPERSAMPLING times the size.

    camera [T, 2, 3] maps (row, column, 1) of the world, in units of the shorter side, to pixels.
    """
    side = world.size[0] / (1 + 2 * BEYOND)
    views: list[Image.Image] = []
    for t, matrix in enumerate(camera):
        if t and np.allclose(matrix, camera[t - 1]):
            views.append(views[-1])
            continue
        data = _pillow_map(matrix, scale=side, offset=np.full(2, BEYOND * side))
        size = (SUPERSAMPLING * width, SUPERSAMPLING * height)
        views.append(world.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))
    return views


def _pillow_map(matrix: np.ndarray, scale: float, offset: np.ndarray) -> tuple[float, ...]:
    """Return Pillow's map from (x, y) of a supersampled picture to a layer's image.

    matrix [2, 3] maps the layer's (row, column, 1) to pixels; image = scale * layer + offset.
    """
    linear = np.linalg.inv(matrix[:, :2])
    shift = -linear @ matrix[:, 2] * scale + offset
    linear = linear * scale / SUPERSAMPLING
    return (linear[1, 1], linear[1, 0], shift[1], linear[0, 1], linear[0, 0], shift[0])


def _with_sprite(picture: Image.Image, name: str, mirrored: bool, layer: np.ndarray) -> Image.Image:
    image = sprite(name)
    return with_cut_out(picture, image.transpose(_FLIP) if mirrored else image, layer)


def with_cut_out(picture: Image.Image, image: Image.Image, layer: np.ndarray) -> Image.Image:
    """Return a picture of SUPERSAMPLING times the size with an RGBA image where `layer` [2, 3] takes it."""
    radius = SUPERSAMPLING * np.sqrt(np.linalg.det(layer[:, :2]))
    # At the size that it is seen in: sampling without a filter skips pixels of larger ones.
    factor = min(1.0, 2 * radius / max(image.size))
    image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    half = np.array(image.size[::-1]) / 2
    data = _pillow_map(layer, scale=float(half.max()), offset=half)
    moved = image.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return Image.alpha_composite(picture.convert("RGBA"), moved).convert("RGB")


def _with_shape(picture: Image.Image, shape: str, colour: str, layer: np.ndarray) -> Image.Image:
    width, height = picture.size
    points = (np.moveaxis(np.mgrid[0:height, 0:width], 0, -1) + 0.5) / SUPERSAMPLING
    linear = np.linalg.inv(layer[:, :2])
    own = (points - layer[:, 2]) @ linear.T
    scale = SUPERSAMPLING * np.sqrt(np.linalg.det(layer[:, :2]))
    cover = (0.5 - scale * signed_distance(shape, own)).clip(0, 1)
    mask = Image.fromarray((255 * cover).round().astype(np.uint8))
    return Image.composite(Image.new("RGB", picture.size, COLOURS[colour]), picture, mask)
