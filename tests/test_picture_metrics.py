"""The bench of picture and motion: its numbers on known videos, and references unlike the training's."""

import numpy as np
import pytest

from benchmarks.quality.picture_metrics import (
    background_right,
    centres,
    moved,
    nearest_sprite,
    path_length,
    psnr_along,
    variety,
)
from benchmarks.quality.picture_motion import make_pair, measured, summary
from benchmarks.quality.unlike import KINDS, make_unlike_frames
from benchmarks.synthetic.clips import PLAIN, make_clip

NAMES = ("fox", "cat", "bus", "gem", "banana")


@pytest.fixture(scope="module")
def pair():
    return make_pair(3, NAMES, False)


def with_patch(truth):
    """The truth with a grey disc in place of its sprite."""
    out = np.empty_like(truth)
    out[:] = np.median(truth.reshape(-1, 3), axis=0)
    rows, columns = np.indices(truth.shape[1:3]) + 0.5
    for frame, (row, column) in zip(out, centres(truth), strict=True):
        frame[(rows - row) ** 2 + (columns - column) ** 2 < 81] = (128, 128, 128)
    return out


def test_a_perfect_video_has_every_number_right(pair):
    found = measured(pair.truth.frames, pair)
    assert found["error"] == 0
    assert found["length"] == found["right"] == found["background"] == 1
    assert min(found["along"], found["first_frame"], found["psnr"]) > 60


def test_a_grey_patch_on_the_right_path_is_not_the_sprite(pair):
    found = measured(with_patch(pair.truth.frames), pair)
    assert found["error"] < 0.5
    assert found["length"] == pytest.approx(1, abs=0.1)
    assert found["right"] == 0
    assert found["along"] < 25
    assert found["background"] > 0.99


def test_the_sprite_elsewhere_is_still_itself(pair):
    truth = pair.truth.frames
    offsets = np.linspace((0, 0), (-9, 7.5), len(truth))
    video = moved(truth, offsets)
    np.testing.assert_allclose(centres(video) - centres(truth), offsets, atol=0.3)
    found = measured(video, pair)
    assert found["error"] > 4
    assert found["right"] == 1
    assert found["along"] > found["psnr"] + 10
    assert psnr_along(with_patch(video), truth) < found["along"] - 5


def test_the_background_is_judged_away_from_the_object(pair):
    truth = pair.truth.frames
    half = truth.copy()
    half[:, : truth.shape[1] // 2] = 255 - half[:, : truth.shape[1] // 2]
    assert background_right(truth, truth) == 1
    assert background_right(half, truth) < 0.7
    assert background_right(255 - truth, truth) < 0.05


def test_every_sprite_is_nearest_to_itself_and_nothing_to_none():
    for index in range(5):
        own = make_pair(20 + index, NAMES, False)
        frame, layer = own.truth.frames[-1], own.truth.motion.layers[-1, -1]
        assert nearest_sprite(frame, layer) == own.name
        assert nearest_sprite(np.full_like(frame, 90), layer) is None


def test_length_is_that_of_the_way_and_not_of_jitter():
    path = np.stack([np.linspace(10, 42, 17), np.full(17, 30.0)], axis=1)
    jitter = np.random.default_rng(0).normal(0, 0.5, path.shape)
    assert path_length(path) == pytest.approx(32)
    assert path_length(path + jitter) == pytest.approx(32, abs=2)
    assert path_length(np.full((17, 2), 5.0)) == 0


def test_variety_is_of_the_objects_and_not_of_their_places(pair):
    truth = pair.truth.frames
    elsewhere = moved(truth, np.full((len(truth), 2), 3.0))
    assert variety([truth, truth]) == 0
    assert variety([truth, elsewhere]) < variety([truth, with_patch(truth)]) / 3
    rows = [{"error": 1.0, "variety": 0.25}, {"error": 2.0}, {"error": 6.0}]
    assert summary(rows) == {"error": 3.0, "median": 2.0, "variety": 0.25}


def test_references_unlike_the_trainings_move_as_known():
    kinds = [make_pair(index, NAMES, False, "half").kind for index in range(6)]
    assert kinds == ["ordinary", KINDS[0], "ordinary", KINDS[1], "ordinary", KINDS[2]]
    assert [make_pair(index, NAMES, False, "unlike").kind for index in range(3)] == list(KINDS)
    motion = make_clip(5, options=PLAIN)
    for kind in KINDS:
        frames = make_unlike_frames((5,), kind, motion)
        assert frames.shape == motion.frames.shape
        ground = np.median(frames, axis=0)
        away = np.abs(frames - ground).max(-1)[0] > 12
        assert np.abs(np.argwhere(away).mean(0) + 0.5 - motion.centroids[0, 0]).max() < 6
        assert frames[0].reshape(-1, 3).std(0).max() > 20
        assert (frames == make_unlike_frames((5,), kind, motion)).all()
    with pytest.raises(ValueError, match="kind must be one of sprite before texture"):
        make_unlike_frames((5,), "photograph", motion)
