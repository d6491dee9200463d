"""The example scripts, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth import VideoData
from diffsynth.testing import write_clip

ROOT = Path(__file__).parent.parent


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("script", ["wan_1.3b_text_to_video.py", "wan_14b_text_to_video.py"])
def test_the_example_writes_a_playable_video_and_never_over_an_old_one(tiny_checkpoint, tmp_path, script):
    clip = write_clip(tmp_path / "ref.mp4", num_frames=6, height=40, width=72)
    folders = ["--model_dir", tiny_checkpoint, "--input_video", clip, "--output_dir", tmp_path / "out"]
    options = [
        "--height",
        32,
        "--width",
        64,
        "--num_inference_steps",
        2,
        "--mode",
        "No_transfer",
        "--device",
        "cpu",
    ]
    for _ in range(2):
        result = run(script, *folders, *options, "--test_latency")
        assert result.returncode == 0, result.stderr
    for name in ("ref-No_transfer-seed42.mp4", "ref-No_transfer-seed42-2.mp4"):
        video = VideoData(tmp_path / "out" / name)
        assert (len(video), video.shape(), video.fps) == (6, (32, 64), 15)
    assert len((tmp_path / "out" / "latency.jsonl").read_text().splitlines()) == 2


def test_the_example_makes_text_to_video_without_a_reference(tiny_checkpoint, tmp_path):
    arguments = [
        "--num_frames",
        5,
        "--height",
        32,
        "--width",
        32,
        "--num_inference_steps",
        1,
        "--output_dir",
        tmp_path,
    ]
    result = run(
        "wan_1.3b_text_to_video.py", "--model_dir", tiny_checkpoint, "--mode", "No_transfer", *arguments
    )
    assert result.returncode == 0, result.stderr
    assert len(VideoData(tmp_path / "text-No_transfer-seed42.mp4")) == 5


def test_a_missing_checkpoint_ends_with_the_download_command(tmp_path):
    result = run("wan_1.3b_text_to_video.py", cwd=tmp_path)
    assert result.returncode != 0
    assert "download_model.py --model 1.3b" in result.stderr


def test_the_first_try_needs_nothing(tmp_path):
    result = run("first_try.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(VideoData(tmp_path / "results" / "first_try" / "result.mp4")) == 17
