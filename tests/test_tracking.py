"""The tracker against the known paths of synthetic clips."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.synthetic.clips import (
    COLOURS,
    HELD_OUT_SHAPES,
    HELD_OUT_TRAJECTORIES,
    PLAIN,
    TRAJECTORIES,
    make_clip,
)
from benchmarks.synthetic.shapes import KNOWN_SHAPES
from diffsynth.evaluation.tracking import LEAST_AREA, track_object, video_array
from diffsynth.planning.objects import largest_patches

HELD_OUT = {"shapes": HELD_OUT_SHAPES, "trajectories": HELD_OUT_TRAJECTORIES}


def mean_error(clip, frames=None):
    track = track_object(clip.frames if frames is None else frames)
    assert track.found.all()
    return float(np.linalg.norm(track.centroids - clip.centroids[-1], axis=-1).mean())


@pytest.mark.parametrize("shape", KNOWN_SHAPES)
def test_every_shape_is_followed_on_every_path_to_a_third_of_a_pixel(shape):
    paths = (*TRAJECTORIES, *HELD_OUT_TRAJECTORIES)
    clips = [make_clip((5, i), options=PLAIN, shape=shape, trajectory=path) for i, path in enumerate(paths)]
    errors = [mean_error(clip) for clip in clips]
    assert np.mean(errors) < 0.2
    assert max(errors) < 0.35


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_followed_as_object_and_as_background(colour):
    assert mean_error(make_clip(6, options=PLAIN, colour=colour)) < 0.35
    assert mean_error(make_clip(7, options=PLAIN, background=colour)) < 0.35


@pytest.mark.parametrize(
    "scene", [{"shaded": 1}, {"checkered": 1}, {"spin": 1, "growth": 1}, {"still": 1}, HELD_OUT]
)
def test_lit_and_checkered_backgrounds_turning_and_resting_objects_are_followed(scene):
    errors = [mean_error(make_clip((8, i), options=replace(PLAIN, **scene))) for i in range(10)]
    assert np.mean(errors) < 0.2
    assert max(errors) < 0.35


def test_noise_of_twelve_levels_does_not_move_the_track():
    for i in range(5):
        clip = make_clip((9, i), options=replace(PLAIN, shaded=0.5, checkered=0.5))
        noise = np.random.default_rng(i).normal(0, 12, clip.frames.shape)
        assert mean_error(clip, (clip.frames + noise).clip(0, 255).astype(np.uint8)) < 0.35


def test_masks_and_colours_are_those_of_the_clip():
    clip = make_clip(10, options=PLAIN)
    track = track_object(clip.frames)
    assert (track.masks & clip.masks[0]).sum() > 0.95 * (track.masks | clip.masks[0]).sum()
    assert np.allclose(track.colour, COLOURS[clip.objects[0].colour])
    assert np.allclose(track.background, COLOURS[clip.background[1]])


def test_images_and_arrays_give_the_same_track():
    clip = make_clip(11, options=PLAIN)
    images = [Image.fromarray(frame) for frame in clip.frames]
    assert np.array_equal(video_array(images), clip.frames)
    assert np.array_equal(track_object(images).centroids, track_object(clip.frames).centroids)


def test_frames_without_the_object_are_filled_in_between_their_neighbours():
    clip = make_clip(12, options=PLAIN, trajectory="line")
    frames = clip.frames.copy()
    frames[[0, 7, 8, 16]] = COLOURS[clip.background[1]]
    track = track_object(frames)
    assert np.flatnonzero(~track.found).tolist() == [0, 7, 8, 16]
    assert not track.masks[~track.found].any()
    whole = track_object(clip.frames).centroids
    assert np.allclose(track.centroids[7:9], whole[7:9], atol=0.35)
    assert np.array_equal(track.centroids[0], track.centroids[1])
    assert np.array_equal(track.centroids[16], track.centroids[15])


def test_an_empty_video_has_no_object_and_its_track_rests_in_the_middle():
    noise = np.random.default_rng(0).normal(0, 6, (4, 32, 48, 3))
    track = track_object((np.array([120, 40, 60]) + noise).clip(0, 255).astype(np.uint8))
    assert not track.found.any()
    assert not track.masks.any()
    assert np.array_equal(track.centroids, np.tile([16, 24], (4, 1)))
    assert np.array_equal(track.colour, track.background)
    assert np.allclose(track.background, [120, 40, 60], atol=1)


def test_specks_are_no_object():
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    side = int((64 * 64 * LEAST_AREA) ** 0.5)
    frames[0, 10 : 10 + side, 10 : 10 + side] = 255
    frames[1, 10 : 11 + side, 10 : 11 + side] = 255
    assert track_object(frames).found.tolist() == [False, True]


def test_the_largest_patch_is_found_among_spirals_and_corners():
    spiral = np.zeros((9, 9), bool)
    spiral[0], spiral[:, 8], spiral[8], spiral[2:, 0], spiral[2, :7] = True, True, True, True, True
    spiral[2:7, 6], spiral[6, 2:7] = True, True
    dots = np.eye(9, dtype=bool)
    dots[0, 5:8] = True
    apart = spiral.copy()
    apart[4, 3:5] = True
    found = largest_patches(np.stack([spiral, dots, apart, np.zeros((9, 9), bool)]))
    assert np.array_equal(found[0], spiral)
    assert np.array_equal(found[1], np.eye(9, dtype=bool))
    assert np.array_equal(found[2], spiral)
    assert not found[3].any()


def test_what_is_no_video_is_named():
    with pytest.raises(TypeError, match="frames must be an iterable of images or arrays, got str"):
        track_object("clip.mp4")
    with pytest.raises(ValueError, match="frames is empty"):
        track_object([])
