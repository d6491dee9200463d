"""Metrics of motion against paths that are known, and bootstrap intervals against cases that are."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality.metrics import (
    displacement_error,
    flow_error,
    relative_trajectory_error,
    temporal_consistency,
    trajectory_error,
    velocity_cosine,
)
from benchmarks.quality.statistics import mean_interval, ratio_interval
from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth.evaluation.tracking import Track, track_object

PATH = np.stack([np.arange(9.0) * 3, np.full(9, 10.0)], axis=-1)


def track_of(path):
    count = len(path)
    return Track(
        centroids=np.asarray(path, np.float32), found=np.ones(count, bool), 
        masks=np.ones((count, 8, 8), bool), colour=np.zeros(3, np.float32), background=np.ones(3, np.float32),
    )  # fmt: skip


def test_a_shifted_path_is_off_by_its_shift_and_has_the_same_form():
    track = track_of(PATH + np.array([3, 4]))
    assert trajectory_error(track, PATH) == pytest.approx(5)
    assert relative_trajectory_error(track, PATH) == pytest.approx(5 / 24)
    assert displacement_error(track, PATH) == pytest.approx(0, abs=1e-5)
    assert velocity_cosine(track, PATH) == pytest.approx(1)


def test_the_way_back_has_cosine_minus_one_and_a_resting_track_none():
    assert velocity_cosine(track_of(PATH[::-1]), PATH) == pytest.approx(-1)
    assert velocity_cosine(track_of(np.full((9, 2), 5.0)), PATH) == 0
    across = np.stack([np.full(9, 10.0), np.arange(9.0)], axis=-1)
    assert velocity_cosine(track_of(across), PATH, span=1) == pytest.approx(0)
    assert displacement_error(track_of(np.full((9, 2), 5.0)), PATH) == pytest.approx(3 * 20 / 9)


def test_frames_in_which_the_truth_rests_do_not_count_for_the_cosine():
    halting = np.concatenate([PATH, np.tile(PATH[-1], (6, 1))])
    wandering = halting.copy()
    wandering[9:] += np.arange(6)[:, None] * [-1, 2]
    assert velocity_cosine(track_of(wandering), halting, span=1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: trajectory_error(track_of(PATH), PATH[:5]),
            r"true_centroids must be \[9, 2\].*got \[5, 2\]",
        ),
        (lambda: relative_trajectory_error(track_of(PATH), 0 * PATH), "true_centroids rest"),
        (
            lambda: velocity_cosine(track_of(PATH), PATH, span=9),
            r"span must be in 1\.\.8 for 9 frames; got 9",
        ),
        (lambda: velocity_cosine(track_of(PATH), 0 * PATH), "true_centroids move less than 0.5 px over 4"),
        (lambda: temporal_consistency(np.zeros((9, 4, 4, 3), np.uint8), track_of(PATH)), "of the track's"),
        (lambda: mean_interval([], []), "values and clusters must be as many, and some; got 0, 0, 0"),
        (lambda: mean_interval([1.0, float("nan")], [0, 1]), "values must be finite"),
        (lambda: mean_interval([1.0], [0], level=95), "level must be between 0 and 1; got 95"),
        (lambda: ratio_interval([1.0], [0.0], [0]), "the denominators sum to 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_dense_flow_of_a_clip_is_near_its_truth_and_far_from_anothers():
    pytest.importorskip("cv2")
    for scene in ({}, {"checkered": 1}, {"shaded": 1}):
        clips = [make_clip((30, i), options=replace(PLAIN, **scene)) for i in range(8)]
        lengths = [
            np.linalg.norm(clip.displacement(t, t + 4), axis=-1)[clip.masks[0, t]].mean()
            for clip in clips
            for t in range(13)
        ]
        assert np.mean([flow_error(clip.frames, clip) for clip in clips]) < 0.1 * np.mean(lengths)
    still = np.repeat(clips[0].frames[:1], 17, axis=0)
    assert flow_error(still, clips[0]) > 0.9 * np.mean(lengths[:13])
    assert flow_error(clips[1].frames, clips[0]) > 0.5 * np.mean(lengths[:13])


def test_dense_flow_asks_for_its_extra_and_for_frames_of_the_clips_size(monkeypatch):
    clip = make_clip(31, num_frames=5, options=PLAIN)
    with pytest.raises(ValueError, match=r"frames \[4, 64, 64, 3\] and clip \[5, 64, 64, 3\]"):
        flow_error(clip.frames[:4], clip)
    with pytest.raises(ValueError, match=r"span must be in 1\.\.4 for 5 frames; got 5"):
        flow_error(clip.frames, clip, span=5)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install "fastvmt\[eval\]"'):
        flow_error(clip.frames, clip)


def test_true_clips_are_steady_and_a_resting_one_is_perfectly_so():
    clip = make_clip(32, options=PLAIN)
    steady, still = temporal_consistency(clip.frames, track_object(clip.frames))
    assert steady > 0.96
    assert still > 0.9999
    resting = np.repeat(clip.frames[:1], 17, axis=0)
    assert temporal_consistency(resting, track_object(resting)) == (1, 1)


def test_flicker_lowers_the_consistency_of_what_flickers():
    clip = make_clip(33, options=PLAIN, colour="white", background="black")
    track = track_object(clip.frames)
    steady, still = temporal_consistency(clip.frames, track)
    dark = clip.frames.copy()
    dark[1::2][clip.masks[0, 1::2]] -= 100
    # Half-covered pixels at the edge darken less.
    assert temporal_consistency(dark, track)[0] == pytest.approx(steady - 100 / 255, abs=0.05)
    bright = clip.frames.copy()
    bright[1::2][~track.masks[1::2]] += 50
    assert temporal_consistency(bright, track)[1] == pytest.approx(still - 50 / 255, abs=1e-3)
    gone = replace(track, found=np.arange(17) % 2 == 0)
    assert temporal_consistency(clip.frames, gone)[0] == 0


def test_an_interval_of_independent_values_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(5, 2, 400)
    interval = mean_interval(values, range(400))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
    assert interval == mean_interval(values, range(400))
    assert interval != mean_interval(values, range(400), seed=1)


def test_copies_of_a_value_in_its_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(1).normal(0, 1, 50)
    once, thrice = (
        mean_interval(values, range(50)),
        mean_interval(np.repeat(values, 3), np.repeat(range(50), 3)),
    )
    for name in ("value", "low", "high"):
        assert getattr(once, name) == pytest.approx(getattr(thrice, name))
    alone = mean_interval(np.repeat(values, 3), range(150))
    assert alone.high - alone.low < 0.7 * (once.high - once.low)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        pairs = np.repeat(rng.normal(3, 1, 32), 2) + rng.normal(0, 0.5, 64)
        interval = mean_interval(pairs, np.repeat(range(32), 2))
        held += interval.low <= 3 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_a_ratio_of_paired_values_does_not_widen_with_what_they_share():
    shared = np.random.default_rng(3).uniform(1, 30, 40)
    exact = ratio_interval(0.3 * shared, shared, range(40))
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.3, 0.3, 0.3))
    shuffled = ratio_interval(0.3 * shared[::-1], shared, range(40))
    assert shuffled.value == pytest.approx(0.3)
    assert shuffled.low < 0.27 < 0.33 < shuffled.high


def test_one_cluster_has_a_mean_but_no_interval():
    interval = mean_interval([1.0, 2.0], ["a", "a"])
    assert interval.value == 1.5
    assert np.isnan([interval.low, interval.high]).all()
