"""A picture and a motion reference: the condition of each pass of guidance, and what it does not move."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.cli.main import main
from diffsynth.configs.options import LoadOptions
from diffsynth.data.tensors import picture_to_tensor, video_to_tensor
from diffsynth.models.conditions import ImageCondition
from diffsynth.motion import MotionGuidance, attention_motion_flow, guided_step
from diffsynth.pipelines.image_condition import image_condition
from diffsynth.runs.identity import sha256_of_frames
from diffsynth.runs.record import read_record
from diffsynth.testing import write_checkpoint
from diffsynth.webui.queue import QueuedJob
from diffsynth.webui.requests import checked_request
from diffsynth.webui.session import make_video, open_session
from diffsynth.webui.uploads import UploadLimits, keep_picture

PICTURE = Image.linear_gradient("L").resize((40, 50)).convert("RGB")
CLIP = [Image.radial_gradient("L").rotate(turn).crop((40, 40 + turn, 90, 90 + turn)) for turn in range(9)]
MOTION = {
    "guided_steps": 2,
    "inner_steps": 2,
    "block": 1,
    "window": 1,
    "tile": (1, 1),
    "sf": 2,
    "lr": (0.05, 0.03),
}
SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "seed": 1, "motion": MOTION}
SMALL |= {"progress_bar_cmd": None, "output_type": "latent", "sigma_shift": 5.0, "denoising_strength": 1.0}
KINDS = ["tiny-i2v", "tiny-flf2v", "tiny-ti2v", "tiny-a14b-i2v"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A function: size of a checkpoint -> its pipeline."""

    @cache
    def make(size):
        folder = write_checkpoint(tmp_path_factory.mktemp("pictures") / size, size=size)
        return WanVideoPipeline.from_pretrained(folder, device="cpu")

    return make


def pictures_of(size):
    ends = {"input_image": PICTURE, "end_image": PICTURE.rotate(90)}
    return ends if size == "tiny-flf2v" else {"input_image": PICTURE}


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("mode", ["effi_AMF", "AMF", "FlowMotion"])
def test_every_image_model_is_guided_in_every_mode(pipeline, size, mode):
    pipe = pipeline(size)
    arguments = {**pictures_of(size), "input_video": CLIP, **SMALL, "mode": mode}
    if mode != "effi_AMF":
        arguments["motion"] = {name: MOTION[name] for name in ("guided_steps", "inner_steps", "lr")}
        arguments["motion"] |= {"block": 1, "sf": 2} if mode == "AMF" else {}
    guided = pipe("a cat", **arguments)
    free = pipe("a cat", **{**arguments, "mode": "No_transfer", "motion": None})
    assert guided.isfinite().all()
    assert not torch.equal(guided[:, :, 1:], free[:, :, 1:])
    if size == "tiny-ti2v":
        with torch.no_grad():
            first = pipe.vae.encode(picture_to_tensor(PICTURE, 64, 64)[:, :, None], tiled=True)
        assert torch.equal(guided[:, :, :1], first)


def conditions(pipe, size):
    """The conditions of picture and reference of a model, and the reference's latents."""
    pixels = video_to_tensor(CLIP, 9, 64, 64)
    first, last = picture_to_tensor(PICTURE, 64, 64), picture_to_tensor(PICTURE.rotate(90), 64, 64)
    with torch.no_grad():
        clean = pipe.vae.encode(pixels)
        if size == "tiny-ti2v":
            encoded = [pipe.vae.encode(frame[:, :, None]) for frame in (first, pixels[:, :, 0])]
            return [ImageCondition(first_frame=frame) for frame in encoded], clean
        two = size == "tiny-flf2v"
        ends = [(first, last if two else None), (pixels[:, :, 0], pixels[:, :, -1] if two else None)]
        found = []
        for begin, end in ends:
            clip = None
            if pipe.dit.has_image_input:
                seen = [begin] if end is None else [begin, end]
                clip = torch.cat([pipe.models.image_encoder.encode_image(frame) for frame in seen], dim=1)
            y = image_condition(pipe.vae, begin, 9, end)
            found.append(ImageCondition(y=y, clip_feature=clip, first_frame=y[:, 4:, :1]))
    return found, clean


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("coarse", [1, 2])
def test_a_guided_step_reads_each_side_with_its_own_frames(pipeline, size, coarse):
    """The loss equals one that is computed here from the DiT's queries and keys."""
    pipe = pipeline(size)
    (own, of_reference), clean = conditions(pipe, size)
    if coarse == 2 and size == "tiny-ti2v":  # whose grid of 2 x 2 tokens has no coarser one
        return
    torch.manual_seed(3)
    noise, latents = torch.randn_like(clean), own.hold(torch.randn_like(clean))
    context, null = torch.randn(2, 1, 5, pipe.dit.text_dim).unbind()
    sigma, guidance = 0.8, MotionGuidance(mode="AMF", block=1, sf=2, inner_steps=1, coarse=coarse)
    step = {"sigma": sigma, "timestep": 800.0, "context": context, "null_context": null, "guidance": guidance}
    pair = {"condition": own, "reference_condition": of_reference}
    moved, record = guided_step(pipe.dit, latents, reference=clean, noise=noise, **step, **pair)

    level = sigma / (coarse - (coarse - 1) * sigma)

    def flow(x, text, condition):
        mean = lambda t: torch.nn.functional.avg_pool3d(t, (1, coarse, coarse))  # noqa: E731
        x = mean(x) / (1 - sigma + sigma / coarse)
        timestep, arguments = torch.tensor([1000 * level]), {}
        if condition.y is None:
            x = torch.cat([condition.first_frame, x[:, :, 1:]], dim=2)
            timestep = torch.tensor([[0.0, *[1000 * level] * (x.shape[2] - 1)]])
        else:
            arguments = {"y": mean(condition.y), "clip_feature": condition.clip_feature}
        q, k = pipe.dit.features(x, timestep, text, block=1, **arguments)
        return attention_motion_flow(q[0], k[0], sf=2, tau=1.0)

    with torch.no_grad():
        seen = flow(latents, context, own)
        truth = flow((1 - sigma) * clean + sigma * noise, null, of_reference)
        other = flow((1 - sigma) * clean + sigma * noise, null, own)
    assert not torch.allclose(truth, other)
    frames = clean.shape[2]
    pairs = [(i, j) for i in range(frames) for j in range(i, min(i + 2, frames))]
    squares = (seen - truth).square().sum(-1).flatten(1).mean(1)
    weights = torch.tensor([1.0 if i == j else 0.8 for i, j in pairs])
    loss = 5 * 1560 * coarse**2 * (squares * weights).mean().item()
    assert record.losses[0] == pytest.approx(loss, rel=1e-4)
    fixed = [0, frames - 1] if size == "tiny-flf2v" else [0]
    assert torch.equal(moved[:, :, fixed], latents[:, :, fixed])
    free = [frame for frame in range(frames) if frame not in fixed]
    assert all(not torch.equal(moved[:, :, frame], latents[:, :, frame]) for frame in free)


@pytest.mark.parametrize("size", KINDS)
def test_the_reference_itself_has_no_loss(pipeline, size):
    """With the reference's own frames, its noised latents and the empty prompt, both sides are equal."""
    pipe = pipeline(size)
    (own, condition), clean = conditions(pipe, size)
    torch.manual_seed(4)
    noise, null = torch.randn_like(clean), torch.randn(1, 5, pipe.dit.text_dim)
    latents = 0.2 * clean + 0.8 * noise
    guidance = MotionGuidance(mode="AMF", block=1, sf=2, inner_steps=1)
    step = {"sigma": 0.8, "timestep": 800.0, "context": null, "null_context": null, "guidance": guidance}
    for other, equal in ((condition, True), (own, False)):
        pair = {"condition": condition, "reference_condition": other}
        _, record = guided_step(pipe.dit, latents, reference=clean, noise=noise, **step, **pair)
        assert (record.losses[0] == 0) == equal


def test_a_guided_picture_run_continues_with_the_same_results(pipeline, tmp_path):
    pipe = pipeline("tiny-ti2v")
    arguments = {"input_image": PICTURE, "input_video": CLIP, **SMALL}
    whole = pipe("a cat", **arguments)

    def stop(running, step, _timestep, _kwargs):
        if step == 0:
            running.interrupt()

    saving = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 1}
    pipe("a cat", **arguments, **saving, callback_on_step_end=stop)
    with pytest.raises(ValueError, match="differs in input_image"):
        pipe("a cat", **{**arguments, "input_image": PICTURE.rotate(180)}, **saving)
    assert torch.equal(pipe("a cat", **arguments, **saving), whole)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(size, *arguments) -> (exit code, stderr), in a folder with ref.mp4 and me.png."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_video([frame.resize((64, 64)) for frame in CLIP], "ref.mp4", fps=12, quality=9)
    PICTURE.save("me.png")
    PICTURE.rotate(180).save("other.png")
    motion = ["--motion-guided-steps", "2", "--motion-inner-steps", "2", "--motion-block", "1"]
    motion += ["--motion-window", "1", "--motion-tile", "1,1", "--sf", "2"]
    small = "--height 64 --width 64 --num-frames 9 --num-inference-steps 3 --denoising-strength 1"

    def call(size, name, *arguments):
        if not (tmp_path / size).exists():
            write_checkpoint(tmp_path / size, size=size)
        shared = ["--model", str(tmp_path / size), *small.split(), *motion, "--device", "cpu", "-q"]
        code = main([name, *arguments, *shared])
        return code, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_the_command_makes_repeats_and_batches_a_video_of_a_picture(command, capsys):
    asked = ["transfer", "ref.mp4", "--prompt", "a cat", "--seed", "1", "-o", "a.mp4"]
    code, problem = command("tiny-ti2v", *asked, "--image", "me.png")
    assert code == 0, problem
    record = read_record("a.mp4")
    assert record.pictures["input_image"]["path"].endswith("me.png")
    pipe = WanVideoPipeline.from_pretrained("tiny-ti2v", device="cpu")
    again = {**record.call_arguments(), "input_video": VideoData("ref.mp4"), "progress_bar_cmd": None}
    (video,) = pipe.run(**again, input_image="me.png")
    assert sha256_of_frames(video.frames) == record.video["frames_sha256"]
    assert main(["transfer", "--from", "a.mp4.json", "-o", "again.mp4", "-q"]) == 0
    assert read_record("again.mp4").video["frames_sha256"] == record.video["frames_sha256"]
    code, problem = command("tiny-ti2v", *asked, "--image", "other.png")
    assert code == 2
    assert "input_image is not the recorded one" in problem
    PICTURE.rotate(180).save("me.png")
    assert main(["transfer", "--from", "a.mp4.json", "-o", "third.mp4", "-q"]) == 2
    assert "the run cannot be repeated: input_image is not the recorded one" in capsys.readouterr().err

    row = {"reference": "ref.mp4", "prompt": "a cat", "seed": 1}
    rows = [{**row, "image": name, "output": f"{name}.mp4"} for name in ("me.png", "other.png")]
    with open("jobs.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    code, problem = command("tiny-ti2v", "batch", "jobs.jsonl", "-o", "out")
    assert code == 0, problem
    first, second = (
        read_record(f"out/{name}.mp4").video["frames_sha256"] for name in ("me.png", "other.png")
    )
    assert first == second != record.video["frames_sha256"]


@pytest.mark.slow
def test_a_picture_alone_is_animated_by_the_embedded_model_that_takes_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data, steps = Path(__file__).parent.parent / "examples" / "data", ["--num-inference-steps", "3"]
    given = ["transfer", str(data / "bounce.mp4"), "--image", str(data / "fox.png"), "-o", "fox.mp4"]
    assert main([*given, *steps, "--models-dir", str(tmp_path), "--device", "cpu", "-q"]) == 0
    record = read_record("fox.mp4")
    assert (Path(record.model["folder"]).name, record.prompt) == ("Wan2.2-TI2V-nano", "")
    shown = (VideoData("fox.mp4")[0], Image.open(data / "fox.png"))
    first, picture = (np.asarray(frame.resize((64, 64)).convert("RGB"), float) for frame in shown)
    assert np.abs(first - picture).mean() < 12


@pytest.mark.slow
def test_pictures_that_do_not_fit_are_told_before_a_video_is_made(command, tmp_path):
    given = ["--prompt", "a cat", "-o", "a.mp4"]
    for size, arguments, message in (
        ("tiny-i2v", [], "needs input_image"),
        ("tiny", ["--image", "me.png"], "takes no input_image"),
        ("tiny-ti2v", ["--image", "ref.mp4"], "cannot be read as an image"),
        ("tiny-ti2v", ["--image", "none.png"], "none.png"),
        ("tiny-ti2v", ["--image", "me.png", "--end-image", "me.png"], "takes no end_image"),
    ):
        code, problem = command(size, "transfer", "ref.mp4", *arguments, *given)
        assert code in (1, 2)
        assert message in problem
        assert not (tmp_path / "a.mp4").exists()


@pytest.mark.slow
def test_the_page_takes_a_picture(command, tmp_path):
    command("tiny-ti2v", "transfer", "--mode", "No_transfer")  # writes the checkpoint
    limits = UploadLimits(pixels=5000)
    session = open_session(
        "tiny-ti2v",
        tmp_path,
        LoadOptions(device="cpu"),
        output_dir=tmp_path / "videos",
        cache=tmp_path,
        limits=limits,
    )
    assert session.open()[0].models.takes_picture
    kept = keep_picture(tmp_path / "me.png", tmp_path, session.references, limits)
    assert Image.open(kept).tobytes() == PICTURE.tobytes()
    small = {
        "prompt": "a cat",
        "seed": 1,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 3,
    }
    request = checked_request({**small, "mode": "No_transfer"})
    plain = make_video(session, request, None, QueuedJob()).record
    run = make_video(session, request, None, QueuedJob(), {"input_image": kept}).record
    assert run.pictures["input_image"]["path"] == str(kept)
    assert run.video["frames_sha256"] != plain.video["frames_sha256"]

    Image.new("RGB", (80, 80)).save("large.png")
    Path("text.png").write_text("no picture")
    for name, problem in (
        ("large.png", "more than 5000 pixels"),
        ("text.png", "cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=problem):
            keep_picture(tmp_path / name, tmp_path, session.references, limits)
    with pytest.raises(ValueError, match="is not a file that was uploaded here"):
        keep_picture(tmp_path / "me.png", tmp_path / "tiny-ti2v", session.references, limits)
