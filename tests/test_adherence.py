"""Names of shapes and colours, read off clips whose names are known."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality.adherence import (
    Adherence,
    bilinear,
    check_prompt,
    colour_of,
    shape_of,
    shape_scores,
)
from benchmarks.synthetic.clips import COLOURS, HELD_OUT_SHAPES, PLAIN, SHAPES, make_clip
from benchmarks.synthetic.shapes import signed_distance
from diffsynth.evaluation.tracking import track_object

pytestmark = pytest.mark.slow

NUM_CLIPS = 102


def blurred(frames, sigma):
    offsets = np.arange(-3, 4)
    weights = np.exp(-((offsets / sigma) ** 2) / 2)
    weights /= weights.sum()
    height, width = frames.shape[1:3]
    padded = np.pad(frames.astype(float), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    rows = sum(w * padded[:, i : i + height] for i, w in enumerate(weights))
    return sum(w * rows[:, :, i : i + width] for i, w in enumerate(weights)).round().astype(np.uint8)


def own_prompt(clip):
    return clip.objects[0].shape, clip.objects[0].colour, clip.background[1]


@pytest.mark.parametrize(("sigma", "least"), [(0, 0.98), (0.7, 0.95)])
def test_true_clips_show_what_their_captions_say_sharp_or_soft(sigma, least):
    """Measured: all of them, sharp or soft."""
    right = []
    for i in range(NUM_CLIPS):
        clip = make_clip((20, i), num_frames=9, options=PLAIN, shape=SHAPES[i % len(SHAPES)])
        seen = check_prompt(blurred(clip.frames, sigma) if sigma else clip.frames, *own_prompt(clip))
        right.append((seen.shape_right, seen.colour_right, seen.background_right))
    assert (np.mean(right, axis=0) >= least).all()


@pytest.mark.parametrize("scene", [{"shaded": 1}, {"checkered": 1}, {"spin": 1, "growth": 1}])
def test_uneven_backgrounds_and_turned_shapes_are_named_too(scene):
    for i in range(12):
        clip = make_clip((21, i), num_frames=9, options=replace(PLAIN, **scene))
        seen = check_prompt(clip.frames, *own_prompt(clip))
        assert (seen.shape_seen, seen.colour_seen, seen.background_seen) == own_prompt(clip)


def test_another_prompt_is_wrong_part_by_part():
    clip = make_clip(22, options=PLAIN, shape="star", colour="red", background="white")
    seen = check_prompt(clip.frames, "ring", "red", "black")
    assert seen == Adherence(
        shape_right=False, colour_right=True, background_right=False,
        shape_seen="star", colour_seen="red", background_seen="white",
    )  # fmt: skip
    assert check_prompt(clip.frames, "star", "red", "white", track_object(clip.frames)).shape_right


def test_an_empty_video_has_the_right_background_alone():
    frames = np.full((3, 32, 32, 3), COLOURS["blue"], np.uint8)
    seen = check_prompt(frames, "star", "blue", "blue")
    assert (seen.shape_right, seen.colour_right, seen.background_right) == (False, False, True)
    assert seen.shape_seen is None


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_keeps_its_name_in_the_shade_and_a_little_off(name):
    rgb = np.array(COLOURS[name], float)
    rng = np.random.default_rng(0)
    assert {colour_of(rgb * shade) for shade in (0.72, 0.75, 0.86, 1)} == {name}
    assert {colour_of((rgb + rng.normal(0, 8, 3)).clip(0, 255)) for _ in range(20)} == {name}


def picture(shape, turn=0.0, radius=11.0, size=40):
    places = (np.stack(np.mgrid[0:size, 0:size], -1) + 0.5 - size / 2 - [1, -2]) / radius
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    return signed_distance(shape, places @ np.array([[cos, -sin], [sin, cos]])) < 0


@pytest.mark.parametrize("shape", [*SHAPES, *HELD_OUT_SHAPES])
def test_a_shape_is_most_like_itself_at_any_turn_size_and_place(shape):
    for turn in (0, 23, 45, 100, 211):
        masks = np.stack([picture(shape, turn), picture(shape, turn, radius=8)])
        scores = shape_scores(masks, (*SHAPES, *HELD_OUT_SHAPES))
        assert max(scores, key=scores.get) == shape
        assert 0.8 < scores[shape] <= 1


def test_masks_at_the_border_count_only_if_there_are_no_others():
    cut = np.zeros((40, 40), bool)
    cut[:12] = picture("square")[14:26]
    assert shape_scores(np.stack([picture("star"), cut, 0 * cut])) == shape_scores(picture("star")[None])
    assert shape_of(cut[None]) in SHAPES


def test_bilinear_looks_between_pixels_and_stops_at_the_border():
    values = np.arange(12.0).reshape(3, 4)
    assert bilinear(values, np.array([[0.5, 0.5], [2, 3], [-5, 1.25], [9, 9]])).tolist() == [
        2.5,
        11,
        1.25,
        11,
    ]
    assert bilinear(values[:1], np.array([[0.7, 2.5]])).tolist() == [2.5]


def test_names_outside_of_the_vocabulary_are_refused():
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape must be one of circle, .*; got 'blob'"):
        check_prompt(frames, "blob", "red", "blue")
    with pytest.raises(ValueError, match=r"background must be one of red, .*; got 'grass'"):
        check_prompt(frames, "star", "red", "grass")
    with pytest.raises(ValueError, match=r"candidates must be of circle, .*; got"):
        shape_of(np.ones((1, 8, 8), bool), ("blob",))
    with pytest.raises(ValueError, match="masks are all empty"):
        shape_of(np.zeros((2, 8, 8), bool))
