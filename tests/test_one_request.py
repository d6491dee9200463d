"""One request gives one run, whichever way it is made: by the pipeline's call, the command, a batch file, the
page. The records agree in all but times and paths, and so do the frames.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.cli.main import main
from diffsynth.configs.checkpoints import PUBLISHED, PUBLISHED_DEFAULTS, checkpoint_folder
from diffsynth.configs.defaults import published_defaults
from diffsynth.configs.options import FileOptions, LoadOptions
from diffsynth.configs.resolve import ReferenceFacts, resolve
from diffsynth.pipelines import wan_video
from diffsynth.pipelines.components import Components
from diffsynth.pipelines.generate import GeneratedVideo
from diffsynth.planning.sizes import published_sizes
from diffsynth.runs.cost import RunCost
from diffsynth.runs.record import describe_model, describe_reference, make_record, read_record
from diffsynth.testing import write_checkpoint, write_clip
from diffsynth.webui.queue import QueuedJob
from diffsynth.webui.requests import checked_request
from diffsynth.webui.session import make_video, open_session
from diffsynth.webui.uploads import UploadLimits

pytestmark = pytest.mark.slow

ON_CPU = LoadOptions(device="cpu")
WAYS = ("call", "command", "batch", "page")
OF_THE_MACHINE = ("time_gen", "time_guidance", "stage_seconds", "peak_memory")  # of a record's cost


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch):
    """What `WanVideoPipeline.run` returned, call after call."""
    videos, run = [], WanVideoPipeline.run

    def noted(*given, **named):
        returned = run(*given, **named)
        videos.extend(returned)
        return returned

    monkeypatch.setattr(WanVideoPipeline, "run", noted)
    return videos


def by_call(model, clip, request, numbers, _folder):
    """The pipeline's call, and a record made of what it returned."""
    pipe = WanVideoPipeline.from_pretrained(model, device="cpu")
    video = None if clip is None else VideoData(clip)
    (run,) = pipe.run(**request, input_video=video, motion=numbers or None, progress_bar_cmd=iter)
    return make_record(
        run.frames,
        prompt=run.prompt,
        negative_prompt=run.negative_prompt,
        preset=request["preset"],
        options=run.options,
        cost=run.cost,
        models=pipe.residency.models,
        device=pipe.device,
        reference=clip and describe_reference(clip, len(video), video.fps),
        model=describe_model(checkpoint_folder(model), asdict(ON_CPU)),
        file=FileOptions(fps=video.fps if video else pipe.defaults["fps"]),
    )


def by_command(model, clip, request, numbers, folder):
    """`fastvmt transfer`."""
    named = {**request, **{f"motion_{name}": value for name, value in numbers.items()}}
    words = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]
    out = folder / "command.mp4"
    reference = [] if clip is None else [clip]
    assert main(["transfer", *reference, *words, "--model", model, "--device", "cpu", "-o", out, "-q"]) == 0
    return read_record(out)


def by_batch(model, clip, request, numbers, folder):
    """A line of a jobs file for `fastvmt batch`."""
    job = {**request, "motion": numbers, "output": "batch.mp4"}
    if clip is not None:
        job["reference"] = str(clip)
    (folder / "jobs.jsonl").write_text(json.dumps(job))
    arguments = ["--model", model, "--device", "cpu", "-o", folder / "videos", "-q"]
    assert main(["batch", folder / "jobs.jsonl", *arguments]) == 0
    return read_record(folder / "videos" / "batch.mp4")


def by_page(model, clip, request, numbers, folder):
    """What a click on Generate does, but for single numbers of motion, for which the form has no fields."""
    session = open_session(
        str(model), "models", ON_CPU, output_dir=folder / "page", cache=folder, limits=UploadLimits()
    )
    checked = checked_request(request) | {f"motion_{name}": value for name, value in numbers.items()}
    return make_video(session, checked, clip, QueuedJob()).record


def all_records(model, clip, request, numbers, folder):
    makers = dict(zip(WAYS, (by_call, by_command, by_batch, by_page), strict=True))
    return {way: make(model, clip, request, numbers, folder) for way, make in makers.items()}


def what_was_run(record):
    """A record without times, paths and the hash of a batch's job."""
    told = record.to_json()
    del told["created"], told["job"], told["model"]["folder"]
    if told["reference"] is not None:
        del told["reference"]["path"]
    told["cost"] = {name: value for name, value in told["cost"].items() if name not in OF_THE_MACHINE}
    return told


def check_alike(records):
    first = what_was_run(records["call"])
    for way in WAYS[1:]:
        other = what_was_run(records[way])
        for part, value in first.items():
            assert other[part] == value, f"{part} of the {way}"
        assert other.keys() == first.keys()


def test_a_request_gives_the_same_frames_and_record_by_call_command_batch_and_page(tmp_path, made):
    clip = write_clip(tmp_path / "ref.mp4", num_frames=7, height=64, width=96)
    request = {
        "prompt": 'a "blue" star; # = ü',
        "mode": "effi_AMF",
        "preset": "fast",
        "motion_scale": 1.5,
        "num_inference_steps": 2,
        "num_frames": 5,
        "height": 50,
        "width": 61,
        "seed": 7,
    }
    records = all_records("nano", clip, request, {"tau": 1.5}, tmp_path)
    check_alike(records)
    options = records["page"].options
    assert (options["height"], options["width"], options["num_frames"]) == (56, 64, 5)
    motion = options["motion"]
    assert (motion["tau"], motion["inner_steps"], motion["guided_steps"]) == (1.5, 1, 2)
    assert motion["lr"] == pytest.approx([0.27, 0.27])
    assert len(records["page"].cost["losses"]) == 2
    frames = [np.stack([np.asarray(frame) for frame in video.frames]) for video in made]
    assert len(frames) == len(WAYS)
    assert all(np.array_equal(frames[0], other) for other in frames[1:])
    files = [tmp_path / "command.mp4", tmp_path / "videos" / "batch.mp4", *(tmp_path / "page").glob("*.mp4")]
    pixels = [np.stack([np.asarray(frame) for frame in VideoData(file)]) for file in files]
    assert len(pixels) == 3
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small checkpoint that resolves as Wan2.1-T2V-1.3B does; its runs end once they are resolved."""
    sizes = published_sizes("1.3b")
    published_facts = sizes.facts()

    def resolved(_models, prompts, _pixels, _pictures, options, *_rest, **_others):
        frames = [Image.new("RGB", (options.width, options.height))] * 2
        cost = RunCost(options.seed, options.mode, options.num_inference_steps)
        return [
            GeneratedVideo(
                frames=frames, latents=torch.zeros(1), prompt=p, negative_prompt=n, options=options, cost=cost
            )
            for p, n in prompts
        ]

    monkeypatch.setattr(Components, "facts", lambda _models: published_facts)
    # What is left to the memory at hand stays open.
    monkeypatch.setattr(wan_video.Ladder, "begin", lambda _ladder, run, *_budget, **_reference: run)
    monkeypatch.setattr(wan_video, "generate", resolved)
    return write_checkpoint(tmp_path / "models" / PUBLISHED["1.3b"].folder), published_facts


@pytest.mark.parametrize(
    ("size", "request_", "numbers", "expected"),
    [
        (None, {"mode": "No_transfer", "preset": "fast", "height": 475}, {}, (480, 832, 81)),
        ((120, 90), {"mode": "AMF", "preset": "balanced", "motion_scale": 2.0}, {"tau": 0.5}, (832, 480, 6)),
    ],
)
def test_the_defaults_of_a_published_model_are_resolved_alike(
    published, tmp_path, size, request_, numbers, expected
):
    model, facts = published
    clip = None if size is None else write_clip(tmp_path / "ref.mp4", 6, *size)
    request = {"prompt": "a red fox", "seed": 3, **request_}
    reference = None if size is None else ReferenceFacts(num_frames=6, height=size[0], width=size[1])
    asked = {name: value for name, value in request.items() if name != "prompt"}
    run = resolve({**asked, "motion": numbers}, published_defaults("1.3b"), reference, facts)
    records = all_records(model, clip, request, numbers, tmp_path)
    check_alike(records)
    record = records["command"]
    assert record.options == json.loads(json.dumps({**run.to_json(), "align": "none"}))
    assert tuple(record.options[name] for name in ("height", "width", "num_frames")) == expected
    assert record.video["fps"] == PUBLISHED_DEFAULTS["fps"]
    assert record.negative_prompt == PUBLISHED_DEFAULTS["negative_prompt"]
