"""`fastvmt` at its edges: parts of references, kinds of outputs, and what is checked before a run."""

import io
import json
import shutil
import subprocess
import sys
from shlex import quote

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData, WanVideoPipeline, save_frames, save_video
from diffsynth.cli import transfer as transfer_command
from diffsynth.cli.main import main
from diffsynth.data import ffmpeg
from diffsynth.jobs import publish
from diffsynth.runs.identity import sha256_of_frames
from diffsynth.runs.latents import latents_until_done
from diffsynth.runs.record import read_record, record_path
from diffsynth.testing import write_clip

QUICK = [
    "--steps",
    "2",
    "--motion-guided-steps",
    "1",
    "--motion-inner-steps",
    "1",
    "--seed",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 30 frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    frames = list(VideoData(write_clip(folder / "slow.mp4", num_frames=60, height=48, width=32)))
    return save_video(frames, folder / "ref.mp4", fps=30)


@pytest.fixture
def transfer(tiny_checkpoint, clip):
    def run(output, *more, reference=clip):
        words = ["transfer", reference, "--prompt", "a cat", "--model", tiny_checkpoint, "-o", output, *QUICK]
        return main([*words, "--height", 32, "--width", 32, *more])

    return run


@pytest.mark.slow
def test_a_part_of_the_reference_is_used_recorded_and_repeated(transfer, tmp_path, capsys):
    part = ("--start", 0.5, "--end", 1.5, "--ref-fps", 5, "--fit", "pad")
    assert transfer(tmp_path / "a.mp4", *part) == 0
    record = read_record(tmp_path / "a.mp4")
    used = {name: record.reference[name] for name in ("ref_fps", "start", "end", "fit")}
    assert used == {"ref_fps": 5.0, "start": 0.5, "end": 1.5, "fit": "pad"}
    assert (record.reference["frames"], record.video["frames"], record.video["fps"]) == (5, 5, 5.0)
    assert main(["transfer", "--from", tmp_path / "a.mp4.json", "-o", tmp_path / "b.mp4"]) == 0
    assert "every frame is bit-identical to the recorded one" in capsys.readouterr().out
    assert transfer(tmp_path / "c.mp4", *part[:6]) == 0  # cropped instead
    assert read_record(tmp_path / "c.mp4").video["frames_sha256"] != record.video["frames_sha256"]


def test_a_part_that_is_not_there_is_bad_usage(transfer, tmp_path, capsys):
    assert transfer(tmp_path / "a.mp4", "--start", 7) == 2
    assert "lies from start=7.0 to end=None; it lasts 2 s" in capsys.readouterr().err
    assert transfer(tmp_path / "a.mp4", "--fit", "zoom") == 2
    assert transfer(tmp_path / "a.mp4", "--ref-fps", 0) == 2


def test_what_is_left_out_and_cut_off_is_told(transfer, tmp_path, capsys):
    assert transfer(tmp_path / "a.mp4", "--num-frames", 5, "-v") == 0
    told = capsys.readouterr().err
    assert "the first 5 are used, 0.167 of its 2 seconds; reading it at 2.5 frames a second" in told
    assert "32x48 -> 32x32 cuts off 33 % of the height; fit pad or stretch keeps it" in told


@pytest.mark.slow
def test_a_batch_has_parts_of_references(tiny_checkpoint, clip, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    job = {"prompt": "a cat", "reference": str(clip), "height": 32, "width": 32, "steps": 2, "ref_fps": 5}
    jobs.write_text(
        json.dumps({**job, "output": "a.mp4"}) + "\n" + json.dumps({**job, "end": 1.0, "output": "b"})
    )
    command = ["batch", jobs, "-o", tmp_path / "out", "--model", tiny_checkpoint, *QUICK]
    assert main(command) == 0
    assert len(VideoData(tmp_path / "out" / "a.mp4")) == 10
    assert len(VideoData(image_folder=tmp_path / "out" / "b")) == 5
    assert main([*command, "--json"]) == 0  # both were done before


@pytest.mark.slow
def test_the_frames_are_the_same_in_every_lossless_kind(transfer, tmp_path):
    assert transfer(tmp_path / "a.mkv", "--lossless", "--num-frames", 5) == 0
    assert transfer(tmp_path / "png", "--num-frames", 5) == 0
    hashes = {
        sha256_of_frames(list(VideoData(tmp_path / "a.mkv"))),
        sha256_of_frames(list(VideoData(image_folder=tmp_path / "png"))),
        read_record(tmp_path / "png.json").video["frames_sha256"],
        read_record(tmp_path / "a.mkv").video["frames_sha256"],
    }
    assert len(hashes) == 1
    assert transfer(tmp_path / "png") == 2  # it has files in it


@pytest.mark.parametrize("name", ["a.webm", "a.gif"])
def test_webm_and_gif_are_outputs(transfer, tmp_path, name):
    assert transfer(tmp_path / name, "--num-frames", 5) == 0
    assert len(VideoData(tmp_path / name)) == 5
    assert read_record(tmp_path / f"{name}.json").video["frames"] == 5


@pytest.mark.slow
def test_sound_is_kept(transfer, clip, tmp_path):
    from imageio_ffmpeg import get_ffmpeg_exe

    sound = ["-f", "lavfi", "-i", "sine=d=2", "-map", "0:v", "-map", "1:a", "-c:v", "copy"]
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", clip, *sound, tmp_path / "ref.mp4"], check=True)
    assert transfer(tmp_path / "a.mp4", "--keep-audio", "--ref-fps", 5, reference=tmp_path / "ref.mp4") == 0
    assert "Audio:" in ffmpeg.run_ffmpeg(["-i", str(tmp_path / "a.mp4")])[1]
    assert transfer(tmp_path / "b.mp4", "--ref-fps", 5, reference=tmp_path / "ref.mp4") == 0
    assert "Audio:" not in ffmpeg.run_ffmpeg(["-i", str(tmp_path / "b.mp4")])[1]


@pytest.fixture
def no_load(monkeypatch):
    def load(*_given):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diffsynth.cli.transfer.load_pipeline", load)


@pytest.mark.usefixtures("no_load")
def test_no_ffmpeg_is_known_before_the_run(transfer, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    for more in ({"reference": folder}, {}):
        assert transfer(tmp_path / "a.mp4", **more) == 1
        assert "ffmpeg, which reads and writes videos, does not run" in capsys.readouterr().err
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho ffmpeg version 4.4.2-0ubuntu0.22.04.1 Copyright\n")
    old.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(old))
    assert transfer(tmp_path / "a.mp4", reference=folder) == 1
    assert "ffmpeg 4.4 is too old: 5.1 is needed" in capsys.readouterr().err


@pytest.mark.usefixtures("no_load")
def test_room_and_names_are_known_before_the_run(transfer, tmp_path, monkeypatch, capsys):
    assert transfer(tmp_path / f"{'a' * 250}.mp4") == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 2**14})())
    assert transfer(tmp_path / "a.mp4") == 2
    assert "has 0.0 MiB free; it may need" in capsys.readouterr().err


def test_a_file_that_goes_missing_during_a_run_is_no_bad_usage(transfer, tmp_path, monkeypatch, capsys):
    def gone(*_given, **_named):
        raise FileNotFoundError("the drive was pulled out")

    monkeypatch.setattr("diffsynth.jobs.task.make_record", gone)
    assert transfer(tmp_path / "a.mp4", "--num-frames", 5) == 1
    assert "the drive was pulled out" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_letter_loses_no_job(transfer, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    assert transfer(tmp_path / "лиса.mp4", "--num-frames", 5) == 0
    assert rb"\u043b\u0438\u0441\u0430.mp4: 5 frames" in raw.getvalue()


@pytest.mark.slow
def test_a_reference_without_motion_or_with_a_cut_is_told(transfer, tiny_checkpoint, tmp_path, capsys):
    still, cut, late = folders = tmp_path / "still", tmp_path / "cut", tmp_path / "late"
    for folder in folders:
        folder.mkdir()
    rng = np.random.default_rng(0)
    shots = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
    for index in range(9):
        Image.fromarray(shots[0]).save(still / f"{index}.png")
        Image.fromarray(shots[index >= 4]).save(cut / f"{index}.png")
        Image.fromarray(np.roll(shots[0] // 8, max(0, index - 4), axis=1)).save(late / f"{index}.png")
    assert transfer(tmp_path / "a.mp4", reference=still) == 0
    assert "nothing moves in the reference: there is no motion" in capsys.readouterr().err
    assert transfer(tmp_path / "b.mp4", "--num-frames", 9, reference=late) == 0
    assert "nothing moves in the reference before frame 5; start" in capsys.readouterr().err
    inspect = ["inspect", cut, "-o", tmp_path / "i", "--model", tiny_checkpoint, "--json", "--device", "cpu"]
    assert main([*inspect, "--height", 32, "--width", 32]) == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert (facts["cuts"], facts["still"]) == ([4], False)
    assert "the reference has a cut at frame 4" in told.err
    assert 0 <= facts["share_moving"] <= 1
    assert 0 <= facts["mean_displacement"] <= facts["largest_displacement"]


def test_a_saved_transfer_starts_four_ffmpeg_processes(transfer, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def noted(command, *args, **kwargs):
        started.extend([command] if "ffmpeg" in str(command[0]) else [])
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", noted)
    assert transfer(tmp_path / "a.mp4", "--num-frames", 5, "--resume") == 0
    assert len(started) <= 4, "\n".join(" ".join(map(str, c[1:])) for c in started)


@pytest.mark.slow
def test_latents_outlive_a_decoder_that_fails(transfer, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from diffsynth.pipelines import generate

    def broken(*_given):
        raise RuntimeError("the decoder broke")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "decode_latents", broken)
        assert transfer(tmp_path / "a.mp4", "--num-frames", 5) == 1
    (kept,) = tmp_path.glob("fastvmt-latents-*.safetensors")
    told = capsys.readouterr().err
    assert "the decoder broke" in told
    assert f"fastvmt decode {quote(str(kept))} -o OUT.mp4" in told
    assert main(["decode", kept, "-o", tmp_path / "b.mp4", "--model", tiny_checkpoint]) == 0
    assert len(VideoData(tmp_path / "b.mp4")) == 5
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(generate, "decode_latents", broken)
    with pytest.raises(RuntimeError, match="the decoder broke") as failed:
        pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=2, progress_bar_cmd=iter)
    assert failed.value.latents_path.is_file()


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_says_so(transfer, tmp_path, capsys, monkeypatch):
    out, state = tmp_path / "a.mp4", tmp_path / ".a.mp4.run"
    assert transfer(out, "--num-frames", 5, "--resume") == 0
    content, record = out.read_bytes(), record_path(out).read_text()
    record_path(out).unlink()  # as a kill between video and record leaves it
    state.mkdir()
    (state / "inputs.safetensors").write_bytes(b"left")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(transfer_command, "load_pipeline", None)
        assert transfer(out, "--num-frames", 5, "--resume") == 0
        assert transfer(out, "--num-frames", 5) == 0
    assert "was made before by the same request" in capsys.readouterr().out
    assert (out.read_bytes(), record_path(out).read_text()) == (content, record)
    assert not state.exists()
    assert transfer(out, "--num-frames", 5, "--motion-inner-steps", 2) == 2
    told = capsys.readouterr().err
    assert "exists, made by another request (motion_inner_steps was 1, and is 2); name another" in told
    again = ["transfer", "--from", record_path(out), "-o", tmp_path / "b.mp4"]
    assert [main(again), main(again)] == [0, 0]
    assert transfer(out, "--num-frames", 5, "--overwrite") == 0


@pytest.mark.slow
def test_a_damaged_or_foreign_output_is_told_and_kept_unless_overwrite(transfer, tmp_path, clip, capsys):
    for out in (tmp_path / "a.mp4", tmp_path / "b.gif"):
        assert transfer(out, "--num-frames", 5) == 0
        content, other = out.read_bytes(), clip.read_bytes()
        for damaged in (content[: len(content) // 2], b"", *((other,) if out.suffix == ".mp4" else ())):
            out.write_bytes(damaged)
            assert transfer(out, "--num-frames", 5) == 2
            assert f"{out} is damaged or was replaced (" in (told := capsys.readouterr().err)
            assert "--overwrite makes it again" in told
            assert out.read_bytes() == damaged
        assert transfer(out, "--num-frames", 5, "--overwrite") == 0
        assert transfer(out, "--num-frames", 5) == 0
    folder = tmp_path / "png"
    assert transfer(folder, "--num-frames", 5) == 0
    assert transfer(folder, "--num-frames", 5) == 0
    (folder / "00003.png").unlink()
    assert transfer(folder, "--num-frames", 5) == 2
    assert "its frames are not the recorded ones" in capsys.readouterr().err


@pytest.mark.slow
def test_decoding_again_does_nothing(transfer, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from diffsynth.cli import decode

    assert transfer(tmp_path / "a.mp4", "--num-frames", 5, "--checkpoint-dir", tmp_path / "state") == 0
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    pipe("a cat", **call, checkpoint_dir=tmp_path / "state", progress_bar_cmd=iter)
    (latents,) = (tmp_path / "state").glob("latents-*.safetensors")
    words = ["decode", latents, "-o", tmp_path / "b.mp4", "--model", tiny_checkpoint]
    assert main(words) == 0
    content = (tmp_path / "b.mp4").read_bytes()
    monkeypatch.setattr(decode, "load_vae", None)
    assert main(words) == 0
    assert "was made before by the same request" in capsys.readouterr().out
    assert (tmp_path / "b.mp4").read_bytes() == content
    assert main([*words, "--quality", 3]) == 2
    assert "exists; give another name" in capsys.readouterr().err
    (tmp_path / "b.mp4").write_bytes(content[: len(content) // 2])
    assert main(words) == 2
    assert "exists; give another name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_two_processes_that_write_the_same_file_leave_each_other_alone(tmp_path):
    script = """
import sys, time
from pathlib import Path
from diffsynth.data.files import unfinished
print("begun", flush=True)
sys.stdin.readline()
for _ in range(300):
    with unfinished(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as temporary:
        time.sleep(0.0005)
        assert temporary.exists()
"""
    for kind in ("file", "folder"):
        words = [sys.executable, "-c", script, tmp_path / f"a.{kind}", kind]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        both = [subprocess.Popen(words, **pipes) for _ in range(2)]
        assert [process.stdout.readline() for process in both] == ["begun\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait(600) for process in both] == [0, 0]


@pytest.mark.slow
def test_what_a_killed_process_left_goes_when_the_file_is_written_again(tmp_path):
    script = """
import sys, time
from pathlib import Path
from diffsynth.data.files import unfinished
with unfinished(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("begun", flush=True)
    time.sleep(600)
"""
    frames = [Image.new("RGB", (16, 16))] * 3
    writing = []
    for name in ("a.mp4", "pictures"):
        words = [sys.executable, "-c", script, tmp_path / name, "folder" if name == "pictures" else "file"]
        writing += [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert all(process.stdout.readline() == "begun\n" for process in writing[-2:])
    for killed in writing[::2]:
        killed.kill()
        killed.wait()
    assert len(list(tmp_path.iterdir())) == 4
    save_video(frames, tmp_path / "a.mp4")
    save_frames(frames, tmp_path / "pictures")
    # What the other two are writing stays; so does the file of another name.
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".writing-")]) == 2
    for process in writing[1::2]:
        process.kill()
        process.wait()
    save_video(frames, tmp_path / "a.mp4")
    shutil.rmtree(tmp_path / "pictures")
    save_frames(frames, tmp_path / "pictures")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "pictures"]


@pytest.mark.slow
def test_a_reader_of_the_output_that_goes_is_no_error(tiny_checkpoint, clip, tmp_path):
    words = [
        "transfer",
        clip,
        "--prompt",
        "a cat",
        "--model",
        tiny_checkpoint,
        "-o",
        tmp_path / "a.mp4",
        *QUICK,
    ]
    words += ["--height", "32", "--width", "32", "--num-frames", "5", "--json"]
    command = [sys.executable, "-m", "diffsynth.cli.main", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    told = process.stderr.read()
    assert (process.wait(), "Traceback" in told, "BrokenPipe" in told) == (0, False, False), told
    assert read_record(tmp_path / "a.mp4").video["frames"] == 5


KILLED = """
import os, signal, sys
from diffsynth.cli.main import main
from diffsynth.jobs import publish
from diffsynth.pipelines import generate
def kill(*_given, **_more):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
def half(_frames, file, record):
    file.write_bytes(b"half")
    kill()
if sys.argv[2] == "decode":
    generate.decode_latents = kill
else:
    publish.save_with_metadata = half
main(sys.argv[3:])
"""


@pytest.fixture
def killed(tiny_checkpoint, clip, tmp_path):
    """Return a command, and a function that runs it until a signal that it gets in a stage."""
    command = ["transfer", str(clip), "--prompt", "a cat", "--model", str(tiny_checkpoint)]
    command += ["--steps", "2", "--frames", "5", "--height", "32", "--width", "32"]
    command += ["--mode", "No_transfer", "--device", "cpu"]

    def run(signal, stage, *more):
        words = [sys.executable, "-c", KILLED, signal, stage, *command, *more]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)

    return command, run


def hidden(folder):
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 0)])
def test_latents_are_on_the_disk_while_they_are_decoded(
    name, code, tiny_checkpoint, killed, tmp_path, capsys
):
    output = tmp_path / "out.mp4"
    command, run = killed
    command += ["-o", str(output), "--seed", "1"]
    ended = run(name, "decode")
    assert ended.returncode == code, ended.stderr
    assert not output.exists()
    (kept,) = tmp_path.glob(".out.mp4.*.latents.safetensors")
    line = f"its final latents are kept: fastvmt decode {kept} -o {output} makes it"
    assert (line in ended.stderr) == (name == "SIGINT")
    left = kept.read_bytes()
    assert main([*command, "--seed", "2"]) == 0  # another request gives them a name that is seen
    (other,) = tmp_path.glob("out-latents-*.safetensors")
    assert (other.read_bytes(), hidden(tmp_path)) == (left, [])
    assert f"fastvmt decode {other} -o {output} makes it" in capsys.readouterr().err
    for file in (other, output, record_path(output)):
        file.unlink()
    kept.write_bytes(left)
    assert main(command) == 0
    assert f"an earlier run was killed before its video was there; {line}" in capsys.readouterr().err
    assert hidden(tmp_path) == []
    kept.write_bytes(left)
    decode = ["decode", str(kept), "-o", str(tmp_path / "decoded.mkv"), "--lossless"]
    decode += ["--model", str(tiny_checkpoint), "--device", "cpu"]
    assert main(decode) == 0
    assert not kept.exists()  # a file that no one has named goes once its video is there
    assert main([*decode, "--json"]) == 0
    assert '"frames": 5' in capsys.readouterr().out
    assert main([*decode, "--quality", "3"]) == 2
    decoded = sha256_of_frames(list(VideoData(tmp_path / "decoded.mkv")))
    assert decoded == read_record(output).video["frames_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decode", "write"])
def test_what_a_killed_run_without_a_name_left_is_found_by_the_same_command(
    stage, tiny_checkpoint, killed, tmp_path, capsys, monkeypatch
):
    command, run = killed
    assert run("SIGKILL", stage).returncode == -9
    assert len(hidden(tmp_path)) == (1 if stage == "decode" else 2)
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0  # with another seed
    (video,) = tmp_path.glob("ref-No_transfer-seed*.mp4")
    (latents,) = tmp_path.glob("ref-latents-*.safetensors")
    assert hidden(tmp_path) == []
    line = "an earlier run was killed before its video was there; its final latents are kept: fastvmt decode"
    assert f"{line} {latents.name} -o OUT.mp4 makes it" in capsys.readouterr().err
    decode = ["decode", latents, "-o", tmp_path / "killed.mp4", "--model", tiny_checkpoint]
    assert main([*decode, "--device", "cpu"]) == 0
    assert latents.exists()  # its user knows it
    assert main(command) == 0
    assert "was killed" not in capsys.readouterr().err
    assert video.is_file()


def test_the_latents_of_a_run_that_lives_are_left_alone(tmp_path, caplog):
    tensor, facts = torch.zeros(1, 16, 2, 4, 4), {"kind": "final latents"}
    with latents_until_done(tmp_path / "ref.mp4", None, "a") as keep:
        keep(tensor, facts)
        before = hidden(tmp_path)
        with latents_until_done(tmp_path / "ref.mp4", None, "a") as other:
            other(tensor, facts)
            assert len(hidden(tmp_path)) == 2
        assert (hidden(tmp_path), caplog.messages) == (before, [])
    assert list(tmp_path.iterdir()) == []
