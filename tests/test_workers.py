"""Batches over several workers: each output once and as if made alone, whatever dies in between."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from diffsynth import VideoData
from diffsynth.cli.main import main
from diffsynth.distributed.workers import WorkerDiedError, over_workers
from diffsynth.testing import write_clip

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "12"]
SMALL += ["--mode", "AMF", "--motion-block", "1", "--motion-guided-steps", "12", "--motion-inner-steps", "2"]


def test_a_job_whose_worker_dies_is_done_by_a_new_one_and_the_others_stay():
    started, deaths = [], iter([True, False, True, True] + [False] * 99)

    def start():
        started.append(threading.get_ident())

        def do(job):
            time.sleep(0.01)
            if next(deaths):
                raise WorkerDiedError("killed")
            return job, len(started)

        return do

    results = sorted(over_workers(range(20), start, 3))
    assert [job for job, _ in results] == list(range(20))
    assert len(set(started)) <= 3
    assert len(started) == len(set(started)) + 3


def test_a_job_that_ends_every_worker_is_given_up():
    def do(_job):
        raise WorkerDiedError("killed")

    with pytest.raises(WorkerDiedError):
        list(over_workers([1], lambda: do, 2))


def batch(folder: Path, checkpoint: Path, name: str, *how: str) -> list[np.ndarray]:
    command = ["batch", folder / "jobs.jsonl", "-o", folder / name, "--model", checkpoint, "-q", *SMALL, *how]
    assert main(command) == 0
    outputs = sorted(path.name for path in (folder / name).iterdir() if path.suffix == ".mkv")
    assert outputs == [f"{i}.mkv" for i in range(4)]
    assert not list((folder / name).glob(".*.run"))
    return [np.stack(VideoData(folder / name / output)) for output in outputs]


@pytest.fixture
def jobs(tmp_path) -> Path:
    write_clip(tmp_path / "ref.mp4")
    lines = [
        {"reference": "ref.mp4", "prompt": "a cat", "seed": i, "lossless": True, "output": f"{i}.mkv"}
        for i in range(4)
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.slow
def test_each_output_is_made_once_and_as_if_alone_though_workers_are_killed(jobs, tiny_checkpoint):
    killed, ended = [], threading.Event()

    def kill() -> None:
        while not ended.is_set() and len(killed) < 2:
            time.sleep(0.02)
            running = list((jobs / "several").glob(".*.run/step.safetensors"))
            if running and len(children := multiprocessing.active_children()) > 1:
                killed.append(children[len(killed)].pid)
                os.kill(killed[-1], signal.SIGKILL)
                time.sleep(1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        several = batch(jobs, tiny_checkpoint, "several", "--workers", "2", "--checkpoint-every", "1")
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 2
    for alone, found in zip(batch(jobs, tiny_checkpoint, "alone"), several, strict=True):
        assert np.array_equal(alone, found)


def test_a_missing_ray_is_told_with_what_installs_it(jobs, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", jobs / "jobs.jsonl", "-o", jobs / "out", "--model", tiny_checkpoint, "--ray"]) == 1
    assert "--ray needs Ray: pip install 'fastvmt[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_makes_the_same(jobs, tiny_checkpoint, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        several = batch(jobs, tiny_checkpoint, "several", "--ray", "--workers", "2")
    finally:
        ray.shutdown()
    for alone, found in zip(batch(jobs, tiny_checkpoint, "alone"), several, strict=True):
        assert np.array_equal(alone, found)
