"""save_video and save_frames: exact sizes and counts, and no way to lose a good file."""

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffsynth.data import VideoData, save_frames, save_video, writer


def smooth_frames(num_frames, height, width):
    """uint8 [T, H, W, 3]: a colour ramp that moves, easy to encode."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([40 + x + 2 * t, 60 + y, 90 + 0 * t], axis=-1).clip(0, 255).astype(np.uint8)


def read(path):
    return np.stack([np.asarray(frame) for frame in VideoData(path)])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("height", "width"), [(70, 100), (71, 101), (71, 100), (64, 33), (2, 2), (1, 1)])
def test_any_size_is_kept_exactly_and_the_picture_too(tmp_path, height, width):
    frames = smooth_frames(6, height, width)
    path = save_video(frames, tmp_path / "out.mp4", fps=12, quality=9)
    assert path == tmp_path / "out.mp4"
    decoded = read(path)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    assert VideoData(path).fps == pytest.approx(12)


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv", ".avi", ".MP4"])
@pytest.mark.parametrize("fps", [24000 / 1001, np.float32(8)])
def test_every_extension_keeps_count_and_rate(tmp_path, suffix, fps):
    data = VideoData(save_video(smooth_frames(5, 32, 32), tmp_path / f"out{suffix}", fps=fps))
    assert len(data) == 5
    assert data.fps == pytest.approx(fps, abs=0.01)


def test_all_kinds_of_frames_give_the_same_video(tmp_path):
    array = smooth_frames(4, 32, 48)
    array[..., 1:] = array[..., :1]
    images = [Image.fromarray(frame) for frame in array]
    kinds = {
        "array": array,
        "arrays": list(array),
        "images": images,
        "generator": (image for image in images),
        "rgba": [image.convert("RGBA") for image in images],
        "grey": [Image.fromarray(frame[..., 0]) for frame in array],
        "strided": np.asfortranarray(array),
    }
    decoded = {kind: read(save_video(frames, tmp_path / f"{kind}.mp4")) for kind, frames in kinds.items()}
    for kind, pixels in decoded.items():
        assert np.array_equal(pixels, decoded["array"]), kind


def test_a_better_quality_is_closer_and_larger(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    paths = [save_video(frames, tmp_path / f"{quality}.mp4", quality=quality) for quality in (0, 5, 10)]
    sizes = [path.stat().st_size for path in paths]
    errors = [np.abs(read(path).astype(int) - frames).mean() for path in paths]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 4
    assert errors[0] > errors[1] > errors[2]


def test_parent_folders_are_made_and_the_file_is_readable_by_others(tmp_path):
    path = save_video(smooth_frames(2, 16, 16), tmp_path / "a" / "b" / "out.mp4")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert listing(path.parent) == ["out.mp4"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real" / "out.mp4")
    save_video(smooth_frames(2, 16, 16), tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(VideoData(tmp_path / "real" / "out.mp4")) == 2


def test_a_video_can_be_saved_over_its_own_source(tmp_path):
    path = save_video(smooth_frames(5, 32, 32), tmp_path / "out.mp4")
    save_video(VideoData(path, height=16, width=16), path)
    assert read(path).shape == (5, 16, 16, 3)


def test_ffmpeg_params_come_last_and_win(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    plain = save_video(frames, tmp_path / "plain.mp4")
    coarse = save_video(frames, tmp_path / "coarse.mp4", ffmpeg_params=["-crf", "50"])
    assert coarse.stat().st_size < plain.stat().st_size / 4


def test_an_odd_size_is_told_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="diffsynth.data.writer"):
        save_video(smooth_frames(2, 16, 17), tmp_path / "out.mp4")
    assert "17x16 is an odd size: stored as 4:4:4" in caplog.text


def failing_generator():
    yield from smooth_frames(3, 16, 16)
    raise OSError("decoder broke")


WRONG_FRAMES = [
    ([], ValueError, "frames is empty"),
    (np.zeros((0, 4, 4, 3), np.uint8), ValueError, "frames is empty"),
    (
        [np.zeros((4, 4, 3), np.uint8)] * 2 + [np.zeros((4, 6, 3), np.uint8)],
        ValueError,
        "frame 2 of frames is 6x4, but frame 0 is 4x4",
    ),
    (np.zeros((2, 4, 4, 3), np.float32), TypeError, "frame 0 of frames has dtype float32, must be uint8"),
    (np.zeros((4, 4, 3), np.uint8), ValueError, r"frame 0 of frames has shape \[4, 3\]"),
    (np.zeros((2, 4, 4, 4), np.uint8), ValueError, r"frame 0 of frames has shape \[4, 4, 4\]"),
    (np.zeros((2, 0, 4, 3), np.uint8), ValueError, r"frame 0 of frames has shape \[0, 4, 3\]"),
    (Image.new("RGB", (4, 4)), TypeError, "frames must be an iterable of images or arrays, got Image"),
    (None, TypeError, "frames must be an iterable of images or arrays, got NoneType"),
    (["0.png"], TypeError, "frame 0 of frames must be a PIL image or a uint8 array, got str"),
]


@pytest.mark.parametrize(("frames", "error", "message"), WRONG_FRAMES)
def test_wrong_frames_are_refused_and_the_old_files_stay(tmp_path, frames, error, message):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(error, match=message):
        save_video(frames, target)
    with pytest.raises(error, match=message):
        save_frames(frames, tmp_path)
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["out.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_killed_ffmpeg_is_told_with_its_signal(tmp_path, monkeypatch):
    started = []

    class Seen(subprocess.Popen):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            started.append(self)

    def frames():
        for frame in smooth_frames(9, 512, 512):
            yield frame
            started[-1].kill()
            started[-1].wait()

    monkeypatch.setattr(subprocess, "Popen", Seen)
    with pytest.raises(RuntimeError, match="could not write the video: it was killed by signal 9"):
        save_video(frames(), tmp_path / "out.mp4")
    assert listing(tmp_path) == []


def test_an_error_of_the_generator_passes_and_the_old_file_stays(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="decoder broke"):
        save_video(failing_generator(), target)
    with pytest.raises(OSError, match="decoder broke"):
        save_frames(failing_generator(), tmp_path)
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fps": 0}, ValueError, "fps must be a number above 0 .*got 0"),
        ({"fps": -1}, ValueError, "fps must be a number above 0"),
        ({"fps": float("nan")}, ValueError, "fps must be a number above 0"),
        ({"fps": "15"}, ValueError, "fps must be a number above 0"),
        ({"quality": -0.1}, ValueError, "quality must be a number from 0 to 10, got -0.1"),
        ({"quality": 11}, ValueError, "quality must be a number from 0 to 10"),
        ({"quality": None}, ValueError, "quality must be a number from 0 to 10"),
        ({"ffmpeg_params": "-crf 10"}, TypeError, "ffmpeg_params must be a list of strings"),
        ({"ffmpeg_params": ["-crf", 10]}, TypeError, "ffmpeg_params must be a list of strings"),
        ({"ffmpeg_params": ["-nonsense", "1"]}, RuntimeError, "ffmpeg could not write .*nonsense"),
        ({"ffmpeg_params": ["-frames:v", "2"]}, RuntimeError, "has 2 frames of 16x16, asked were 3"),
        ({"ffmpeg_params": ["-vf", "scale=32:32"]}, RuntimeError, "has 3 frames of 32x32, asked .*16x16"),
        ({"ffmpeg_params": ["-vn"]}, RuntimeError, "ffmpeg"),
    ],
)
def test_wrong_options_are_refused_and_the_old_file_stays(tmp_path, options, error, message):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(error, match=message):
        save_video(smooth_frames(3, 16, 16), target, **options)
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("name", ["out.txt", "out", "out.ogv"])
def test_an_unknown_extension_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"path must end in one of \.mp4, .*got '{name}'"):
        save_video(smooth_frames(2, 16, 16), tmp_path / name)
    assert listing(tmp_path) == []


def test_a_folder_as_target_is_refused(tmp_path):
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder, give the name of a video file"):
        save_video(smooth_frames(2, 16, 16), tmp_path / "out.mp4")


def test_an_unreadable_result_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_encode", lambda *arguments: (len(arguments), "No space left"))
    with pytest.raises(RuntimeError, match=r"out\.mp4: ffmpeg could not write the video: No space left"):
        save_video(smooth_frames(2, 16, 16), tmp_path / "out.mp4")
    assert listing(tmp_path) == []


ENDLESS = """
import sys
import numpy as np
from diffsynth.data import save_video

def endless():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    index = 0
    while True:
        yield frame
        index += 1
        if index == 200:
            print("writing", flush=True)

save_video(endless(), sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_a_killed_write_leaves_the_old_file(tmp_path):
    target = save_video(smooth_frames(3, 32, 32), tmp_path / "out.mp4")
    good = target.read_bytes()
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(target)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().strip() == b"writing"
        assert any(name.startswith(".writing-") for name in listing(tmp_path))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    # Time for the orphaned encoder to finish what it holds.
    time.sleep(0.5)
    assert target.read_bytes() == good
    save_video(smooth_frames(4, 32, 32), target)
    assert len(VideoData(target)) == 4


def test_saved_frames_are_lossless_and_numbered_from_zero(tmp_path):
    frames = smooth_frames(12, 9, 11)
    folder = save_frames(iter(frames), tmp_path / "a" / "frames")
    assert folder == tmp_path / "a" / "frames"
    assert listing(folder) == [f"{index:05d}.png" for index in range(12)]
    saved = VideoData(image_folder=folder)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in saved]), frames)


def test_save_frames_overwrites_nothing_and_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_frames(smooth_frames(2, 8, 8), tmp_path)
    before = (tmp_path / "00001.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds images \(00000\.png, \.\.\.\)"):
        save_frames(smooth_frames(1, 8, 8) + 9, tmp_path)
    assert listing(tmp_path) == ["00000.png", "00001.png", "notes.txt"]
    assert (tmp_path / "00001.png").read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_save_frames_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "frames").write_text("mine")
    with pytest.raises(FileExistsError):
        save_frames(smooth_frames(1, 8, 8), tmp_path / "frames")
    assert (tmp_path / "frames").read_text() == "mine"


def test_importing_the_room_does_not_load_imageio():
    code = "import sys, diffsynth.data; assert not any(name.startswith('imageio') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
