"""Generated clips: the ground truth is the truth, and captions say what is seen."""

import numpy as np
import pytest

from benchmarks.synthetic.clips import (
    COLOURS,
    HELD_OUT_SHAPES,
    HELD_OUT_TRAJECTORIES,
    PLAIN,
    SHAPES,
    TRAJECTORIES,
    SceneOptions,
    make_clip,
)
from benchmarks.synthetic.shapes import KNOWN_SHAPES, outline, signed_distance
from benchmarks.synthetic.trajectories import PATHS, place_path

CAMERA = SceneOptions(camera=1, second_object=1, spin=1, growth=1, checkered=1, shaded=0, still=0)


def mask_centroid(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0) + 0.5


def touches_the_border(mask: np.ndarray) -> bool:
    inner = mask.copy()
    inner[1:-1, 1:-1] = False
    return bool(inner.any())


@pytest.mark.parametrize("shape", KNOWN_SHAPES)
def test_the_centroid_is_that_of_the_pixels(shape):
    clip = make_clip(7, options=PLAIN, shape=shape, height=256, width=256)
    whole = [t for t in range(17) if not touches_the_border(clip.masks[0, t])]
    assert len(whole) > 5
    for t in whole:
        assert np.abs(mask_centroid(clip.masks[0, t]) - clip.centroids[0, t]).max() < 0.7


@pytest.mark.parametrize("seed", range(4))
def test_displacement_carries_colours_to_where_they_are(seed):
    # A checkered ground, a moving camera, two turning and growing objects: where a pixel of frame 0 went,
    # frame 9 has the same colour, wherever neither is near an edge or hidden.
    clip = make_clip((5, seed), height=192, width=192, options=CAMERA)
    seen = [np.where(masks[1], 2, masks[0]) for masks in (clip.masks[:, 0], clip.masks[:, 9])]
    moved = clip.displacement(0, 9) + np.stack(np.mgrid[0:192, 0:192], -1)
    target = moved.round().astype(int).clip(0, 191)
    followed = (seen[0] == seen[1][tuple(target.T)].T) & (np.abs(target - moved).max(-1) < 0.6)
    there = clip.frames[9][tuple(target.T)].transpose(1, 0, 2).astype(int)
    same = np.abs(there - clip.frames[0]).max(-1) < 30
    assert followed.mean() > 0.5
    assert np.abs(clip.displacement(0, 9)[followed]).max() > 20
    assert same[followed].mean() > 0.95
    unmoved = np.abs(clip.frames[9].astype(int) - clip.frames[0]).max(-1) < 30
    assert unmoved[followed].mean() < 0.8


def test_displacement_of_an_object_is_that_of_its_centroid():
    clip = make_clip(11, options=PLAIN)
    flow = clip.displacement(2, 7)
    assert np.allclose(flow[clip.masks[0, 2]], clip.centroids[0, 7] - clip.centroids[0, 2], atol=1e-4)
    assert (flow[~clip.masks[0, 2]] == 0).all()
    assert np.allclose(clip.displacement(4, 4), 0, atol=1e-5)


def test_a_seed_gives_the_same_scene_at_any_size():
    small, large = make_clip(3), make_clip(3, height=128, width=128)
    assert small.caption == large.caption
    assert np.allclose(2 * small.centroids, large.centroids, atol=1e-3)
    again = make_clip(3)
    assert (small.frames == again.frames).all()
    assert (make_clip(4).frames != small.frames).any()
    assert make_clip(3, height=96, width=160, num_frames=5).frames.shape == (5, 96, 160, 3)


def test_captions_name_what_is_seen_and_never_how_it_moves():
    captions = {make_clip(seed, options=CAMERA, num_frames=1).caption for seed in range(200)}
    words = {word for caption in captions for word in caption.split()}
    assert words.isdisjoint(PATHS.keys() - set(SHAPES))
    assert set(COLOURS) <= words
    assert set(SHAPES) <= words
    clip = make_clip(1, options=PLAIN, shape="star", colour="orange", background="blue", trajectory="line")
    assert clip.caption == "an orange star on a blue background"
    assert clip.frames[3, 0, 0].tolist() == list(COLOURS["blue"])
    row, col = clip.centroids[0, 3].astype(int)
    assert clip.frames[3, row, col].tolist() == list(COLOURS["orange"])


def test_front_objects_hide_those_behind():
    for seed in range(40):
        clip = make_clip((9, seed), options=SceneOptions(second_object=1, textured=0, camera=0))
        assert not (clip.masks[0] & clip.masks[1]).any()
        assert len({item.colour for item in clip.objects} | {clip.background[1]}) == 3


def test_held_out_names_are_not_trained_on():
    assert set(HELD_OUT_SHAPES).isdisjoint(SHAPES)
    assert set(HELD_OUT_TRAJECTORIES).isdisjoint(TRAJECTORIES)
    assert {*SHAPES, *HELD_OUT_SHAPES} == set(KNOWN_SHAPES)


@pytest.mark.parametrize("shape", KNOWN_SHAPES)
def test_shapes_are_centred_and_of_radius_one(shape):
    side = np.linspace(-1.2, 1.2, 241)
    points = np.stack(np.meshgrid(side, side, indexing="ij"), -1)
    inside = signed_distance(shape, points) < 0
    reach = np.linalg.norm(points[inside], axis=-1).max()
    assert 0.95 < reach <= 1.01
    assert np.abs(points[inside].mean(0)).max() < 0.01


def test_the_distance_to_a_square_is_known():
    half = np.abs(outline("square")).max()
    points = np.array([[0.0, 0.0], [0.0, 1.0], [half + 0.3, half + 0.4]])
    assert np.allclose(signed_distance("square", points), [-half, 1 - half, 0.5])


@pytest.mark.parametrize("name", PATHS)
def test_paths_stay_where_there_is_room(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        low, high = np.array([0.2, 0.2]), np.array([0.8, 1.4])
        path = place_path(name, np.linspace(0, 1, 17), 2.0, low, high, rng)
        assert (path >= low - 1e-9).all()
        assert (path <= high + 1e-9).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "cube"}, "shape must be of .*circle.*got \\('cube',\\)"),
        ({"colour": "beige"}, "colour must be of .*red"),
        ({"trajectory": "fall"}, "trajectory must be of .*line"),
        ({"height": 8}, "height must be at least 16; got 8"),
        ({"num_frames": 0}, "num_frames must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_clip(0, **arguments)
    with pytest.raises(ValueError, match="camera must be a probability"):
        SceneOptions(camera=1.5)
    with pytest.raises(ValueError, match="shapes must be of"):
        SceneOptions(shapes=("cube",))
