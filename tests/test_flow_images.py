import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData
from diffsynth.evaluation import flow_to_image, save_flow_video


def colour(drow, dcol, largest=2.0):
    return flow_to_image(np.full((1, 1, 2), (drow, dcol), dtype=np.float32), largest).getpixel((0, 0))


def test_direction_is_hue_and_length_is_strength():
    assert colour(0, 0) == (255, 255, 255)
    assert colour(0, 2) == (255, 0, 0)
    red, green, blue = colour(0, -2)
    assert red < 5
    assert green > 250
    assert blue > 250
    assert colour(2, 0)[1] == 255
    assert colour(-2, 0)[2] == 255
    half = colour(0, 1)
    assert half[0] == 255
    assert 120 < half[1] < 136


def test_a_flow_video_shows_the_pairs_of_neighbours(tmp_path):
    """Only pairs (i, i + 1) move in this flow: to the right, then down."""
    amf = torch.zeros(6, 4, 6, 2)  # F = 3, sf = 3: 00 01 02 11 12 22
    amf[1, ..., 1] = 2
    amf[4, ..., 0] = 2
    path = save_flow_video(amf, tmp_path / "flow.mp4", sf=3)
    video = VideoData(path)
    assert (len(video), video.shape()) == (2, (256, 384))
    corner = [video[i].getpixel((1, 1)) for i in range(2)]
    assert corner[0][0] > 230
    assert max(corner[0][1:]) < 40
    assert corner[1][1] > 230
    assert corner[1][2] < 60


def test_the_reference_stands_beside_its_flow(tmp_path):
    amf = torch.zeros(6, 4, 6, 2)
    frames = [Image.new("RGB", (120, 80), (0, 0, 200)) for _ in range(9)]
    video = VideoData(save_flow_video(amf, tmp_path / "flow.mp4", sf=3, frames=frames, fps=8))
    assert (len(video), video.shape(), video.fps) == (9, (320, 960), 8)
    assert video[4].getpixel((2, 2))[2] > 150
    assert min(video[4].getpixel((957, 2))) > 240


def test_flows_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"flow must be \[H, W, 2\]; got \[3, 4\]"):
        flow_to_image(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        flow_to_image(torch.full((2, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"5 pairs do not make a flow .* with sf=3"):
        save_flow_video(torch.zeros(5, 4, 6, 2), tmp_path / "flow.mp4", sf=3)
    with pytest.raises(ValueError, match="1 pairs do not make"):
        save_flow_video(torch.zeros(1, 4, 6, 2), tmp_path / "flow.mp4")
