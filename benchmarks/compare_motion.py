"""Videos beside each other with the flow of each."""

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from diffsynth.data.tensors import Video
from diffsynth.evaluation import flow_video, video_grid
from diffsynth.evaluation.flow_images import full_length, neighbour_flow


def compare_motion(
    videos: Mapping[str, Video], flows: Mapping[str, Tensor | np.ndarray], *, sf: int = 4, height: int = 256
) -> list[Image.Image]:
    """Show videos beside each other, each with the arrows and colours of its own flow, all at one scale.

    Args:
        videos: the videos by name.
        flows: for each name [P, H, W, 2], as `reference_flow` returns it.
        sf: the span of the pairs.
        height: of each video, in pixels.

    Raises:
        ValueError: the names differ, or as `neighbour_flow`.
    """
    if videos.keys() != flows.keys() or not videos:
        raise ValueError(f"videos and flows must have the same names; got {list(videos)} and {list(flows)}")
    steps = {name: neighbour_flow(flow, sf) for name, flow in flows.items()}
    largest = max(full_length(flow) for flow in steps.values())
    drawn = {name: list(flow_video(videos[name], flow, largest=largest)) for name, flow in steps.items()}
    return video_grid(drawn, columns=len(drawn), height=height)
