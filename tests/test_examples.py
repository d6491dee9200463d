"""The example scripts, run as a user runs them."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffsynth import VideoData
from diffsynth.cli.parser import build_parser
from diffsynth.testing import write_clip

ROOT = Path(__file__).parent.parent


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_example_makes_text_to_video_without_transfer(tiny_checkpoint, tmp_path):
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


@pytest.mark.slow
def test_without_a_reference_the_example_moves_as_a_shipped_clip_does(tiny_checkpoint, tmp_path):
    arguments = "--frames 5 --height 32 --width 32 --steps 1 --motion-inner-steps 1 --device cpu"
    folders = ["--model_dir", tiny_checkpoint, "--output_dir", tmp_path]
    result = run("wan_14b_text_to_video.py", *folders, *arguments.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "source-effi_AMF-seed42.mp4")
    assert len(VideoData(tmp_path / "source-effi_AMF-seed42.mp4")) == 5


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("wan_1.3b_text_to_video.py", []),
        ("inspect_motion.py", ["ref.mp4"]),
        ("convert_weights.py", ["--model_dir", "models/Wan2.1-T2V-1.3B", "--output_dir", "out"]),
    ],
)
def test_a_missing_checkpoint_ends_with_the_download_command_and_no_traceback(tmp_path, script, arguments):
    result = run(script, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    *usage, line = result.stderr.splitlines()
    assert "does not exist; fetch it with: fastvmt download 1.3b" in line
    assert len(usage) <= (2 if script == "convert_weights.py" else 0)


def test_the_hosted_demo_starts_the_page_under_its_own_name():
    folder = ROOT / "examples" / "space"
    spec = importlib.util.spec_from_file_location("app", folder / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    options = build_parser().parse_args(app.arguments({"SPACE_HOST": "me-fastvmt.hf.space"}))
    assert (options.command, options.model, options.port) == ("ui", "nano", 7860)
    assert options.allow_host == ["me-fastvmt.hf.space"]
    assert build_parser().parse_args(app.arguments({})).allow_host == []
    header = (folder / "README.md").read_text().split("---")[1]
    settings = dict(line.split(": ", 1) for line in header.strip().splitlines())
    assert (settings["sdk"], settings["app_file"], settings["license"]) == ("gradio", "app.py", "mit")
    assert "fastvmt[ui]" in (folder / "requirements.txt").read_text()


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.py")), ids=lambda script: script.name)
def test_an_example_can_be_read_at_a_glance(script):
    assert len(script.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_the_first_try_needs_nothing(tmp_path):
    result = run("first_try.py", cwd=tmp_path)
    for name, shape in {"out.mp4": (64, 64), "side_by_side.mp4": (280, 776)}.items():
        video = VideoData(tmp_path / "results" / "first_try" / name)
        # The sheet is repeated until it lasts four seconds.
        assert (len(video), video.shape()) == (17 if name == "out.mp4" else 51, shape)
        assert str(Path("results/first_try") / name) in result.stdout
    distance, cosine = re.search(
        r"path is ([\d.]+) px .* 64 px\).*cosine.* (0\.\d+) \(", result.stdout
    ).groups()
    assert float(distance) < 8
    assert float(cosine) > 0.4


@pytest.mark.slow
def test_the_motion_of_a_reference_can_be_looked_at(tiny_checkpoint, tmp_path):
    clip = write_clip(tmp_path / "ref.mp4", num_frames=6, height=32, width=48)
    size = ["--height", 32, "--width", 48, "--model_dir", tiny_checkpoint, "--device", "cpu"]
    result = run("inspect_motion.py", clip, *size, "--output", tmp_path / "motion.mp4")
    assert result.returncode == 0, result.stderr
    video = VideoData(tmp_path / "motion.mp4")
    # The frames and the flow, side by side; small frames are enlarged until arrows can be seen.
    assert (len(video), video.shape()) == (6, (256, 2 * 384))


@pytest.mark.slow
def test_the_python_in_the_readme_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    video = VideoData(tmp_path / "star.mp4")
    assert (len(video), video.shape(), video.fps) == (17, (64, 64), 12)


@pytest.mark.slow
def test_the_python_of_the_reference_runs_as_printed(tiny_checkpoint, tmp_path):
    """All of it in one go; only the checkpoint's place, the device and the sizes are exchanged."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shards = sorted(folder.glob("*.safetensors"))
    weights = {key: value for shard in shards for key, value in load_file(shard).items()}
    for file in [*shards, folder / "diffusion_pytorch_model.safetensors.index.json"]:
        file.unlink()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    write_clip(tmp_path / "ref.mp4", num_frames=6, height=32, width=48)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    exchanged = {
        "models/Wan2.1-T2V-1.3B": str(folder),
        'device="cuda"': 'device="cpu"',
        "num_inference_steps=50": "num_inference_steps=2",
        "seed=42)": "seed=42, num_inference_steps=2)",
        "motion=guidance)": "motion=guidance, num_inference_steps=2)",
        "height=480, width=832": "height=32, width=48",
    }
    for printed, here in exchanged.items():
        assert printed in code
        code = code.replace(printed, here)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert VideoData(tmp_path / "out.mp4").shape() == (32, 48)
