"""The training of the nano model, from nothing to a checkpoint that the pipeline loads, at its smallest."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth import WanVideoPipeline
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.prompters.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parent.parent / "examples" / "train_nano"


NANO = SCRIPTS.parent.parent / "models" / "Wan2.1-T2V-nano"


def run(script, *options):
    command = [sys.executable, SCRIPTS / script, *map(str, options)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    run("train_vae.py", "--run", folder, "--steps", 4, "--clips", 4, "--held_out", 1, "--workers", 1)
    options = ["--run", folder, "--images", 4, "--clips", 4, "--image_batch", 2, "--video_batch", 2]
    run("train_dit.py", *options, "--image_steps", 1, "--video_steps", 1, "--workers", 1)
    run("package.py", "--run", folder, "--output", folder / "model")
    return folder


@pytest.mark.slow
def test_what_was_trained_is_a_checkpoint_of_under_20_mb_that_makes_videos(trained):
    size = sum(file.stat().st_size for file in (trained / "model").rglob("*") if file.is_file())
    assert size < 20e6
    pipe = WanVideoPipeline.from_pretrained(trained / "model", device="cpu")
    frames = pipe(
        "A red circle, on a blue background!", num_inference_steps=1, num_frames=5, output_type="np"
    )
    assert frames.shape == (5, 64, 64, 3)


@pytest.mark.slow
def test_reconstruction_is_measured_as_in_training(trained):
    logged = [json.loads(line) for line in (trained / "vae.jsonl").read_text().splitlines()][-1]["psnr"]
    *_, seen_by_vae = run("reconstruction.py", "--model_dir", trained / "model", "--clips", 1).splitlines()
    numbers = re.fullmatch(r"1 clips as the VAE sees them: mean (.+) dB, all pixels (.+) dB", seen_by_vae)
    assert [float(number) for number in numbers.groups()] == pytest.approx([logged] * 2, abs=0.1)


@pytest.mark.slow
def test_a_few_step_lora_is_distilled_from_what_was_trained(trained):
    lora = trained / "few_steps.safetensors"
    options = ["--steps", 2, "--batch", 2, "--clips", 4, "--workers", 1]
    run("distil_steps.py", "--run", trained, "--output", lora, *options)
    plain = WanVideoPipeline.from_pretrained(trained / "model", device="cpu")
    pipe = WanVideoPipeline.from_pretrained(trained / "model", device="cpu", loras={lora: 1.0})
    for (name, before), after in zip(
        plain.dit.blocks.named_modules(), pipe.dit.blocks.modules(), strict=True
    ):
        if isinstance(before, torch.nn.Linear):
            assert (before.weight != after.weight).any(), name
    assert torch.equal(plain.dit.head.head.weight, pipe.dit.head.head.weight)
    frames = pipe("a red circle", num_inference_steps=2, cfg_scale=1.0, num_frames=5, output_type="np")
    assert frames.shape == (5, 64, 64, 3)


@pytest.mark.slow
def test_more_steps_train_on_from_where_the_last_run_ended(trained):
    lines = [json.loads(line) for line in (trained / "vae.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    before = torch.load(trained / "dit.state", weights_only=True)
    options = ["--run", trained, "--images", 4, "--clips", 4, "--image_batch", 2, "--video_batch", 2]
    run("train_dit.py", *options, "--image_steps", 1, "--video_steps", 2, "--workers", 1)
    after = torch.load(trained / "dit.state", weights_only=True)
    assert (before["step"], after["step"]) == (2, 3)
    assert any((before["model"][name] != value).any() for name, value in after["model"].items())


def test_the_packaged_vae_has_normalised_latents_and_the_same_pixels(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from package import normalised
    from train_vae import SIZE

    torch.manual_seed(0)
    vae, folded = WanVideoVAE(**SIZE), WanVideoVAE(**SIZE)
    mean, std = torch.randn(8).double(), torch.rand(8).double() + 0.5
    folded.load_state_dict({key: value.float() for key, value in normalised(vae, mean, std).items()})
    clip = torch.from_numpy(make_clip(0, num_frames=5).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    plain = vae.encode(clip)
    expected = (plain - mean.float().view(1, 8, 1, 1, 1)) / std.float().view(1, 8, 1, 1, 1)
    torch.testing.assert_close(folded.encode(clip), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.decode(expected), vae.decode(plain), atol=1e-4, rtol=0)
    variance = vae.encode_moments(clip)[1] - 2 * std.log().float().view(1, 8, 1, 1, 1)
    torch.testing.assert_close(folded.encode_moments(clip)[1], variance, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_starts_from_a_checkpoint(tmp_path):
    options = ["--run", tmp_path, "--start", NANO, "--clips", 4, "--workers", 1]
    run("train_vae.py", *options, "--steps", 1, "--held_out", 1)
    psnr = json.loads((tmp_path / "vae.jsonl").read_text().splitlines()[-1])["psnr"]
    assert psnr > 15  # from nothing, one step gives about 5
    sizes = ["--images", 4, "--image_batch", 2, "--video_batch", 2, "--image_steps", 1, "--video_steps", 1]
    run("train_dit.py", *options, *sizes)
    lines = [json.loads(line) for line in (tmp_path / "dit.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_text"] < 1.5
    assert lines[-1]["validation_picture"] < 1.5


def test_sprites_move_as_the_shapes_of_the_clip_that_gives_the_motion(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from sprite_scenes import SpriteScenes, make_sprite_clip

    motion = make_clip(3, options=PLAIN)
    clip = make_sprite_clip(3, name="football", motion=motion, scenes=SpriteScenes(motion=PLAIN))
    assert clip.caption.startswith("a football on ")
    changed = np.abs(clip.frames.astype(float) - clip.background).max(-1) > 30
    grid = np.indices(changed.shape[1:]).reshape(2, -1).T + 0.5
    places = np.stack([grid[mask.ravel()].mean(0) for mask in changed])
    np.testing.assert_allclose(places, motion.centroids[0], atol=1.5)


def test_captions_are_made_of_known_words_and_held_out_sprites_are_never_drawn(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from captions import WORDS
    from sprite_package import HELD_OUT_SPRITES
    from sprite_scenes import make_sprite_clip

    captions = [make_sprite_clip((9, i), num_frames=1).caption for i in range(150)]
    words = {word for caption in captions for word in caption.split()}
    assert words <= set(WORDS)
    assert not words & set(HELD_OUT_SPRITES)


def test_without_npm_the_sprites_are_not_fetched_and_it_says_why(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import sprite_package

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is needed"):
        sprite_package.fetch_sprites(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sprite_package\.py"):
        sprite_package.sprite("unicorn")


@pytest.mark.slow
def test_the_tokenizer_reads_prompts_as_people_write_them(trained, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from captions import END, UNKNOWN, numbers_of

    tokenizer = load_tokenizer(trained / "model" / "google" / "umt5-xxl")
    plain, typed, foreign, empty = tokenizer(
        ["a red circle on a blue background", "A red circle on a blue background.", "a red zebra", ""],
        max_length=None,
    )
    assert plain == typed
    assert plain[-1] == END
    assert foreign == [*plain[:2], UNKNOWN, END]
    assert empty == [END]
    ids, mask = numbers_of(["a red circle on a blue background"], np.random.default_rng(1), drop=0.0)
    assert mask.sum().item() >= len(plain)
    assert set(plain) <= set(ids[0].tolist())


@pytest.mark.slow
def test_a_sheet_shows_each_prompt_above_its_frames(tmp_path):
    run("contact_sheet.py", "--model", "nano", "--count", 2, "--output", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (5 * 128 + 4 * 4, 2 * (128 + 24) + 4)
