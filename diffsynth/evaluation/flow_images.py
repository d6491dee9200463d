"""Pictures of motion flow: a colour for each direction, arrows over the frames.

Flow is (rows, columns) in tokens: where a token of one latent frame is found in the next. A video of F latent
frames has F - 1 steps; a frame shows the step from its own latent frame to the next one.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth.data import fit_frame, save_video
from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.evaluation.drawing import FINER, draw_arrow, draw_trajectories, fine_layer, legible_size, over
from diffsynth.evaluation.followed import one_object
from diffsynth.evaluation.grid import picture_grid
from diffsynth.evaluation.tracking import Track

FRAMES_PER_LATENT = 4
PIXELS_PER_TOKEN = 16
WHEEL_SIZE = 72  # pixels
SHEET_HEIGHT = 160  # pixels of a picture of `flow_sheet`
# Flow shorter than this, in tokens, counts as rest and is drawn as a dot.
LEAST_ARROW = 0.25
_SPACING = 30  # pixels between arrows, about
_WHITE, _DARK = (255, 255, 255, 255), (25, 25, 25, 200)
_COVER = 0.6  # opacity of the fullest colour over a frame
_FULL_TEXTURE = 16.0  # deviation of brightness, 0 to 255, of a token whose flow is drawn in full
_LEAST_SURE = 0.15  # tokens of less texture have no arrow
_MARGIN = 6  # pixels between the wheel and the corner


def flow_to_image(flow: Tensor | np.ndarray, largest: float | None = None) -> Image.Image:
    """Draw a flow in the colours of a wheel: hue is direction, strength is length, white is no motion.

    Right is red, down is yellow-green, left is cyan, up is violet.

    Args:
        flow: [H, W, 2], (rows, columns) in tokens.
        largest: the length, in tokens, that gets full colour; by default the longest in this flow.

    Raises:
        ValueError: the flow has another shape, or values that are not finite.
    """
    flow = _checked(flow, 3)
    return _colours(flow, _strength(flow, largest))


def flow_wheel(size: int = WHEEL_SIZE) -> Image.Image:
    """Draw the legend of the colours: a disc, RGBA of size x size pixels, whose rim has full colour."""
    finer = 4 * size
    axis = (np.arange(finer) + 0.5) / finer * 2 - 1
    directions = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    wheel = flow_to_image(directions, largest=0.9).convert("RGBA")
    mask = Image.new("L", wheel.size)
    ImageDraw.Draw(mask).ellipse([2, 2, finer - 3, finer - 3], fill=255)
    wheel.putalpha(mask)
    ImageDraw.Draw(wheel).ellipse([2, 2, finer - 3, finer - 3], outline=_DARK, width=6)
    return wheel.reduce(4)


def neighbour_flow(amf: Tensor | np.ndarray, sf: int = 4) -> np.ndarray:
    """Return the steps from each latent frame to the next: [P, H, W, 2] -> [F - 1, H, W, 2].

    The pairs i <= j < i + sf are those of `reference_flow`. ValueError: P does not fit sf, or F is 1.
    """
    amf = _checked(amf, 4)
    num_frames, counts = 1, [1]
    while sum(counts) < len(amf):
        num_frames += 1
        counts = [min(sf, num_frames - i) for i in range(num_frames)]
    if sum(counts) != len(amf) or num_frames < 2 or sf < 2:
        raise ValueError(f"{len(amf)} pairs do not make a flow of two or more latent frames with sf={sf}")
    # The pair (i, i + 1) comes right after the pair (i, i).
    return amf[[sum(counts[:i]) + 1 for i in range(num_frames - 1)]]


def displacements(amf: Tensor | np.ndarray, sf: int = 4) -> dict[str, float]:
    """Return how far tokens move by a flow that `reference_flow` returned, over pairs i <= j < i + sf.

    mean_displacement and largest_displacement are in pixels a frame; share_moving, from 0 to 1, is of the
    tokens that move by at least a quarter of a token from one latent frame to the next.
    """
    tokens = np.linalg.norm(neighbour_flow(amf, sf), axis=-1)
    pixels = tokens * PIXELS_PER_TOKEN / FRAMES_PER_LATENT
    return {
        "mean_displacement": float(pixels.mean()),
        "largest_displacement": float(pixels.max()),
        "share_moving": float((tokens >= LEAST_ARROW).mean()),
    }


def full_length(flow: np.ndarray) -> float:
    """Return the length, in tokens, to show in full colour: 99 of 100 of flow [..., 2] are shorter."""
    return float(np.percentile(np.linalg.norm(flow, axis=-1), 99))


def texture(frame: Image.Image, height: int, width: int) -> np.ndarray:
    """Return how much there is to follow in each of height x width tokens of a frame: float [H, W], 0 to 1.

    It is the deviation of the brightness within the token; attention has nothing to hold on to in flat ones.
    """
    pixels = np.asarray(frame.convert("L").resize((width * 8, height * 8), Image.Resampling.BILINEAR), float)
    return np.clip(pixels.reshape(height, 8, width, 8).std(axis=(1, 3)) / _FULL_TEXTURE, 0, 1)


def known_tokens(video: Sequence[Image.Image], shape: Sequence[int], track: Track | None) -> list[np.ndarray]:
    """Return which tokens' flow is drawn, and how strongly: float [H, W], 0 to 1, for each step.

    They are those of the object that is tracked or, without one, those with texture, in the frame at which
    the latent frame ends that a step starts from. shape is that of the flow, [F - 1, H, W, 2].
    """
    steps, height, width, _ = shape
    known = []
    for index in (min(FRAMES_PER_LATENT * step, len(video) - 1) for step in range(steps)):
        if track is None:
            known.append(texture(video[index], height, width))
        else:
            mask = Image.fromarray(track.masks[index].astype(np.float32))
            known.append(np.asarray(mask.resize((width, height), Image.Resampling.BOX)))
    return known


def flow_video(
    frames: Video, flow: Tensor | np.ndarray, *, height: int | None = None, largest: float | None = None
) -> Iterator[Image.Image]:
    """Draw on each frame the colours and arrows of its step, and an only object's path.

    Args:
        frames: the video.
        flow: [F - 1, H, W, 2] in tokens.
        height: height of the pictures in pixels; by default that of the frames, with small ones enlarged.
        largest: as for `flow_to_image`, for all frames.

    Raises:
        ValueError: at the call, as `flow_to_image`.
    """
    return _drawn(list(rgb_frames(frames)), _checked(flow, 4), height, largest)[1]


def _drawn(
    video: Sequence[Image.Image], flow: np.ndarray, height: int | None = None, longest: float | None = None
) -> tuple[list[np.ndarray], Iterator[Image.Image]]:
    """Return the tokens that `known_tokens` returns, and the pictures of `flow_video`."""
    track = one_object(video) if len(video) > 1 else None
    known, largest = known_tokens(video, flow.shape, track), longest or full_length(flow)
    under = video if track is None else draw_trajectories(video, [track.centroids])
    size = legible_size(video[0].size)
    if height is not None:
        size = (round(video[0].width * height / video[0].height), height)

    def pictures() -> Iterator[Image.Image]:
        for step, group in groupby(range(len(video)), lambda index: _step_of_frame(index, len(flow))):
            sure, moves = known[step], flow[step]
            layers = (_colour_layer(moves, largest, size, sure), _arrow_layer(moves, size, sure))
            for index in group:
                yield over(fit_frame(under[index], size[1], size[0]), *layers)

    return known, pictures()


def save_flow_video(
    amf: Tensor | np.ndarray, path: str | Path, *, sf: int = 4, frames: Video | None = None, fps: float = 15
) -> Path:
    """Write a video of an attention motion flow: what will be transferred.

    Args:
        amf: [P, H, W, 2] over the pairs i <= j < i + sf of F latent frames, as `reference_flow` returns it.
        path: path of the video file.
        sf: the span of the pairs.
        frames: the reference; its frames with colours and arrows stand to the left of the colours alone.
            Without it there are the colours only, one picture a step.
        fps: frames a second of the file.

    Returns:
        The path.

    Raises:
        ValueError: P does not fit sf, or there is only one latent frame.
    """
    flow = neighbour_flow(amf, sf)
    shown = colour_panels(flow) if frames is None else _beside(list(rgb_frames(frames)), flow)
    return save_video(shown, path, fps=fps, quality=8)


def _beside(video: Sequence[Image.Image], flow: np.ndarray) -> Iterator[Image.Image]:
    (known, drawn), panels = _drawn(video, flow), list[Image.Image]()
    for index, left in enumerate(drawn):
        panels = panels or colour_panels(flow, left.size, sure=known)
        both = (left, panels[_step_of_frame(index, len(flow))])
        yield Image.fromarray(np.hstack([np.asarray(picture) for picture in both]))


def colour_panels(
    flow: np.ndarray, size: tuple[int, int] | None = None, sure: Sequence[np.ndarray] | None = None
) -> list[Image.Image]:
    """Draw the colours of each step of a flow [F - 1, H, W, 2] with arrows on white, and the wheel.

    size is (width, height) in pixels. Tokens fade to white where `sure`, [H, W] from 0 to 1 for each step, is
    low.
    """
    height, width = flow.shape[1:3]
    size = legible_size((width * PIXELS_PER_TOKEN, height * PIXELS_PER_TOKEN)) if size is None else size
    sure = [np.ones((height, width))] * len(flow) if sure is None else sure
    largest = full_length(flow)
    strengths = [_strength(step, largest) * known for step, known in zip(flow, sure, strict=True)]
    # Of each corner, from the lower right one on, how much is drawn in its quarter of the picture.
    total, quarters = np.sum(strengths, 0), (slice(-(-height // 2)), slice(-(-width // 2)))
    drawn_in = [total[::down, ::along][quarters].sum() for down, along in product((-1, 1), repeat=2)]
    bottom, right = divmod(3 - int(np.argmin(drawn_in)), 2)
    side = min(WHEEL_SIZE, min(size) // 4)
    left, top = (n - side - _MARGIN if far else _MARGIN for n, far in zip(size, (right, bottom), strict=True))
    legend = Image.new("RGBA", size)
    legend.paste(flow_wheel(side), (left, top))
    panels = []
    for step, known, strength in zip(flow, sure, strengths, strict=True):
        colours = _colours(step, strength).resize(size, Image.Resampling.NEAREST)
        panels.append(over(colours, _arrow_layer(step, size, known, _DARK, None), legend))
    return panels


def flow_sheet(frames: Video, flow: Tensor | np.ndarray, *, sf: int = 4) -> Image.Image:
    """Draw one sheet: above, the frame at which each latent frame ends; below, the flow from it to the next.

    Args:
        frames: the video.
        flow: [P, H, W, 2], as `reference_flow` returns it.
        sf: the span of the pairs.

    Raises:
        ValueError: as `neighbour_flow`.
    """
    steps = neighbour_flow(flow, sf)
    video = list(rgb_frames(frames))
    size = (round(video[0].width * SHEET_HEIGHT / video[0].height), SHEET_HEIGHT)
    known, pictures = _drawn(video, steps, SHEET_HEIGHT)
    drawn = list(pictures)
    above = [drawn[min(4 * step, len(video) - 1)].resize(size) for step in range(len(steps))]
    below = [panel.resize(size) for panel in colour_panels(steps, sure=known)]
    return picture_grid([above, below], [[f"frame {4 * s + 1} to {4 * s + 5}" for s in range(len(steps))]])


def _step_of_frame(index: int, num_steps: int) -> int:
    """Return which step a frame shows; the first frame is a latent frame alone, and the last has no step."""
    return min(-(-index // FRAMES_PER_LATENT), num_steps - 1)


def _checked(flow: Tensor | np.ndarray, ndim: int) -> np.ndarray:
    values = flow.detach().float().cpu().numpy() if isinstance(flow, Tensor) else flow
    array = np.asarray(values, np.float32)
    if array.ndim != ndim or array.shape[-1] != 2 or 0 in array.shape:
        axes = {3: "[H, W, 2]", 4: "[P, H, W, 2]"}[ndim]
        raise ValueError(f"flow must be {axes}; got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("flow has values that are not finite")
    return array


def _strength(flow: np.ndarray, largest: float | None) -> np.ndarray:
    length = np.linalg.norm(flow, axis=-1)
    return np.clip(length / max(length.max() if largest is None else largest, 1e-6), 0, 1)


def _colours(flow: np.ndarray, saturation: np.ndarray) -> Image.Image:
    hue = np.arctan2(flow[..., 0], flow[..., 1]) / (2 * np.pi) % 1
    hsv = np.stack([hue * 255, saturation * 255, np.full_like(hue, 255)], axis=-1)
    return Image.fromarray(hsv.round().astype(np.uint8), mode="HSV").convert("RGB")


def _colour_layer(flow: np.ndarray, largest: float, size: tuple[int, int], sure: np.ndarray) -> Image.Image:
    """Full colours whose opacity is the length of the flow, interpolated between tokens, times `sure`."""
    sides = [Image.fromarray(np.ascontiguousarray(flow[..., axis])) for axis in (0, 1)]
    smooth = np.stack([np.asarray(side.resize(size, Image.Resampling.BILINEAR)) for side in sides], axis=-1)
    strength = _strength(smooth, largest)
    layer = _colours(smooth, np.ones_like(strength)).convert("RGBA")
    known = Image.fromarray(sure.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    strength = strength * np.asarray(known)
    layer.putalpha(Image.fromarray((strength * _COVER * 255).round().astype(np.uint8)))
    return layer


def _arrow_layer(
    flow: np.ndarray,
    size: tuple[int, int],
    sure: np.ndarray,
    colour: tuple[int, ...] = _WHITE,
    rim: tuple[int, ...] | None = _DARK,
) -> Image.Image:
    """Arrows from the middles of tokens that are sure, fainter where less; a rim keeps them legible."""
    height, width = flow.shape[:2]
    token = np.array([size[1] / height, size[0] / width])
    every = max(1, round(_SPACING / token.min()))
    thick = max(1.5, token.min() * every / 16)
    moves = flow * (np.linalg.norm(flow, axis=-1, keepdims=True) >= LEAST_ARROW)
    layer = fine_layer(size)
    draw = ImageDraw.Draw(layer)
    for shade, line in ((rim, thick + 2), (colour, thick)):
        for row, col in product(range(every // 2, height, every), range(every // 2, width, every)):
            if shade is not None and sure[row, col] > _LEAST_SURE:
                ink = (*shade[:3], round(shade[3] * float(sure[row, col])))
                start = (np.array([row, col]) + 0.5) * token * FINER
                end = start + moves[row, col] * token * FINER
                draw_arrow(draw, (start[1], start[0]), (end[1], end[0]), ink, line * FINER)
    return layer
