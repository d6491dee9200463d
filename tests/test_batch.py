"""`fastvmt batch`: many jobs with one load, none lost, none done twice, none outside of its folder."""

import csv
import errno
import json
import os
import signal

import pytest

from diffsynth import VideoData
from diffsynth.cli import batch, progress
from diffsynth.cli.main import main
from diffsynth.runs.record import read_record, record_path
from diffsynth.testing import write_clip


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch):
    """A list that gets an entry for each load of the model."""
    counted = []
    load = batch.load_pipeline
    monkeypatch.setattr(batch, "load_pipeline", lambda *given: counted.append(1) or load(*given))
    return counted


@pytest.fixture
def start(tiny_checkpoint, tmp_path, capsys):
    """start(*jobs, arguments) -> (exit code, the JSON result, stderr), with jobs/ref.mp4 beside the jobs."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)

    def run(*jobs, arguments=(), file="jobs.jsonl"):
        if jobs:
            (folder / file).write_text("\n".join(json.dumps(job) for job in jobs) + "\n")
        shared = ["--model", tiny_checkpoint, "--steps", "2", "--mode", "No_transfer", "--json", "-q"]
        code = main(["batch", folder / file, "-o", tmp_path / "out", *shared, *arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return run


def job(**options):
    return {"reference": "ref.mp4", "prompt": "a cat", "seed": 1, **options}


def states(result):
    return [entry["state"] for entry in result["jobs"]]


@pytest.mark.slow
def test_all_jobs_run_with_one_load_and_a_second_start_does_none(start, tmp_path, loads):
    jobs = [
        job(output="one.mp4"),
        job(seed=2),
        job(output="deep/three.mp4", mode="effi_AMF", motion={"lr": [0.1, 0.1], "block": None}, height=None),
    ]
    code, result, _ = start(*jobs)
    assert (code, states(result), loads) == (0, ["done"] * 3, [1])
    assert (result["done"], result["skipped"], result["failed"]) == (3, 0, 0)
    videos = [tmp_path / "out" / "one.mp4", tmp_path / "out" / "deep" / "three.mp4"]
    assert all(len(VideoData(video)) == 5 for video in videos)
    record = read_record(videos[1])
    assert (record.options["motion"]["lr"], record.options["num_inference_steps"]) == ([0.1, 0.1], 2)
    assert record.options["motion"]["block"] is None
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4*")}
    code, result, _ = start(*jobs)
    assert (code, states(result), loads) == (0, ["skipped"] * 3, [1])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4*")}


@pytest.mark.slow
def test_a_new_order_new_jobs_and_the_same_job_twice_run_only_what_is_new(start):
    first = [job(seed=1), job(seed=2)]
    assert states(start(*first)[1]) == ["done", "done"]
    result = start(job(seed=3), *reversed(first), job(seed=3))[1]
    assert states(result) == ["done", "skipped", "skipped", "skipped"]


def test_one_failure_does_not_stop_the_rest_and_is_told_with_its_line(start):
    jobs = [job(reference="none.mp4"), job(), job(preset="warp"), job(num_frames=9), job(prompt="a dog")]
    code, result, said = start(*jobs)
    assert (code, states(result)) == (1, ["failed", "done", "failed", "failed", "done"])
    assert "none.mp4 does not exist" in result["jobs"][0]["error"]
    assert "preset must be one of" in result["jobs"][2]["error"]
    assert "line 4 failed: num_frames is 9, but input_video has 5 frames" in said


def test_wrong_lines_are_told_before_the_first_job(start, loads, monkeypatch):
    said = []
    note = batch.Console.problem
    monkeypatch.setattr(
        batch.Console, "problem", lambda c, text: said.append((text, len(loads))) or note(c, text)
    )
    code, result, _ = start(job(), job(reference="none.mp4"), job(preset="warp"))
    assert (code, states(result), len(loads)) == (1, ["done", "failed", "failed"], 1)
    assert [(text.split(":")[0], count) for text, count in said] == [
        ("line 2 failed", 0),
        ("line 3 failed", 0),
    ]


@pytest.mark.slow
def test_an_interrupted_batch_goes_on_with_the_job_that_it_was_in(start, tmp_path, monkeypatch):
    class Interrupting(progress.StageProgress):
        def __call__(self, event):
            super().__call__(event)
            if event.stage == "sampling" and len(list((tmp_path / "out").glob("*.mp4"))) == 1:
                signal.raise_signal(signal.SIGINT)

    jobs = [job(seed=seed) for seed in (1, 2, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(progress, "StageProgress", Interrupting)
        code, result, _ = start(*jobs)
    assert code == 130
    assert result["error"] == "interrupted in the job of line 2; the same command continues it"
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir() if p.name[0] != ".") == [".json", ".mp4"]
    code, result, _ = start()
    assert (code, states(result)) == (0, ["skipped", "done", "done"])


def test_a_lost_record_is_written_again_from_the_video(start, tmp_path):
    start(job(output="a.mp4"))
    record = record_path(tmp_path / "out" / "a.mp4")
    content = record.read_text()
    record.unlink()
    assert states(start()[1]) == ["skipped"]
    assert record.read_text() == content


@pytest.mark.slow
def test_a_damaged_output_fails_and_overwrite_makes_that_one_again(start, tmp_path):
    jobs = [job(output="a.mp4"), job(output="b.mp4", seed=2)]
    start(*jobs)
    video = tmp_path / "out" / "a.mp4"
    content = video.read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        video.write_bytes(damaged)
        code, result, _ = start(*jobs)
        assert (code, states(result)) == (1, ["failed", "skipped"])
        assert "a.mp4 is damaged or was replaced" in result["jobs"][0]["error"]
        assert video.read_bytes() == damaged
    code, result, _ = start(*jobs, arguments=["--overwrite"])
    assert (code, states(result)) == (0, ["done", "skipped"])
    assert states(start()[1]) == ["skipped", "skipped"]


@pytest.mark.slow
def test_an_output_of_other_arguments_is_kept_unless_overwrite(start, tmp_path):
    start(job(output="a.mp4"))
    code, result, _ = start(job(output="a.mp4", seed=2))
    assert (code, states(result)) == (1, ["failed"])
    assert "exists, made by another request (seed was 1, and is 2); name" in result["jobs"][0]["error"]
    assert read_record(tmp_path / "out" / "a.mp4").options["seed"] == 1
    assert states(start(arguments=["--overwrite"])[1]) == ["done"]
    assert read_record(tmp_path / "out" / "a.mp4").options["seed"] == 2


def test_a_reference_of_another_content_is_another_job(start, tmp_path):
    start(job())
    write_clip(tmp_path / "jobs" / "ref.mp4", num_frames=5, height=32, width=32, velocity=(3, 0))
    assert states(start()[1]) == ["done"]


def test_jobs_of_a_csv_leave_out_empty_cells_and_keep_commas_of_quoted_ones(start, tmp_path):
    with (tmp_path / "jobs" / "jobs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["reference", "prompt", "seed", "output", "tiled", "tile-size"])
        rows.writerow(["ref.mp4", "a cat, sitting", 7, "a.mp4", "no", ""])
        rows.writerow(["ref.mp4", "-a cat", "", "b.mp4", "true", "30,40"])
    code, result, _ = start(file="jobs.csv")
    assert (code, states(result)) == (0, ["done", "done"])
    first, second = (read_record(tmp_path / "out" / name) for name in ("a.mp4", "b.mp4"))
    assert (first.prompt, first.options["seed"], first.options["tiled"]) == ("a cat, sitting", 7, False)
    assert (second.prompt, second.options["tile_size"]) == ("-a cat", [30, 40])


@pytest.mark.parametrize("name", ["../a.mp4", "/tmp/a.mp4", "link/a.mp4", "x/../../a.mp4", "."])
def test_an_output_outside_of_the_folder_is_refused_before_anything_runs(start, tmp_path, loads, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    code, result, _ = start(job(), job(output=name))
    assert (code, loads) == (2, [])
    assert f"jobs.jsonl, line 2: output {name!r} is outside of the output folder" in result["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
        ("[1]", "line 1: a job must be an object; got [1]"),
        ('{"prompt": "a", "color": 3}', "line 1: unknown option color"),
        ('{"prompt": "a", "model": "14b"}', "line 1: unknown option model"),
        ('{"prompt": "a", "seed": "x"}', "line 1: seed must be a whole number"),
        ('{"prompt": "a", "motion": 3}', "line 1: motion must be an object such as"),
        ('{"prompt": "a", "output": "a.mp4"}\n' * 2, "more than one job has the output"),
        ("\n", "holds no jobs"),
    ],
)
def test_a_jobs_file_with_a_fault_is_refused_by_line(start, tmp_path, loads, text, message):
    (tmp_path / "jobs" / "jobs.jsonl").write_text(text)
    code, result, _ = start()
    assert (code, loads) == (2, [])
    assert message in result["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,seed\na\n", "line 2: row and header differ in number of cells"),
        (b"prompt\na,b\n", "line 2: row and header differ in number of cells"),
        (b'prompt\n"a', "unexpected end of data"),
        (b"prompt\n\xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_a_csv_with_a_fault_is_refused(start, tmp_path, content, message):
    (tmp_path / "jobs" / "jobs.csv").write_bytes(content)
    code, result, _ = start(file="jobs.csv")
    assert code == 2
    assert message in result["error"]


def test_a_missing_jobs_file_and_one_of_another_kind_are_refused(start, tmp_path):
    assert "jobs.jsonl does not exist" in start()[1]["error"]
    (tmp_path / "jobs" / "jobs.txt").write_text("")
    assert "jobs.txt must end in .jsonl or .csv" in start(file="jobs.txt")[1]["error"]


def test_two_batches_do_not_write_to_one_folder_at_a_time(start, tmp_path, loads):
    (tmp_path / "out").mkdir()
    with batch._only_batch(tmp_path / "out"):
        code, result, _ = start(job())
    assert (code, loads) == (1, [])
    assert "another batch is writing to" in result["error"]


def test_a_model_that_cannot_be_loaded_ends_the_batch(start, tmp_path, tiny_checkpoint):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "Wan2.1_VAE.pth").write_bytes((tiny_checkpoint / "Wan2.1_VAE.pth").read_bytes())
    code, result, _ = start(job(), job(seed=2), arguments=["--model", broken])
    assert (code, "jobs" in result) == (1, False)
    assert "the model cannot be loaded" in result["error"]


def test_one_folder_for_the_state_of_all_jobs_is_refused_and_resume_leaves_none(start, tmp_path):
    code, result, _ = start(job(), arguments=["--checkpoint-dir", tmp_path / "state"])
    assert (code, "--checkpoint-dir is for one video" in result["error"]) == (2, True)
    assert states(start(job(), arguments=["--resume"])[1]) == ["done"]
    assert list((tmp_path / "out").glob(".*.run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("words", ["OSError", "ffmpeg"])
def test_a_full_disk_ends_the_batch_and_the_rest_is_left(start, monkeypatch, words):
    def full(*_given, **_named):
        if words == "ffmpeg":
            raise RuntimeError("ffmpeg could not write the video: a.mp4: No space left on device")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    jobs = [job(), job(seed=2), job(seed=3)]
    with monkeypatch.context() as patch:
        patch.setattr("diffsynth.jobs.publish.save_with_metadata", full)
        code, result, told = start(*jobs)
    assert (code, states(result)) == (1, ["failed"])
    assert "the disk takes nothing more: 2 jobs are left for the next start" in told
    code, result, _ = start(*jobs)
    assert (code, states(result)) == (0, ["done"] * 3)
