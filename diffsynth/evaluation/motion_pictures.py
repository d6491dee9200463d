"""Motion drawn over frames: the ways of objects, and flows of videos beside each other."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth.data import fit_frame
from diffsynth.data.frames import rgb_frames
from diffsynth.evaluation.compare import video_grid
from diffsynth.evaluation.drawing import INK, PAPER, Sketch, legible_size, over, text_font
from diffsynth.evaluation.flow_images import colour_panels, flow_video, full_length, neighbour_flow
from diffsynth.evaluation.tracking import Frames, video_array

PATH_COLOURS = ((230, 60, 50), (50, 110, 220), (40, 160, 80), (200, 140, 20))
_SHEET_CELL, _SHEET_GAP, _LABEL = 160, 6, 22  # pixels


def draw_trajectories(
    frames: Frames, paths: Mapping[str, np.ndarray] | Sequence[np.ndarray]
) -> list[Image.Image]:
    """Each frame with the ways so far of objects, and a dot where each is now; small frames are enlarged.

    paths: each float [T, 2], (row, column) in pixels of the frames, as `track_object(...).centroids`; with
    names, these are written beside the dots. Raises ValueError for a path that is not [T, 2] or not finite.
    """
    video = video_array(frames)
    named = dict(paths) if isinstance(paths, Mapping) else {str(i): path for i, path in enumerate(paths)}
    for name, path in named.items():
        if np.shape(path) != (len(video), 2) or not np.isfinite(path).all():
            raise ValueError(f"path {name!r} must be [{len(video)}, 2], finite; got {list(np.shape(path))}")
    height, width = video.shape[1:3]
    size = legible_size((width, height))
    factor = size[0] / width
    drawn = []
    for t, frame in enumerate(rgb_frames(video)):
        sketch = Sketch(size)
        dots = []
        for index, path in enumerate(named.values()):
            colour = (*PATH_COLOURS[index % len(PATH_COLOURS)], 255)
            places = [(col * factor, row * factor) for row, col in path[: t + 1]]
            for start, end in pairwise(places):
                sketch.line(start, end, (255, 255, 255, 200), 5)
                sketch.line(start, end, colour, 2.5)
            sketch.dot(places[-1], 6, (255, 255, 255, 255))
            sketch.dot(places[-1], 4.5, colour)
            dots.append(places[-1])
        picture = over(fit_frame(frame, size[1], size[0]), sketch.layer())
        if isinstance(paths, Mapping):
            draw = ImageDraw.Draw(picture)
            for name, (x, y) in zip(named, dots, strict=True):
                draw.text(
                    (x + 9, y), name, INK, font=text_font(), anchor="lm", stroke_width=2, stroke_fill=PAPER
                )
        drawn.append(picture)
    return drawn


def compare_motion(
    videos: Mapping[str, Frames], flows: Mapping[str, Tensor | np.ndarray], *, sf: int = 4, height: int = 256
) -> list[Image.Image]:
    """Videos beside each other, each with the arrows and colours of its own flow, all at one scale.

    flows: for each video's name its [P, H, W, 2] as `reference_flow` gives it. Raises ValueError if the names
    differ, and as `neighbour_flow`.
    """
    if videos.keys() != flows.keys() or not videos:
        raise ValueError(f"videos and flows must have the same names; got {list(videos)} and {list(flows)}")
    steps = {name: neighbour_flow(flow, sf) for name, flow in flows.items()}
    largest = max(full_length(flow) for flow in steps.values())
    drawn = {name: list(flow_video(videos[name], flow, largest=largest)) for name, flow in steps.items()}
    return video_grid(drawn, columns=len(drawn), height=height)


def flow_sheet(frames: Frames, flow: Tensor | np.ndarray, *, sf: int = 4) -> Image.Image:
    """One picture: above, the frame at which each latent frame ends; below, the flow from it to the next.

    flow: [P, H, W, 2] as `reference_flow` gives it. Raises ValueError as `neighbour_flow`.
    """
    steps = neighbour_flow(flow, sf)
    video = list(rgb_frames(frames))
    shown = [video[min(4 * step, len(video) - 1)] for step in range(len(steps))]
    width = round(shown[0].width * _SHEET_CELL / shown[0].height)
    panels = [panel.resize((width, _SHEET_CELL)) for panel in colour_panels(steps)]
    cell = (width + _SHEET_GAP, _SHEET_CELL + _SHEET_GAP)
    sheet = Image.new("RGB", (len(shown) * cell[0], _LABEL + 2 * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for step, (frame, panel) in enumerate(zip(shown, panels, strict=True)):
        left = step * cell[0]
        draw.text(
            (left + 4, _LABEL / 2),
            f"frame {4 * step + 1} to {4 * step + 5}",
            INK,
            font=text_font(),
            anchor="lm",
        )
        sheet.paste(fit_frame(frame, _SHEET_CELL, width), (left, _LABEL))
        sheet.paste(panel, (left, _LABEL + cell[1]))
    return sheet
