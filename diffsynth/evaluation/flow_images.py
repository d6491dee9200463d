"""Pictures of motion flow: a colour for each direction, arrows over the frames.

Flow is (rows, columns) in tokens: where a token of one latent frame is found in the next. Of a video of F
latent frames there are F - 1 steps; a frame shows the step from its own latent frame to the next one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth.data import VideoData, fit_frame, save_video
from diffsynth.data.frames import rgb_frames
from diffsynth.evaluation.drawing import Sketch, draw_arrow, legible_size, over

FRAMES_PER_LATENT = 4
PIXELS_PER_TOKEN = 16
WHEEL_SIZE = 72  # pixels
# Shorter flow than this, in tokens, is rest: a dot.
LEAST_ARROW = 0.25
_SPACING = 30  # pixels between arrows, about
_WHITE, _DARK = (255, 255, 255, 255), (25, 25, 25, 200)
_COVER = 0.6  # opacity of the fullest colour over a frame
_MARGIN = 6


def flow_to_image(flow: Tensor | np.ndarray, largest: float | None = None) -> Image.Image:
    """Colour wheel picture of a flow [H, W, 2]: hue is direction, strength is length, white is no motion.

    largest: the length, in tokens, that gets full colour; by default the longest in this flow.
    Right is red, down is yellow-green, left is cyan, up is violet. Raises ValueError for another shape or
    values that are not finite.
    """
    flow = _checked(flow, 3)
    strength = _strength(flow, largest)
    return _colours(flow, strength)


def flow_wheel(size: int = WHEEL_SIZE) -> Image.Image:
    """The legend of the colours, RGBA of size x size pixels: a disc whose rim has full colour."""
    finer = 4 * size
    axis = (np.arange(finer) + 0.5) / finer * 2 - 1
    directions = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    wheel = flow_to_image(directions, largest=0.9).convert("RGBA")
    mask = Image.new("L", wheel.size)
    ImageDraw.Draw(mask).ellipse([2, 2, finer - 3, finer - 3], fill=255)
    wheel.putalpha(mask)
    ImageDraw.Draw(wheel).ellipse([2, 2, finer - 3, finer - 3], outline=_DARK, width=6)
    return wheel.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")


def neighbour_flow(amf: Tensor | np.ndarray, sf: int = 4) -> np.ndarray:
    """The steps from each latent frame to the next: [P, H, W, 2] -> [F - 1, H, W, 2].

    amf: over the pairs i <= j < i + sf of F latent frames, as `reference_flow` gives it.
    Raises ValueError if P does not fit sf, or there is only one latent frame.
    """
    amf = _checked(amf, 4)
    return amf[_pairs_to_next(len(amf), sf)]


def full_length(flow: np.ndarray) -> float:
    """The length, in tokens, to show in full colour: of flow [..., 2], 99 of 100 are shorter."""
    return float(np.percentile(np.linalg.norm(flow, axis=-1), 99))


def draw_arrows(frame: Image.Image, flow: Tensor | np.ndarray) -> Image.Image:
    """The frame with arrows from where tokens are to where they go, at the frame's own size.

    flow: [H, W, 2] in tokens of the frame divided into H x W. Arrows stand at every token, or farther apart
    where those are small. Raises ValueError as `flow_to_image`.
    """
    return over(frame, _arrow_layer(_checked(flow, 3), frame.size))


def overlay_flow(frame: Image.Image, flow: Tensor | np.ndarray, largest: float | None = None) -> Image.Image:
    """The frame with the flow's colours over it, the stronger the longer; what rests is left as it is.

    flow, largest: as for `flow_to_image`. Raises ValueError as that does.
    """
    return over(frame, _colour_layer(_checked(flow, 3), largest, frame.size))


def flow_video(
    frames: VideoData | Sequence[Image.Image] | np.ndarray,
    flow: Tensor | np.ndarray,
    *,
    height: int | None = None,
    largest: float | None = None,
    frames_per_latent: int = FRAMES_PER_LATENT,
) -> Iterator[Image.Image]:
    """Each frame with the colours and arrows of its step of the flow [F - 1, H, W, 2], and the wheel.

    height: of the pictures, in pixels; that of the frames by default, small ones enlarged. largest: as for
    `flow_to_image`, for all frames. Raises ValueError as that does, at the call.
    """
    flow = _checked(flow, 4)
    return _flow_video(
        frames, flow, height, full_length(flow) if largest is None else largest, frames_per_latent
    )


def save_flow_video(
    amf: Tensor | np.ndarray,
    path: str | Path,
    *,
    sf: int = 4,
    frames: VideoData | Sequence[Image.Image] | np.ndarray | None = None,
    fps: float = 15,
) -> Path:
    """Write a video of an attention motion flow: what will be transferred.

    amf: [P, H, W, 2] over the pairs i <= j < i + sf of F latent frames, as `reference_flow` gives it.
    Shown are, beside the reference's frames with its colours and arrows, the colours alone; without frames
    the colours only, one picture a step. Returns the path.
    Raises ValueError if P does not fit sf, or there is only one latent frame.
    """
    flow = neighbour_flow(amf, sf)
    shown = colour_panels(flow) if frames is None else _beside(frames, flow)
    return save_video(shown, path, fps=fps, quality=8)


def colour_panels(
    flow: np.ndarray, size: tuple[int, int] | None = None, largest: float | None = None
) -> list[Image.Image]:
    """The colours of each step of a flow [F - 1, H, W, 2] with arrows on white, and the wheel.

    size: (width, height) in pixels. largest: as for `flow_to_image`, for all steps.
    """
    height, width = flow.shape[1:3]
    size = legible_size((width * PIXELS_PER_TOKEN, height * PIXELS_PER_TOKEN)) if size is None else size
    largest = full_length(flow) if largest is None else largest
    panels = []
    for step in flow:
        colours = flow_to_image(step, largest).resize(size, Image.Resampling.NEAREST)
        panels.append(_with_wheel(over(colours, _arrow_layer(step, size, _DARK, None))))
    return panels


def _flow_video(
    frames: VideoData | Sequence[Image.Image] | np.ndarray,
    flow: np.ndarray,
    height: int | None,
    largest: float,
    frames_per_latent: int,
) -> Iterator[Image.Image]:
    shown, layers = -1, ()
    for index, frame in enumerate(rgb_frames(frames)):
        size = legible_size(frame.size)
        if height is not None:
            size = (round(frame.width * height / frame.height), height)
        step = step_of_frame(index, len(flow), frames_per_latent)
        if step != shown:
            shown, layers = step, (_colour_layer(flow[step], largest, size), _arrow_layer(flow[step], size))
        yield _with_wheel(over(fit_frame(frame, size[1], size[0]), *layers))


def step_of_frame(index: int, num_steps: int, frames_per_latent: int = FRAMES_PER_LATENT) -> int:
    """Which step of the flow a frame shows: the first frame is a latent frame of its own, then
    frames_per_latent make one; there is none to come after the last.
    """
    return min(-(-index // frames_per_latent), num_steps - 1)


def _beside(
    frames: VideoData | Sequence[Image.Image] | np.ndarray, flow: np.ndarray
) -> Iterator[Image.Image]:
    panels: list[Image.Image] = []
    for index, left in enumerate(flow_video(frames, flow)):
        panels = panels or colour_panels(flow, left.size)
        both = Image.new("RGB", (2 * left.width, left.height))
        both.paste(left, (0, 0))
        both.paste(panels[step_of_frame(index, len(flow))], (left.width, 0))
        yield both


def _checked(flow: Tensor | np.ndarray, ndim: int) -> np.ndarray:
    array = (
        flow.detach().float().cpu().numpy()
        if isinstance(flow, torch.Tensor)
        else np.asarray(flow, np.float32)
    )
    if array.ndim != ndim or array.shape[-1] != 2 or 0 in array.shape:
        axes = {3: "[H, W, 2]", 4: "[P, H, W, 2]"}[ndim]
        raise ValueError(f"flow must be {axes}; got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("flow has values that are not finite")
    return array


def _pairs_to_next(num_pairs: int, sf: int) -> list[int]:
    """Places of the pairs (i, i + 1) among the pairs i <= j < i + sf, in order of i, then j."""
    places, place, num_frames = [], 0, 1
    while sum(min(sf, num_frames - i) for i in range(num_frames)) < num_pairs:
        num_frames += 1
    counts = [min(sf, num_frames - i) for i in range(num_frames)]
    if sum(counts) != num_pairs or num_frames < 2 or sf < 2:
        raise ValueError(f"{num_pairs} pairs do not make a flow of two or more latent frames with sf={sf}")
    for count in counts[:-1]:
        places.append(place + 1)
        place += count
    return places


def _strength(flow: np.ndarray, largest: float | None) -> np.ndarray:
    length = np.linalg.norm(flow, axis=-1)
    return np.clip(length / max(length.max() if largest is None else largest, 1e-6), 0, 1)


def _colours(flow: np.ndarray, saturation: np.ndarray) -> Image.Image:
    hue = np.arctan2(flow[..., 0], flow[..., 1]) / (2 * np.pi) % 1
    hsv = np.stack([hue * 255, saturation * 255, np.full_like(hue, 255)], axis=-1)
    return Image.fromarray(hsv.round().astype(np.uint8), mode="HSV").convert("RGB")


def _colour_layer(flow: np.ndarray, largest: float | None, size: tuple[int, int]) -> Image.Image:
    """Full colours whose opacity is the length of the flow, between tokens from one to the next."""
    sides = [Image.fromarray(np.ascontiguousarray(flow[..., axis])) for axis in (0, 1)]
    smooth = np.stack([np.asarray(side.resize(size, Image.Resampling.BILINEAR)) for side in sides], axis=-1)
    largest = float(np.linalg.norm(flow, axis=-1).max()) if largest is None else largest
    strength = _strength(smooth, largest)
    layer = _colours(smooth, np.ones_like(strength)).convert("RGBA")
    layer.putalpha(Image.fromarray((strength * _COVER * 255).round().astype(np.uint8)))
    return layer


def _arrow_layer(
    flow: np.ndarray,
    size: tuple[int, int],
    colour: tuple[int, ...] = _WHITE,
    rim: tuple[int, ...] | None = _DARK,
) -> Image.Image:
    """Arrows from the middles of tokens; a rim keeps them legible on any frame."""
    height, width = flow.shape[:2]
    token = (size[0] / width, size[1] / height)
    every = max(1, round(_SPACING / min(token)))
    thick = max(1.5, min(token) * every / 16)
    sketch = Sketch(size)
    arrows = []
    for row in range(every // 2, height, every):
        for col in range(every // 2, width, every):
            start = ((col + 0.5) * token[0], (row + 0.5) * token[1])
            drow, dcol = flow[row, col] * (np.hypot(*flow[row, col]) >= LEAST_ARROW)
            arrows.append((start, (start[0] + dcol * token[0], start[1] + drow * token[1])))
    for start, end in arrows:
        if rim is not None:
            draw_arrow(sketch, start, end, rim, thick + 2)
    for start, end in arrows:
        draw_arrow(sketch, start, end, colour, thick)
    return sketch.layer()


def _with_wheel(picture: Image.Image) -> Image.Image:
    """The legend in the lower right corner."""
    size = min(WHEEL_SIZE, min(picture.size) // 4)
    layer = Image.new("RGBA", picture.size)
    layer.paste(flow_wheel(size), (picture.width - size - _MARGIN, picture.height - size - _MARGIN))
    return over(picture, layer)
