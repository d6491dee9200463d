"""Generated clips with known motion: one or two coloured shapes that move over a background.

All lengths are in units of the picture's shorter side, so that the same seed gives the same scene at any
size. Captions name what is seen and never how it moves. Ground truth is exact: each layer (background, then
objects from back to front) moves by an affine map, frame by frame.
"""

from dataclasses import dataclass, fields

import numpy as np

from benchmarks.synthetic.shapes import KNOWN_SHAPES, signed_distance
from benchmarks.synthetic.trajectories import PATHS, place_path

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT_SHAPES = ("hexagon", "heart")
TRAJECTORIES = ("line", "accelerate", "arc", "circle", "zigzag", "bounce")
HELD_OUT_TRAJECTORIES = ("wave", "spiral")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 60),
    "cyan": (60, 215, 225),
    "blue": (35, 70, 205),
    "purple": (130, 45, 175),
    "pink": (255, 140, 195),
    "white": (245, 245, 245),
    "black": (20, 20, 25),
}
OBJECT_TEXTURES = ("plain", "striped", "dotted")
BACKGROUND_TEXTURES = ("plain", "shaded", "checkered")
RADIUS = (0.18, 0.23)
REACH = (0.45, 0.85)
# Weaker contrasts than this (distance in RGB) are not drawn.
LEAST_CONTRAST = 120


def _check_names(name: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [item for item in given if item not in known]
    if unknown or not given:
        raise ValueError(f"{name} must be of {', '.join(known)}; got {given!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneOptions:
    """Names that a random scene draws from, and the probabilities of its features (see `make_clip`).

    Attributes:
        textured: probability of an object with a texture.
        shaded: probability of a shaded background; likewise checkered.
        camera: probability of a pan or a zoom.
        still: probability of an object at rest.
        radius: smallest and largest of an object at the start, in units of the picture's shorter side.

    Raises:
        ValueError: a name is unknown, or a probability is not from 0 to 1.
    """

    shapes: tuple[str, ...] = SHAPES
    trajectories: tuple[str, ...] = TRAJECTORIES
    textured: float = 0.15
    shaded: float = 0.2
    checkered: float = 0.1
    second_object: float = 0.15
    camera: float = 0.15
    spin: float = 0.2
    growth: float = 0.15
    still: float = 0.04
    radius: tuple[float, float] = RADIUS

    def __post_init__(self) -> None:
        _check_names("shapes", self.shapes, KNOWN_SHAPES)
        _check_names("trajectories", self.trajectories, tuple(PATHS))
        for field in fields(self)[2:-1]:
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be a probability, 0 to 1; got {value!r}")


# One plain object on a plain background and a camera at rest.
PLAIN = SceneOptions(textured=0, shaded=0, checkered=0, second_object=0, camera=0, spin=0, growth=0, still=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """An object of a scene; its radius is the one at the start, in units of the picture's shorter side."""

    shape: str
    colour: str
    texture: str
    trajectory: str
    radius: float

    @property
    def caption(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return _with_article(f"{texture}{self.colour} {self.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticClip:
    """A clip and its ground truth; n objects, from back to front.

    Attributes:
        frames: uint8 [T, H, W, 3].
        caption: a sentence about the scene.
        masks: bool [n, T, H, W], the pixels where an object is seen.
        centroids: float32 [n, T, 2], (row, column) in pixels, of the object, hidden or not.
        layers: float64 [1 + n, T, 2, 3], maps from a layer's coordinates (row, column, 1) to pixels; the
            background is the first.
        background: (texture, colour).
    """

    frames: np.ndarray
    caption: str
    objects: tuple[SceneObject, ...]
    background: tuple[str, str]
    masks: np.ndarray
    centroids: np.ndarray
    layers: np.ndarray

    def displacement(self, i: int, j: int) -> np.ndarray:
        """Return the displacement of what is seen at each pixel of frame i to frame j: float32 [H, W, 2],
        (rows, columns) in pixels; it may lead out of the picture or behind another object.
        """
        height, width = self.frames.shape[1:3]
        points = _pixel_centres(height, width)
        layer_of = np.zeros((height, width), int)
        for index, mask in enumerate(self.masks[:, i]):
            layer_of[mask] = index + 1
        moves = np.stack([_chain(maps[j], _inverse(maps[i])) for maps in self.layers])
        matrices = moves[layer_of]
        moved = np.einsum("hwab,hwb->hwa", matrices[..., :2], points) + matrices[..., 2]
        return (moved - points).astype(np.float32)


def make_clip(
    seed: int | tuple[int, ...],
    *,
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    options: SceneOptions | None = None,
    shape: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    trajectory: str | None = None,
) -> SyntheticClip:
    """Make a random clip; the same seed and arguments give the same clip.

    Shape, colour and trajectory of the (front) object and the background's colour may be fixed by name.
    Objects may spin (up to three quarters of a turn) and grow or shrink (by up to a third); the camera may
    pan (by up to a
    quarter of the picture) or zoom (by up to a quarter).

    Raises:
        ValueError: an unknown name, or a size below 16 pixels or 1 frame.
    """
    options = SceneOptions() if options is None else options
    _check_size(num_frames, height, width)
    for name, given, known in (
        ("shape", shape, KNOWN_SHAPES),
        ("colour", colour, tuple(COLOURS)),
        ("background", background, tuple(COLOURS)),
        ("trajectory", trajectory, tuple(PATHS)),
    ):
        if given is not None:
            _check_names(name, (given,), known)
    rng = np.random.default_rng(seed)
    ground = _draw_background(rng, options, background, colour)
    chosen = {"shape": shape, "colour": colour, "trajectory": trajectory}
    objects = [_draw_object(rng, options, ground[1], chosen)]
    if rng.random() < options.second_object:
        other: dict[str, str | None] = {"shape": None, "colour": None, "trajectory": None}
        objects.insert(0, _draw_object(rng, options, ground[1], other, avoid=objects[0].colour))
    times = np.linspace(0, 1, num_frames) if num_frames > 1 else np.zeros(1)
    side = min(height, width)
    camera = _camera_maps(rng, times, np.array([height, width]) / side, options.camera) * side
    maps = [_object_maps(rng, item, times, np.array([height, width]) / side, options) for item in objects]
    layers = np.stack([camera, *(_chain(camera, item) for item in maps)])
    frames, masks = _render(ground, objects, layers, height, width)
    caption = " and ".join(item.caption for item in reversed(objects))
    texture = "" if ground[0] == "plain" else f"{ground[0]} "
    place = _with_article(f"{texture}{ground[1]} background")
    return SyntheticClip(
        frames=frames,
        caption=f"{caption} on {place}",
        objects=tuple(objects),
        background=ground,
        masks=masks,
        centroids=layers[1:, :, :, 2].astype(np.float32),
        layers=layers,
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _draw_background(
    rng: np.random.Generator, options: SceneOptions, colour: str | None, object_colour: str | None
) -> tuple[str, str]:
    texture = rng.choice(
        BACKGROUND_TEXTURES,
        p=[max(0.0, 1 - options.shaded - options.checkered), options.shaded, options.checkered],
    )
    if colour is None:
        avoid = () if object_colour is None else (object_colour,)
        colour = _draw_colour(rng, avoid)
    return str(texture), colour


def _draw_object(
    rng: np.random.Generator,
    options: SceneOptions,
    ground: str,
    chosen: dict[str, str | None],
    avoid: str | None = None,
) -> SceneObject:
    shape = str(rng.choice(options.shapes))
    trajectory = "still" if rng.random() < options.still else str(rng.choice(options.trajectories))
    colour = _draw_colour(rng, (ground,) if avoid is None else (ground, avoid))
    texture = str(rng.choice(OBJECT_TEXTURES[1:])) if rng.random() < options.textured else "plain"
    return SceneObject(
        shape=chosen["shape"] or shape,
        colour=chosen["colour"] or colour,
        texture=texture,
        trajectory=chosen["trajectory"] or trajectory,
        radius=float(rng.uniform(*options.radius)),
    )


def _draw_colour(rng: np.random.Generator, avoid: tuple[str, ...]) -> str:
    """Draw a colour that differs clearly from those to avoid."""
    good = [
        name
        for name, rgb in COLOURS.items()
        if all(np.linalg.norm(np.subtract(rgb, COLOURS[other])) > LEAST_CONTRAST for other in avoid)
    ]
    return str(rng.choice(good))


def _camera_maps(
    rng: np.random.Generator, times: np.ndarray, extent: np.ndarray, probability: float
) -> np.ndarray:
    """Draw maps [T, 2, 3] from world to picture, both in units of the shorter side."""
    pan, zoom = np.zeros(2), 1.0
    if rng.random() < probability:
        if rng.random() < 0.5:
            angle = rng.uniform(0, 2 * np.pi)
            pan = rng.uniform(0.1, 0.25) * np.array([np.sin(angle), np.cos(angle)])
        else:
            zoom = rng.uniform(1.1, 1.25) ** rng.choice([-1, 1])
    scale = zoom**times
    shift = (1 - scale)[:, None] * extent / 2 + times[:, None] * pan
    return _affine(scale, np.zeros_like(times), shift)


def _object_maps(
    rng: np.random.Generator, item: SceneObject, times: np.ndarray, extent: np.ndarray, options: SceneOptions
) -> np.ndarray:
    """Draw maps [T, 2, 3] from the coordinates of an object, with radius 1, to the world."""
    margin = 0.9 * item.radius
    path = place_path(item.trajectory, times, rng.uniform(*REACH), margin * np.ones(2), extent - margin, rng)
    upright = item.shape == "heart"
    angle = np.full_like(times, 0.0 if upright else rng.uniform(-0.15, 0.15))
    if rng.random() < options.spin:
        angle = angle + rng.uniform(-1.5, 1.5) * np.pi * times
    growth = rng.uniform(0.75, 1.33) if rng.random() < options.growth else 1.0
    return _affine(item.radius * growth**times, angle, path)


def _affine(scale: np.ndarray, angle: np.ndarray, shift: np.ndarray) -> np.ndarray:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1), shift], axis=-1)


def _chain(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return the maps [..., 2, 3] that apply `inner`, then `outer`."""
    linear = outer[..., :2] @ inner[..., :2]
    shift = (outer[..., :2] @ inner[..., 2:])[..., 0] + outer[..., 2]
    return np.concatenate([linear, shift[..., None]], axis=-1)


def _inverse(maps: np.ndarray) -> np.ndarray:
    linear = np.linalg.inv(maps[..., :2])
    return np.concatenate([linear, -linear @ maps[..., 2:]], axis=-1)


def _pixel_centres(height: int, width: int) -> np.ndarray:
    return np.moveaxis(np.mgrid[0:height, 0:width], 0, -1) + 0.5


def _render(
    ground: tuple[str, str], objects: list[SceneObject], layers: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return frames, uint8 [T, H, W, 3], and masks, bool [n, T, H, W]."""
    num_frames = layers.shape[1]
    pixels = _pixel_centres(height, width)
    masks = np.zeros((len(objects), num_frames, height, width), bool)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        picture = _ground_picture(ground, layers[0, t], pixels)
        for index, item in enumerate(objects):
            area, cover, colours = _object_picture(item, layers[1 + index, t], pixels)
            picture[area] += cover[..., None] * (colours - picture[area])
            masks[(slice(index), t, *area)] &= cover < 0.5
            masks[(index, t, *area)] = cover >= 0.5
        frames[t] = picture.round().clip(0, 255)
    return frames, masks


def _ground_picture(ground: tuple[str, str], camera: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the background [H, W, 3]."""
    texture, colour = ground
    rgb = np.array(COLOURS[colour], float)
    if texture == "plain":
        return np.broadcast_to(rgb, (*pixels.shape[:2], 3)).copy()
    inverse = _inverse(camera)
    world = pixels @ inverse[:, :2].T + inverse[:, 2]
    if texture == "shaded":
        return rgb * (0.72 + 0.28 * (0.5 + 0.5 * np.sin(2.2 * world.sum(-1))))[..., None]
    checks = np.floor(world * 4).sum(-1) % 2
    return rgb * (1 - 0.25 * checks)[..., None]


def _object_picture(
    item: SceneObject, layer: np.ndarray, pixels: np.ndarray
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Return the slices that an object may touch, how much of each pixel it covers, and its colours."""
    scale = np.sqrt(np.linalg.det(layer[:, :2]))
    start = np.maximum(np.floor(layer[:, 2] - scale - 1), 0).astype(int)
    stop = np.maximum(np.ceil(layer[:, 2] + scale + 1), 0).astype(int)
    area = (slice(start[0], stop[0]), slice(start[1], stop[1]))
    inverse = _inverse(layer)
    own = pixels[area] @ inverse[:, :2].T + inverse[:, 2]
    cover = (0.5 - scale * signed_distance(item.shape, own)).clip(0, 1)
    rgb = np.array(COLOURS[item.colour], float)
    if item.texture == "plain":
        return area, cover, rgb
    if item.texture == "striped":
        pattern = 0.5 + 0.5 * np.tanh(4 * np.sin(7 * own[..., 0]))
    else:
        pattern = 0.5 + 0.5 * np.tanh(6 * (np.sin(6 * own[..., 0]) * np.sin(6 * own[..., 1]) - 0.3))
    # Away from the colour's own brightness, so that black and white have textures, too.
    other = rgb * 0.45 if rgb.sum() > 200 else rgb + 110
    return area, cover, rgb + pattern[..., None] * (other - rgb)


def _check_size(num_frames: int, height: int, width: int) -> None:
    for name, given, least in (("num_frames", num_frames, 1), ("height", height, 16), ("width", width, 16)):
        if given < least:
            raise ValueError(f"{name} must be at least {least}; got {given}")
