"""The embedded model: it is complete, it is found wherever the package is, and it transfers motion."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.methods import methods_from, standard_methods
from benchmarks.quality.pairs import evaluate, make_pairs
from benchmarks.quality.report import summarise
from benchmarks.synthetic.clips import SceneOptions, make_clip
from diffsynth import WanVideoPipeline
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.resolve import motion_for
from diffsynth.motion import MotionGuidance

ROOT = Path(__file__).parent.parent
FEW_STEPS = ROOT / "benchmarks" / "variants" / "few_steps.json"
# What the model measured when it was packaged, less what few clips and pairs vary by.
LEAST_PSNR = 27.0
MARGIN = 0.35
FEW_STEPS_MARGIN = 0.45


@pytest.fixture(scope="module")
def nano():
    return WanVideoPipeline.from_pretrained("nano", device="cpu")


def test_it_is_a_small_whole_checkpoint_folder():
    folder = checkpoint_folder("nano")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert not [file for file in files if file.suffix in (".pth", ".pt", ".bin")]
    card = (folder / "README.md").read_text()
    for topic in ("Training data", "Recipe", "Seeds", "Limits"):
        assert f"## {topic}" in card
    assert motion_for("nano") != MotionGuidance()
    assert run_defaults(folder)["height"] == 64


def test_the_vae_gives_held_out_clips_back(nano):
    frames = np.stack([make_clip((2, seed), options=SceneOptions()).frames for seed in range(4)])
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        again = nano.vae.decode(nano.vae.encode(video))
    psnr = -10 * ((again - video) / 2).square().mean().log10().item()
    assert psnr > LEAST_PSNR


@pytest.mark.slow
def test_motion_is_transferred_by_a_margin(nano, tmp_path):
    names = ("No_transfer", "effi_AMF")
    methods = [method for method in standard_methods(nano) if method.name in names]
    rows = evaluate(nano, make_pairs(4, "test"), methods, seeds=[0], rows_path=tmp_path / "rows.jsonl")
    summary = summarise(rows)
    assert summary["effi_AMF"].ratios["trajectory_error"].value < MARGIN
    assert summary["effi_AMF"].means["background_right"].value >= 0.75


@pytest.mark.slow
def test_the_eight_step_lora_transfers_motion_without_a_negative_prompt(tmp_path):
    lora = checkpoint_folder("nano") / "loras" / "eight_steps.safetensors"
    pipe = WanVideoPipeline.from_pretrained("nano", device="cpu", loras={lora: 1.0})
    names = ("8 steps: no transfer", "8 steps: 4 gradients in 8")
    methods = [method for method in methods_from(FEW_STEPS, pipe) if method.name in names]
    rows = evaluate(pipe, make_pairs(4, "test"), methods, seeds=[0], rows_path=tmp_path / "rows.jsonl")
    guided = summarise(rows, "8 steps: no transfer")["8 steps: 4 gradients in 8"]
    assert guided.ratios["trajectory_error"].value < FEW_STEPS_MARGIN
    assert guided.means["background_right"].value >= 0.75


@pytest.mark.slow
def test_it_comes_with_an_installed_package(tmp_path):
    pytest.importorskip("setuptools")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    library = tmp_path / "base" / "lib"
    for folder in ("Wan2.1-T2V-nano", "Wan2.2-TI2V-nano"):
        assert (library / "diffsynth" / "embedded" / folder / "config.json").is_file()
    assert (library / "diffsynth" / "embedded" / "data" / "bounce.mp4").is_file()
    assert (library / "diffsynth" / "evaluation" / "self_test.safetensors").is_file()
    code = "import diffsynth; print(diffsynth.__file__, diffsynth.WanVideoPipeline.from_pretrained('nano'))"
    environment = {**os.environ, "PYTHONPATH": str(library)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert str(library) in result.stdout
    assert "WanVideoPipeline(DiT width" in result.stdout
