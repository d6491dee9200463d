"""How well a video follows its reference: told only where it can be, and then rightly."""

import numpy as np
import pytest

from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth import VideoData
from diffsynth.evaluation import followed
from diffsynth.evaluation.followed import (
    beside_reference,
    follow_text,
    one_object,
    path_agreement,
    path_words,
)
from diffsynth.evaluation.tracking import track_object
from diffsynth.testing import write_clip


@pytest.fixture(scope="module")
def clips():
    scene = {"shape": "circle", "colour": "red", "background": "white", "num_frames": 9}
    return [make_clip(3, options=PLAIN, trajectory=path, **scene) for path in ("line", "circle")]


def test_the_path_of_one_object_is_found(clips):
    for clip in clips:
        track = one_object(clip.frames)
        assert np.abs(track.centroids - clip.centroids[0]).max() < 1.5


def test_other_videos_have_none(clips):
    noise = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    assert one_object(noise) is None
    assert one_object(np.full((5, 32, 32, 3), 200, np.uint8)) is None
    ramp = clips[0].frames.astype(float) * np.linspace(0.3, 1, clips[0].frames.shape[2])[:, None]
    assert one_object(ramp.astype(np.uint8)) is None  # a background that is not plain


def test_the_object_of_a_video_is_looked_for_once(clips, monkeypatch):
    looked = []

    def track(video):
        looked.append(len(video))
        return track_object(video)

    monkeypatch.setattr(followed, "track_object", track)
    film = np.concatenate([clips[0].frames, clips[0].frames[::-1]])
    first = one_object(list(film))
    assert one_object(film) is first is not None
    assert looked == [3, 18]  # frames apart first
    busy = film.copy()
    busy[:, :20, :20] = busy[:, -20:, -20:] = (0, 160, 0)  # two more objects
    assert one_object(busy) is None
    assert looked == [3, 18, 3]


def test_agreement_is_a_distance_and_a_cosine():
    path = np.array([[0.0, 0], [0, 1], [0, 2]])
    assert path_agreement(path + np.array([3, 4]), path) == (5.0, pytest.approx(1.0))
    assert path_agreement(path[::-1], path)[1] == pytest.approx(-1.0)
    assert path_agreement(path[:, ::-1], path)[1] == pytest.approx(0.0)


def test_a_video_and_itself_agree_and_real_looking_ones_are_left_out(clips, tmp_path):
    from diffsynth import save_video

    path = save_video(clips[0].frames, tmp_path / "ref.mp4", fps=12, quality=9)
    told = follow_text(list(VideoData(path)), VideoData(path))
    assert told.startswith("the object's path is 0.0 px from the reference's on average (frame width 64 px)")
    assert "cosine of the velocities 1.00" in told
    noise = write_clip(tmp_path / "noise.mp4", num_frames=5, height=32, width=32)
    assert follow_text(list(VideoData(noise)), VideoData(noise)) is None


def test_both_paths_are_drawn_into_the_result_only(clips):
    red, blue = (230, 60, 50), (50, 110, 220)
    frame = np.asarray(beside_reference({"reference": clips[1].frames, "result": clips[0].frames})[-1])
    blue_in = [
        (np.abs(part.astype(int) - blue).sum(-1) < 40).any() for part in (frame[:, :256], frame[:, 260:])
    ]
    assert blue_in == [False, True]
    assert (np.abs(frame[:, 260:].astype(int) - red).sum(-1) < 40).any()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ([(10, 2 * t) for t in range(17)], "moves 32 px right"),
        ([(30 - t, 40 - 2 * t) for t in range(17)], "moves 32 px left, 16 px up"),
        ([(10, 16 - 2 * abs(t - 8)) for t in range(17)], "ends where it begins, turns back at 0.8 s"),
        ([(10 + 2 * min(t, 16 - t), 2 * t) for t in range(17)], "moves 32 px right"),
    ],
)
def test_a_path_is_told_in_words(path, words):
    assert path_words(np.array(path, float), fps=10) == words
