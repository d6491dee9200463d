"""Pictures show what they say: paths where objects are, arrows where things go, curves as losses fall."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.compare_motion import compare_motion
from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth.cli.main import main
from diffsynth.data import VideoData, save_video
from diffsynth.evaluation import (
    draw_trajectories,
    flow_sheet,
    flow_video,
    loss_curves,
    track_object,
    video_grid,
)
from diffsynth.evaluation.flow_images import SHEET_HEIGHT, flow_wheel
from diffsynth.evaluation.grid import GAP, LABEL_HEIGHT, picture_grid


def grey(count=1, size=(40, 30), value=120):
    return [Image.new("RGB", size, (value,) * 3) for _ in range(count)]


def textured(count=1, size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 1), np.uint8).repeat(3, -1)
    return [Image.fromarray(pixels) for _ in range(count)]


def moving(rows, cols, count=6):
    """Flow over the pairs of F = 3, sf = 3 (00 01 02 11 12 22) by so many tokens a step."""
    flow = torch.zeros(count, 4, 6, 2)
    flow[[1, 4]] = torch.tensor([float(rows), float(cols)])
    return flow


def striped(side):
    """A frame in which each token has something to follow."""
    lines = np.where(np.arange(side) // (side // 20) % 2, 90, 150).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(lines[None, :, None], (side, side, 3)).copy())


def changed(before, after):
    return np.abs(np.asarray(before, int) - np.asarray(after, int)).sum(-1) > 30


def test_arrows_point_where_things_go():
    frame = striped(320)
    flow = np.zeros((1, 5, 5, 2), np.float32)
    flow[0, 2, 2, 1] = 2  # two tokens to the right of the middle
    mark = changed(frame, next(flow_video([frame], flow, height=320, largest=1e6)))
    assert mark[155:165, 170:285].any(axis=0).all()
    assert not mark[100:140, 200:250].any()


def test_what_rests_keeps_its_colours():
    frame = striped(60)
    flow = np.zeros((1, 3, 3, 2), np.float32)

    def drawn():
        return next(flow_video([frame], flow, height=60, largest=1.0))

    corners = [(0, 0), (0, 59), (59, 0), (59, 59)]  # away from the dots of arrows of no length
    assert [drawn().getpixel(corner) for corner in corners] == [frame.getpixel(corner) for corner in corners]
    flow[..., 1] = 1.0
    red = np.asarray(drawn(), int).mean((0, 1))
    assert red[0] > red[1] + 50


def test_the_wheel_is_the_legend_of_the_colours():
    wheel = flow_wheel(100)
    right, middle, corner = wheel.getpixel((95, 50)), wheel.getpixel((50, 50)), wheel.getpixel((1, 1))
    assert right[0] > 180 > right[2]
    assert min(middle[:3]) > 230
    assert corner[3] == 0


def test_a_flow_video_has_a_picture_for_each_frame():
    steps = np.zeros((2, 4, 6, 2), np.float32)
    frames = list(flow_video(grey(9), steps, height=64))
    assert [len(frames), frames[0].size] == [9, (85, 64)]


def test_a_grid_has_rows_and_columns_and_goes_on_to_the_longest():
    videos = {
        name: grey(count, value=value) for name, count, value in (("a", 2, 10), ("b", 5, 90), ("c", 3, 200))
    }
    frames = video_grid(videos, columns=2, height=30, until="longest")
    assert len(frames) == 5
    assert frames[0].size == (2 * 40 + GAP, 2 * (LABEL_HEIGHT + 30 + GAP) - GAP)
    assert frames[4].getpixel((20, LABEL_HEIGHT + 15)) == (10, 10, 10)
    assert frames[4].getpixel((20, 2 * LABEL_HEIGHT + GAP + 45)) == (200, 200, 200)
    assert len(video_grid(videos)) == 2


def test_videos_of_different_speeds_play_at_theirs(tmp_path):
    slow = VideoData(
        save_video([np.full((32, 32, 3), 60 * t, np.uint8) for t in range(4)], tmp_path / "a.mp4", fps=5)
    )
    fast = VideoData(
        save_video([np.full((32, 32, 3), 25 * t, np.uint8) for t in range(8)], tmp_path / "b.mp4", fps=10)
    )
    frames = video_grid({"a": slow, "b": fast}, height=32, fps=10)
    assert len(frames) == 8
    levels = [frame.getpixel((16, LABEL_HEIGHT + 16))[0] for frame in frames]
    assert levels == pytest.approx([0, 0, 60, 60, 120, 120, 180, 180], abs=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "end"}, "until must be one of shortest, longest; got 'end'"),
        ({"fps": 0}, "fps must be a number above 0; got 0"),
        ({"columns": 0}, "columns must be"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        video_grid({"a": grey()}, **options)


def test_the_path_of_an_object_is_drawn_where_it_was():
    clip = make_clip(3, options=PLAIN, trajectory="line", num_frames=9, height=64, width=64)
    track = track_object(clip.frames)
    drawn = draw_trajectories(clip.frames, {"star": track.centroids})
    factor = drawn[0].width / 64
    large = [np.asarray(Image.fromarray(clip.frames[8]).resize(drawn[8].size, Image.Resampling.BICUBIC))]
    mark = changed(large[0], drawn[8])
    for row, col in track.centroids:
        y, x = int(row * factor), int(col * factor)
        assert mark[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8].any()
    with pytest.raises(ValueError, match=r"path '0' must be \[9, 2\], finite; got \[4, 2\]"):
        draw_trajectories(clip.frames, [np.zeros((4, 2))])


def test_flows_of_two_videos_share_a_scale():
    """The slower one's colours are the paler ones."""
    videos = {"slow": textured(9, (60, 40)), "fast": textured(9, (60, 40))}
    frames = compare_motion(videos, {"slow": moving(0, 0.6), "fast": moving(0, 3)}, sf=3, height=160)
    assert len(frames) == 9
    picture = np.asarray(frames[0], int)[LABEL_HEIGHT + 5 : LABEL_HEIGHT + 60]
    half = picture.shape[1] // 2
    redness = [part[..., 0].mean() - part[..., 2].mean() for part in (picture[:, :half], picture[:, half:])]
    assert redness[1] > 2 * redness[0] > 0
    with pytest.raises(ValueError, match="same names"):
        compare_motion(videos, {"slow": moving(0, 1)}, sf=3)


def test_a_sheet_has_each_step_with_its_flow():
    sheet = flow_sheet(textured(9, (60, 40)), moving(0, 2), sf=3)
    assert sheet.size == (2 * 240 + GAP, LABEL_HEIGHT + 2 * SHEET_HEIGHT + GAP)
    place = (LABEL_HEIGHT + SHEET_HEIGHT + GAP + 10, 20)
    below = np.asarray(sheet)[place]
    assert below[0] > 200 > below[2]
    # Where there is no texture to follow, no flow is shown.
    assert tuple(np.asarray(flow_sheet(grey(9, (60, 40)), moving(0, 2), sf=3))[place]) == (255, 255, 255)


def test_a_grid_of_pictures_has_captions_above_rows_and_labels_above_columns():
    small, large = (grey(1, size, 0)[0] for size in ((20, 10), (41, 31)))
    sheet = np.asarray(picture_grid([[large, small], [small]], [["one", "two"]], ["first", "second"]))
    assert sheet.shape == (3 * LABEL_HEIGHT + 31 + GAP + 10 + 1, 41 + GAP + 20 + 1, 3), "even sides"
    black = (sheet == 0).all(-1)
    first, second = 2 * LABEL_HEIGHT, 3 * LABEL_HEIGHT + 31 + GAP
    assert black[first : first + 31, :41].all()
    assert black[first : first + 10, 41 + GAP :].sum() == 200
    assert black[second : second + 10, 10:30].all(), "in the middle of its column"
    assert not black[second:, :10].any()


def test_a_label_that_is_too_long_is_cut():
    sheet = np.asarray(picture_grid([[grey(1, (60, 20))[0]] * 2], [["a very long name of a video", ""]]))
    assert (sheet[:LABEL_HEIGHT, 62:] == 255).all()
    assert (sheet[:LABEL_HEIGHT, :60] < 100).any()


def test_losses_are_curves_and_none_are_refused():
    pytest.importorskip("matplotlib")
    losses = [[100.0, 50.0], [80.0, 0.0, 20.0]]
    (axes,) = loss_curves(losses).axes
    first, second = axes.lines
    # Each step's losses as ratios to its first one.
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 1.5], [1, 0.5])
    assert (second.get_xdata()[0], list(second.get_ydata())) == (2, [1, 0, 0.25])
    assert first.get_color() == second.get_color()
    assert axes.get_ylim() == (0, 1.3)  # the first point of a step is not on the border
    for nothing in ([], [[0.0]]):
        with pytest.raises(ValueError, match="losses must hold numbers above 0"):
            loss_curves(nothing)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'fastvmt\[eval\]'"):
        loss_curves([[1.0]])


def test_the_command_draws_paths_in_a_grid(tmp_path):
    for index, path in enumerate("abcd"):
        save_video(
            make_clip(index, options=PLAIN, num_frames=5, height=32, width=32).frames,
            tmp_path / f"{path}.mp4",
        )
    names = [tmp_path / f"{path}.mp4" for path in "abcd"]
    assert (
        main(["compare", *names, "--paths", "--columns", "2", "--height", "64", "-o", tmp_path / "out.mp4"])
        == 0
    )
    with VideoData(tmp_path / "out.mp4") as video:
        assert (len(video), video.shape()) == (5, (2 * (LABEL_HEIGHT + 64 + GAP) - GAP, 2 * 64 + GAP))
