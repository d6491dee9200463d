"""Point tracks of clips whose motion is known, and the motion fidelity of videos that move alike or not."""

import importlib.util
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.quality import cotracker
from diffsynth import save_video
from diffsynth.cli.main import main
from diffsynth.evaluation.motion_fidelity import motion_fidelity, paired_fidelity, tracklet_fidelity
from diffsynth.evaluation.trackers import Tracklets, track_points


def lk(grid):
    return partial(track_points, grid=grid)


needs_cv2 = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason='needs OpenCV: pip install "fastvmt[eval]"'
)
STUB = """
import torch

class CoTrackerPredictor(torch.nn.Module):
    def __init__(self, checkpoint, window_len, v2):
        super().__init__()
        self.model = torch.nn.Linear(2, 1)

    def forward(self, video, queries):
        assert video.shape[2] == 3 and video.max() > 1 and (queries[..., 0] == 0).all()
        times = torch.arange(video.shape[1])[None, :, None, None]
        visible = torch.ones(1, video.shape[1], queries.shape[1], dtype=torch.bool)
        visible[:, -1] = False
        return queries[:, None, :, 1:] + times * self.model.weight.view(2), visible
"""


def texture_clip(velocity, *, seed=0, num_frames=9, height=64, width=96):
    """A texture of waves that moves by velocity (rows, columns) a frame: exact between pixels, too."""
    rng = np.random.default_rng(seed)
    frequencies = rng.uniform(-0.7, 0.7, (40, 2))
    phases = rng.uniform(0, 2 * np.pi, (40, 1, 1))
    colours = rng.uniform(-1, 1, (40, 3))
    rows, cols = np.mgrid[0:height, 0:width].astype(float)
    frames = []
    for t in range(num_frames):
        across = frequencies[:, :1, None] * (rows - velocity[0] * t)
        along = frequencies[:, 1:, None] * (cols - velocity[1] * t)
        frames.append(np.einsum("khw,kc->hwc", np.cos(across + along + phases), colours))
    return (127 + 25 * np.stack(frames)).clip(0, 255).astype(np.uint8)


def tracks(steps, visible=None):
    """Tracklets from steps [N, T - 1, 2]."""
    points = np.cumsum(np.pad(np.asarray(steps, np.float32), ((0, 0), (1, 0), (0, 0))), axis=1)
    return Tracklets(points=points, visible=np.ones(points.shape[:2], bool) if visible is None else visible)


def straight_steps(velocity=(1, 2), count=3, num_frames=9):
    return np.tile(np.float32(velocity), (count, num_frames - 1, 1))


def straight(velocity, count=3, num_frames=9):
    return tracks(straight_steps(velocity, count, num_frames))


@needs_cv2
@pytest.mark.parametrize("velocity", [(1.3, -2.7), (-0.4, 0.25), (4.0, 3.5)])
def test_lucas_kanade_follows_a_known_translation_to_a_third_of_a_pixel(velocity):
    clip = texture_clip(velocity)
    found = track_points(clip, grid=12)
    assert found.points.shape == (144, 9, 2)
    assert found.points.dtype == np.float32
    assert found.points[0, 0] == pytest.approx((64 / 24, 96 / 24))
    truth = found.points[:, :1] + np.arange(9)[:, None] * np.array(velocity)
    margin = 8
    inside = ((truth >= margin) & (truth < np.array([64, 96]) - margin)).all(-1).all(1)
    assert inside.sum() >= 15
    assert found.visible[inside].mean() > 0.98
    errors = np.linalg.norm(found.points - truth, axis=-1)[inside][found.visible[inside]]
    assert errors.max() < 0.3


@needs_cv2
def test_a_point_that_leaves_the_picture_is_lost_for_good_and_stays_inside():
    found = track_points(texture_clip((0, 6)), grid=12)
    right = found.points[:, 0, 1] > 80
    assert not found.visible[right, -1].any()
    assert (np.diff(found.visible.astype(int), axis=1) <= 0).all()
    assert (found.points >= 0).all()
    assert (found.points < [64, 96]).all()


@needs_cv2
def test_a_video_is_true_to_itself_and_the_opposite_of_itself_backwards():
    clip = texture_clip((1.5, 2))
    assert motion_fidelity(clip, clip, tracker=lk(15)) == pytest.approx(1, abs=1e-5)
    assert motion_fidelity(clip[::-1], clip, tracker=lk(15)) < -0.95


@needs_cv2
def test_appearance_size_and_speed_do_not_count_but_direction_does():
    clip = texture_clip((1.5, 2))
    alike = texture_clip((3, 4), seed=7, height=96, width=80)
    across = texture_clip((2, -1.5), seed=7)
    assert motion_fidelity(alike, clip, tracker=lk(15)) > 0.98
    assert motion_fidelity(255 - clip, clip, tracker=lk(15)) > 0.99
    assert abs(motion_fidelity(across, clip, tracker=lk(15))) < 0.15


@needs_cv2
def test_a_still_video_shares_nothing_with_a_moving_one():
    still = texture_clip((0, 0))
    assert motion_fidelity(still, texture_clip((1.5, 2)), tracker=lk(10)) == pytest.approx(0, abs=0.02)
    assert motion_fidelity(still, texture_clip((0, 0), seed=3), tracker=lk(10)) == pytest.approx(1)


@needs_cv2
def test_a_video_without_texture_has_no_tracklets_and_is_named():
    plain = np.full((5, 48, 48, 3), 90, np.uint8)
    assert not track_points(plain, grid=6).visible[:, 1:].any()
    clip = texture_clip((1, 1), num_frames=5, height=48, width=48)
    with pytest.raises(ValueError, match="generated: none of 36 tracklets is seen in 50% of its steps"):
        motion_fidelity(plain, clip, tracker=lk(6))
    with pytest.raises(ValueError, match="reference: none of 36"):
        motion_fidelity(clip, plain, tracker=lk(6))


def test_the_score_is_half_the_published_sum():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(600, 6, 2)), rng.normal(size=(7, 6, 2))
    units = [steps / np.linalg.norm(steps, axis=-1, keepdims=True) for steps in (one, other)]
    table = np.array([[(a * b).sum(-1).mean() for b in units[1]] for a in units[0]])
    published = table.max(1).mean() + table.max(0).mean()
    score = tracklet_fidelity(tracks(one), tracks(other), least_step=0)
    assert score == pytest.approx(published / 2, abs=1e-5)
    assert tracklet_fidelity(tracks(other), tracks(one), least_step=0) == pytest.approx(score, abs=1e-5)


def test_motion_that_only_one_of_two_videos_has_costs_half_of_its_share():
    both = Tracklets(
        points=np.concatenate([straight((2, 0), 2).points, straight((-2, 0), 2).points]),
        visible=np.ones((4, 9), bool),
    )
    # Every tracklet of the one finds its like; half of the other's find the opposite, -1.
    assert tracklet_fidelity(straight((2, 0)), both) == pytest.approx(0.5)
    assert tracklet_fidelity(both, straight((2, 0))) == pytest.approx(0.5)


def test_rest_agrees_with_rest_and_is_neutral_to_motion():
    rest, motion = straight((0, 0)), straight((0, 1))
    assert tracklet_fidelity(rest, rest) == pytest.approx(1)
    assert tracklet_fidelity(rest, rest, least_step=0) == pytest.approx(1)
    assert tracklet_fidelity(rest, motion) == pytest.approx(0)
    assert tracklet_fidelity(straight((0.05, 0)), straight((-0.05, 0))) == pytest.approx(1)
    assert tracklet_fidelity(straight((0.05, 0)), straight((-0.05, 0)), least_step=0) == pytest.approx(-1)


def test_what_is_not_seen_does_not_count():
    steps = np.tile(np.float32([1, 2]), (4, 8, 1))
    steps[:, 6:] = (-9, 3)
    visible = np.ones((4, 9), bool)
    visible[:, 7:] = False
    assert tracklet_fidelity(tracks(steps, visible), straight((1, 2))) == pytest.approx(1)
    assert tracklet_fidelity(tracks(steps, visible), straight((-1, -2))) == pytest.approx(-1)
    assert tracklet_fidelity(tracks(steps, visible), tracks(steps, visible)) == pytest.approx(1)
    short = np.concatenate([steps, -steps])
    visible = np.concatenate([visible, np.tile(np.arange(9) < 4, (4, 1))])
    assert tracklet_fidelity(tracks(short, visible), straight((1, 2))) == pytest.approx(1)


def test_a_pair_seen_together_for_less_than_half_of_the_time_counts_less():
    early, late = np.tile(np.arange(9) < 6, (3, 1)), np.tile(np.arange(9) > 2, (3, 1))
    one, other = (tracks(straight_steps(), visible) for visible in (early, late))
    # 5 of 8 steps seen in each, 2 in both: 2 agreements over half of 8.
    assert tracklet_fidelity(one, other) == pytest.approx(0.5)


def test_pairs_at_the_same_place_tell_motion_from_its_mirror_image():
    steps = np.concatenate([straight_steps((1, 2), 2), straight_steps((1, -2), 2)])
    mirrored = steps[::-1]
    assert tracklet_fidelity(tracks(steps), tracks(mirrored)) == pytest.approx(1)
    assert paired_fidelity(tracks(steps), tracks(mirrored)) == pytest.approx((1 - 4) / 5)
    assert paired_fidelity(tracks(steps), tracks(steps)) == pytest.approx(1)
    lost = np.ones((4, 9), bool)
    lost[:2, 3:] = False
    lost[2:, 6:] = False
    turned = np.concatenate([steps[:2], steps[2:] * -1])
    assert paired_fidelity(tracks(turned, lost), tracks(steps)) == pytest.approx(-1)


def test_pairs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="tracked on one grid; got 3 and 4 tracklets"):
        paired_fidelity(straight((1, 1)), straight((1, 1), 4))
    with pytest.raises(ValueError, match="as many frames, at least 2; got 9 and 7"):
        paired_fidelity(straight((1, 1)), straight((1, 1), num_frames=7))
    early, late = np.tile(np.arange(9) < 6, (3, 1)), np.tile(np.arange(9) > 2, (3, 1))
    with pytest.raises(ValueError, match="none of 3 pairs of tracklets is seen in 50% of its steps"):
        paired_fidelity(tracks(straight_steps(), early), tracks(straight_steps(), late))


def test_tracklets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="as many frames, at least 2; got 9 and 7"):
        tracklet_fidelity(straight((1, 1)), straight((1, 1), num_frames=7))
    with pytest.raises(ValueError, match="at least 2; got 1 and 1"):
        tracklet_fidelity(straight((1, 1), num_frames=1), straight((1, 1), num_frames=1))
    with pytest.raises(ValueError, match="least_step must be 0 or more pixels; got -1"):
        tracklet_fidelity(straight((1, 1)), straight((1, 1)), least_step=-1)
    with pytest.raises(ValueError, match=r"points must be \[N, T, 2\].* got \[3, 4, 2\] and \[3, 5\]"):
        Tracklets(points=np.zeros((3, 4, 2), np.float32), visible=np.ones((3, 5), bool))


def test_a_wrong_grid_is_named():
    with pytest.raises(ValueError, match="grid must be an integer of at least 1, got 0"):
        track_points(np.zeros((2, 32, 32, 3), np.uint8), grid=0)


def test_without_opencv_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install "fastvmt\[eval\]"'):
        track_points(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty torch.hub cache, and no cotracker imported."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "cotracker"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub"


def write_package(folder, monkeypatch):
    """A stand-in for the package cotracker, which moves points by its weights, (column, row) a frame."""
    (folder / "cotracker").mkdir()
    (folder / "cotracker" / "__init__.py").touch()
    (folder / "cotracker" / "predictor.py").write_text(STUB)
    monkeypatch.syspath_prepend(folder)


def weights_of(column, row):
    return {"weight": torch.tensor([[float(column), float(row)]]), "bias": torch.zeros(1)}


def test_cotracker_is_asked_and_answers_in_columns_and_rows(hub, monkeypatch, tmp_path):
    write_package(tmp_path, monkeypatch)
    torch.save({"model": weights_of(3, -1)}, hub / "checkpoints" / cotracker.WEIGHTS)
    clip = np.full((4, 20, 40, 3), 200, np.uint8)
    found = cotracker.track(cotracker.load_cotracker(device="cpu"), clip, grid=2)
    starts = np.array([[5, 10], [5, 30], [15, 10], [15, 30]])
    assert found.points[:, 0] == pytest.approx(starts)
    assert found.points[:, 3] == pytest.approx(starts + np.array([-3, 9]))
    assert found.visible.tolist() == [[True, True, True, False]] * 4
    torch.save(weights_of(0, 1), tmp_path / "own.pth")
    model = cotracker.load_cotracker(tmp_path / "own.pth", "cpu")
    assert cotracker.track(model, clip, grid=2).points[:, 3] == pytest.approx(starts + np.array([3, 0]))
    moved = motion_fidelity(clip, clip, tracker=partial(cotracker.track, model, grid=2))
    assert moved == pytest.approx(1)


def test_cotracker_is_found_in_the_cache_of_torch_hub(hub):
    repository = hub / cotracker.REPOSITORY
    repository.mkdir()
    (repository / "hubconf.py").write_text(
        STUB + "\ndef cotracker3_offline(pretrained):\n    return CoTrackerPredictor(None, 60, False)\n"
    )
    torch.save(weights_of(1, 0), hub / "checkpoints" / cotracker.WEIGHTS)
    model = cotracker.load_cotracker(device="cpu")
    found = cotracker.track(model, np.full((3, 20, 20, 3), 200, np.uint8), grid=1)
    assert found.points[0] == pytest.approx(np.array([[10, 10], [10, 11], [10, 12]]))


def test_missing_or_foreign_parts_of_cotracker_are_named(hub, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scaled_offline.pth do not exist: put https://.* there"):
        cotracker.load_cotracker()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth do not exist"):
        cotracker.load_cotracker("nowhere.pth")
    torch.save({"other": torch.zeros(1)}, hub / "checkpoints" / cotracker.WEIGHTS)
    if importlib.util.find_spec("cotracker") is None:
        with pytest.raises(ImportError, match=r"install https://github\.com/facebookresearch/co-tracker"):
            cotracker.load_cotracker()
    write_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"are not CoTracker3's scaled_offline.pth"):
        cotracker.load_cotracker()


def evaluate(*arguments):
    return main(["evaluate", *(str(argument) for argument in arguments)])


@needs_cv2
def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    save_video(texture_clip((1.5, 2)), tmp_path / "own.mp4", fps=8)
    save_video(texture_clip((1.5, 2), seed=1, num_frames=7), tmp_path / "other.mp4", fps=8)
    arguments = [tmp_path / "own.mp4", tmp_path / "other.mp4", "--grid", "12"]
    assert evaluate(*arguments, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["frames_compared"] == 7
    assert values["motion_fidelity"] > 0.9
    assert values["motion_fidelity_at_same_place"] > 0.9
    assert values["motion_fidelity_of_reference_backwards"] < -0.9
    assert evaluate(*arguments) == 0
    table = capsys.readouterr().out
    assert f"{values['motion_fidelity']:.4f}" in table.splitlines()[2]


def test_the_command_says_in_one_line_what_is_missing(tmp_path, capsys):
    arguments = [tmp_path / "a.mp4", tmp_path / "b.mp4", "--clip", tmp_path / "none"]
    for path in arguments[:2]:
        path.write_bytes(b"\0")
    assert evaluate(*arguments) == 2
    assert "there is no CLIP in" in capsys.readouterr().err
    arguments[0].unlink()
    assert evaluate(*arguments[:2]) == 2
    assert "a.mp4 does not exist" in capsys.readouterr().err
