"""The record of a run: what is in it, that it repeats the run to the bit, and what it refuses."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth import ModelManager, VideoData, WanVideoPipeline, __version__
from diffsynth.cli.main import main
from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.options import FileOptions, RunOptions
from diffsynth.data.files import sha256_of_file
from diffsynth.motion import MotionGuidance
from diffsynth.runs.identity import sha256_of_frames, sha256_of_video, weights_fingerprint
from diffsynth.runs.record import (
    LARGEST_METADATA,
    RunRecord,
    describe_model,
    make_record,
    read_record,
    record_path,
    save_with_metadata,
    write_record,
)
from diffsynth.testing import write_checkpoint, write_clip

RUN = [
    "--prompt",
    'a "cat"; # = \\ ü',
    "--steps",
    "3",
    "--motion-guided-steps",
    "2",
    "--motion-lr",
    "0.1,0.05",
]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run_folder(tiny_checkpoint, tmp_path_factory):
    """A folder with ref.mp4, out.mp4 and out.mp4.json. Read only."""
    folder = tmp_path_factory.mktemp("run")
    clip = write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        code = main(["transfer", clip, *RUN, "--model", tiny_checkpoint, "-o", folder / "out.mp4", "-q"])
    assert code == 0
    return folder


@pytest.fixture
def record(run_folder):
    return read_record(run_folder / "out.mp4.json")


def changed(record, tmp_path, **changes):
    """A record file like `record` but for some fields."""
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**record.to_json(), **changes}))
    return path


def test_the_record_holds_everything_that_made_the_video(run_folder, record, tiny_checkpoint):
    assert record.prompt == RUN[1]
    assert set(record.options) == {field.name for field in fields(RunOptions)}
    assert set(record.options["motion"]) == {field.name for field in fields(MotionGuidance)}
    assert record.options["motion"]["lr"] == [0.1, 0.05]
    assert record.options["num_inference_steps"] == 3
    assert record.options["seed"] >= 0
    clip = run_folder / "ref.mp4"
    assert record.reference == {
        "path": str(clip.resolve()),
        "sha256": sha256_of_video(clip),
        "frames": 5,
        "fps": 15.0,
        "ref_fps": None,
        "start": None,
        "end": None,
        "fit": "crop",
    }
    files = record.model["files"]
    on_disk = {
        p.relative_to(tiny_checkpoint).as_posix(): p for p in tiny_checkpoint.rglob("*") if p.is_file()
    }
    assert {name: facts["bytes"] for name, facts in files.items()} == {
        name: path.stat().st_size for name, path in on_disk.items()
    }
    assert files["config.json"]["sha256"] == sha256_of_file(tiny_checkpoint / "config.json")
    models = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu").residency.models
    assert record.model["weights"] == {name: weights_fingerprint(model) for name, model in models.items()}
    assert record.versions["fastvmt"] == __version__
    assert record.device["type"] in ("cpu", "cuda")
    cost = record.cost
    assert (len(cost["losses"]), cost["gradient_evaluations"]) == (2, 2 * 4)
    assert len(cost["losses"][0]) == 4
    assert cost["peak_memory"] > 0
    assert set(cost["stage_seconds"]) == {"encode text", "encode video", "decode"}
    video = VideoData(run_folder / "out.mp4")
    assert (record.video["frames"], record.video["width"], record.video["fps"]) == (5, 32, video.fps)


def test_the_video_holds_the_same_record_as_the_file_beside_it(run_folder, record):
    assert read_record(run_folder / "out.mp4") == record


@pytest.mark.parametrize("source", ["out.mp4", "out.mp4.json"])
def test_a_run_repeats_from_its_record_to_the_bit(run_folder, record, tmp_path, capsys, source):
    again = tmp_path / "again.mp4"
    assert main(["transfer", "--from", run_folder / source, "-o", again, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["same_frames"] is True
    repeated = read_record(again)
    assert repeated.video["frames_sha256"] == record.video["frames_sha256"]
    assert repeated.options == record.options
    assert repeated.cost["losses"] == record.cost["losses"]
    pixels = [np.stack([np.asarray(f) for f in VideoData(p)]) for p in (again, run_folder / "out.mp4")]
    assert np.array_equal(*pixels)


def test_another_seed_gives_other_frames_and_that_is_said(record, tmp_path, capsys):
    other = changed(record, tmp_path, options={**record.options, "seed": record.options["seed"] ^ 1})
    assert main(["transfer", "--from", other, "-o", tmp_path / "again.mp4"]) == 0
    captured = capsys.readouterr()
    assert "the frames are not as recorded" in captured.err
    assert "bit-identical" not in captured.out


def test_a_changed_reference_is_refused_unless_forced(run_folder, tmp_path, capsys):
    other = write_clip(tmp_path / "other.mp4", num_frames=5, height=32, width=32, velocity=(2, 2))
    arguments = ["transfer", other, "--from", run_folder / "out.mp4.json", "-o", tmp_path / "again.mp4"]
    assert main(arguments) == 2
    assert f"reference {other} is not the recorded one (its sha256 differs)" in capsys.readouterr().err
    assert not (tmp_path / "again.mp4").exists()
    assert main([*arguments, "--force"]) == 0
    assert "continuing because of --force" in capsys.readouterr().err


def test_a_moved_reference_is_asked_for_and_taken_from_its_new_place(run_folder, record, tmp_path, capsys):
    gone = changed(record, tmp_path, reference={**record.reference, "path": "/nowhere/ref.mp4"})
    assert main(["transfer", "--from", gone, "-o", tmp_path / "again.mp4"]) == 2
    assert f"name its new place: fastvmt transfer REF --from {gone}" in capsys.readouterr().err
    moved = shutil.copy(run_folder / "ref.mp4", tmp_path / "moved.mp4")
    assert main(["transfer", moved, "--from", gone, "-o", tmp_path / "again.mp4"]) == 0
    assert "every frame is bit-identical to the recorded one" in capsys.readouterr().out


def test_changed_missing_and_new_model_files_are_refused_by_name(
    run_folder, tiny_checkpoint, tmp_path, capsys
):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    arguments = ["transfer", "--from", run_folder / "out.mp4", "-o", tmp_path / "again.mp4", "--model", model]
    config = model / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    (model / "google/umt5-xxl/special_tokens_map.json").unlink()
    (model / "extra.json").write_text("{}")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "model file config.json is not the recorded one" in said
    assert "model file google/umt5-xxl/special_tokens_map.json is missing" in said
    assert "model file extra.json is new" in said


def test_same_sized_weights_of_another_content_are_refused(run_folder, tiny_checkpoint, tmp_path, capsys):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    other = write_checkpoint(tmp_path / "other", seed=1)
    shutil.copy(other / "Wan2.1_VAE.pth", model / "Wan2.1_VAE.pth")
    arguments = ["transfer", "--from", run_folder / "out.mp4", "-o", tmp_path / "again.mp4", "--model", model]
    assert main(arguments) == 2
    refused = "the run cannot be repeated: the weights of vae are not the recorded ones"
    assert refused in capsys.readouterr().err


def test_a_record_of_the_files_hashes_alone_is_compared_by_size_and_repeats(record, tmp_path):
    """Before weights had a fingerprint, records held the sha256 of each file."""
    files = {name: {"sha256": "0" * 64, **facts} for name, facts in record.model["files"].items()}
    older = {name: value for name, value in record.model.items() if name != "weights"} | {"files": files}
    path = changed(record, tmp_path, model=older)
    assert main(["transfer", "--from", path, "-o", tmp_path / "again.mp4", "-q"]) == 0


def test_options_beside_a_record_are_refused(run_folder, tmp_path, capsys):
    arguments = ["transfer", "--from", run_folder / "out.mp4", "-o", tmp_path / "a.mp4", "--seed", "3"]
    assert main([*arguments, "--motion-tau", "2"]) == 2
    assert "--from repeats a run as it was; it takes no --seed, --motion-tau" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no record of a run: it is not valid JSON"),
        ("[1]", "is no record of a run: it lacks 'fastvmt_record'"),
        ('{"fastvmt_record": 7}', "is a record of version 7; 1 and 2 are read here"),
        ('{"fastvmt_record": 1}', "is no whole record: cost, created, device"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "record.json"
    path.write_text(content)
    assert main(["transfer", "--from", path, "-o", tmp_path / "a.mp4"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": []}, "options must be an object"),
        ({"video": {}}, "video must be an object with frames, height, width, fps, quality, frames_sha256"),
        ({"reference": {"path": "x"}}, "reference must be an object with path, sha256"),
        ({"options": {"speed": 32}}, "options has no field speed"),
        ({"model": {"folder": ".", "files": {}, "setup": {"gpu": 1}}}, "the record's setup has gpu"),
    ],
)
def test_a_damaged_record_is_refused_by_name(record, tmp_path, capsys, changes, message):
    if "model" in changes:
        changes = {"model": {**changes["model"], "folder": record.model["folder"]}}
    assert main(["transfer", "--from", changed(record, tmp_path, **changes), "-o", tmp_path / "a.mp4"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["motion", "cache"])
def test_a_motion_or_cache_that_is_no_object_is_refused(record, name):
    wrong = replace(record, options={**record.options, name: "fast"})
    with pytest.raises(ValueError, match=f"options: {name} must be an object or null; got 'fast'"):
        wrong.call_arguments()


def test_a_missing_record_and_a_video_without_one_are_refused(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record .*none\.json does not exist"):
        read_record(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"ref\.mp4 holds no record of a run"):
        read_record(run_folder / "ref.mp4")


def test_a_cache_comes_back_from_the_record_as_it_was(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "progress_bar_cmd": iter}
    (made,) = pipe.run("a cat", **small, cache="first_block", cache_threshold=0.3, cfg_interval=(0.0, 0.5))
    frames = made.frames
    record = make_record(
        frames, prompt="a cat", negative_prompt="", preset="exact", options=made.options, cost=made.cost,
        models=pipe.residency.models, device=pipe.device, reference=None,
        model=describe_model(tiny_checkpoint, {}), file=FileOptions(fps=15),
    )  # fmt: skip
    call = RunRecord.from_json(json.loads(json.dumps(record.to_json()))).call_arguments()
    assert call["cache"] == CacheOptions(name="first_block", threshold=0.3)
    assert (call["cfg_interval"], call["tile_size"], call["mode"]) == ((0.0, 0.5), (30, 52), "No_transfer")
    again = pipe(**call, progress_bar_cmd=iter)
    assert sha256_of_frames(again) == record.video["frames_sha256"] == sha256_of_frames(frames)


def test_a_record_too_long_for_metadata_stands_beside_the_video_alone(record, tmp_path):
    long = replace(record, prompt="x" * LARGEST_METADATA)
    frames = [Image.new("RGB", (32, 32))] * 2
    video = save_with_metadata(frames, tmp_path / "out.mp4", long)
    with pytest.raises(ValueError, match="holds no record"):
        read_record(video)
    assert write_record(long, video) == record_path(video) == Path(f"{video}.json")
    assert read_record(record_path(video)) == long


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv", ".avi"])
def test_every_kind_of_video_file_holds_the_record(record, tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32))] * 2
    video = save_with_metadata(frames, tmp_path / f"out{suffix}", record)
    assert read_record(video) == record


def test_a_folder_of_images_has_a_hash_of_names_and_contents(tmp_path):
    for index in range(2):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{index}.png")
    before = sha256_of_video(tmp_path)
    assert before == sha256_of_video(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "2.png")
    assert sha256_of_video(tmp_path) != before


def test_a_lora_is_in_the_record_and_in_the_repetition(run_folder, record, tiny_checkpoint, tmp_path, capsys):
    """A LoRA changes the video, its file and strength are recorded, and a changed file is refused."""
    layer = "diffusion_model.blocks.0.ffn.0"
    dit = ModelManager(device="cpu")
    dit.load_models([tiny_checkpoint])
    rows, columns = dit.fetch_model("wan_video_dit").blocks[0].ffn[0].weight.shape
    generator = torch.Generator().manual_seed(0)
    lora = tmp_path / "style=soft.safetensors"
    parts = {
        f"{layer}.lora_A.weight": torch.randn(4, columns, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(rows, 4, generator=generator),
    }
    save_file(parts, lora)
    seed = ["--seed", record.options["seed"]]
    made = ["transfer", run_folder / "ref.mp4", *RUN, *seed, "--model", tiny_checkpoint]
    assert main([*made, "--lora", f"{lora}=0.5", "-o", tmp_path / "out.mp4", "-q"]) == 0
    new = read_record(tmp_path / "out.mp4")
    assert new.model["setup"]["loras"] == {str(lora): 0.5}
    assert new.model["files"][str(lora)]["bytes"] == lora.stat().st_size
    assert new.video["frames_sha256"] != record.video["frames_sha256"]

    capsys.readouterr()
    assert main(["transfer", "--from", tmp_path / "out.mp4", "-o", tmp_path / "again.mp4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_frames"] is True
    save_file({key: 2 * value for key, value in parts.items()}, lora)
    assert main(["transfer", "--from", tmp_path / "out.mp4", "-o", tmp_path / "third.mp4"]) == 2
    assert "the weights of dit are not the recorded ones" in capsys.readouterr().err
    assert main([*made, "--lora", tmp_path / "none.safetensors", "-o", tmp_path / "fourth.mp4"]) == 2
    assert "none.safetensors does not exist" in capsys.readouterr().err
