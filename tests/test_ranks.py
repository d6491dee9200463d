"""One run on several ranks: its result, its continuation on another number of ranks, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import on_ranks

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.distributed.ranks import as_rank, spread_run
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.ladder import settings_of
from diffsynth.runs.checkpoint import RUNG
from diffsynth.testing import write_checkpoint, write_clip

CALL = {
    "prompt": "a red circle", "height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 4, "seed": 3,
    "motion": {"block": 1, "window": 3, "tile": (1, 1), "sf": 3, "guided_steps": 3, "inner_steps": 2,
               "interval": 2, "recompute_every": 2},
}  # fmt: skip
KINDS = {
    "tile": {},
    "dense, windowed, a cache": {
        "mode": "AMF", "cache": "first_block", "cache_threshold": 0.05,
        "motion": CALL["motion"] | {"attention_window": (1, 1, 1), "checkpoint": "block"},
    },
    "VAE in tiles": {"tiled": True, "tile_size": (4, 5), "tile_stride": (2, 5)},
    "FlowMotion": {"mode": "FlowMotion", "motion": {"guided_steps": 2}},
}  # fmt: skip

ROOT = Path(__file__).parents[1]


def made(
    checkpoint: Path, folder: Path, changes: dict[str, Any], stop_after: int = 99, sharded: bool = False
) -> Any:
    """Final latents of a run, the steps that it made, and all of it; None if it was stopped."""
    pipe, steps = WanVideoPipeline.from_pretrained(checkpoint, device="cpu"), []
    clip = np.random.default_rng(0).integers(0, 256, (9, 48, 80, 3), np.uint8)

    def observe(event: Any) -> None:
        if event.stage == "sampling" and event.steps:
            steps.append(event.step)
            if event.step == stop_after + 1:  # the step itself is saved after the observer is told
                raise InterruptedError

    call, saving = CALL | {"output_type": "latent"} | changes, {"checkpoint_dir": folder, "resume": True}
    ranks = dist.is_initialized()
    several = spread_run(pipe, call, saving, sharded) if ranks else nullcontext((call, saving))
    with several as (call, saving):
        try:
            (video,) = pipe.run(**call, **saving, input_video=clip, observer=observe, progress_bar_cmd=iter)
        except InterruptedError:
            return None
    return video.latents, steps, video


def all_made(checkpoint: Path, folder: Path, sharded: bool = False) -> dict[str, Any]:
    return {
        name: made(checkpoint, folder / name, changes, sharded=sharded)[0] for name, changes in KINDS.items()
    }


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_final_latents_are_those_of_one_process(size, tiny_checkpoint, tmp_path):
    expected = all_made(tiny_checkpoint, tmp_path / "one")
    for found in on_ranks(size, all_made, tiny_checkpoint, tmp_path / "several"):
        for name, one in expected.items():
            assert (found[name] - one).abs().max() <= 1e-5 * one.abs().max(), name


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))])
def test_final_latents_of_a_picture_and_a_motion_are_those_of_one_process(size, tmp_path):
    picture = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
    checkpoint = write_checkpoint(tmp_path / "model", "tiny-i2v")
    for name in ("tile", "dense, windowed, a cache"):
        changes = KINDS[name] | {"input_image": Image.fromarray(picture)}
        one, *_ = made(checkpoint, tmp_path / "one" / name, changes)
        for several, *_ in on_ranks(size, made, checkpoint, tmp_path / "several" / name, changes):
            assert (several - one).abs().max() <= 1e-5 * one.abs().max(), name


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_final_latents_of_split_weights_are_those_of_whole_ones(size, tiny_checkpoint, tmp_path):
    whole = on_ranks(size, all_made, tiny_checkpoint, tmp_path / "whole")
    split = on_ranks(size, all_made, tiny_checkpoint, tmp_path / "split", True)
    for found, expected in zip(split, whole, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in KINDS)


def test_a_run_continues_on_another_number_of_ranks_and_with_split_weights(tiny_checkpoint, tmp_path):
    changes = KINDS["dense, windowed, a cache"]
    one, *_ = made(tiny_checkpoint, tmp_path / "one", changes)
    assert on_ranks(2, made, tiny_checkpoint, tmp_path / "run", changes, 2) == [None, None]
    for several, steps, _ in on_ranks(3, made, tiny_checkpoint, tmp_path / "run", changes, 99, True):
        assert steps == [3, 4]
        assert (several - one).abs().max() <= 1e-5 * one.abs().max()
    assert made(tiny_checkpoint, tmp_path / "run", changes)[1] == []  # its latents are there


KEEPING = {"motion": CALL["motion"] | {"checkpoint": "attention"}}
# By the stage in which memory runs out: in which of its passes, and what is set after that: in words, among
# the options in force, and in a run that gives the same latents.
SHORT = {
    "guidance": (2, "guidance runs with checkpoint='attention'", {"checkpoint": "attention"}, KEEPING),
    "sampling": (
        2, "the prompts run in two calls, batch_cfg=False", {"batch_cfg": False}, {"batch_cfg": False},
    ),
    "decode": (1, "the VAE runs with tiled=True, tile_size=(6, 8), tile_stride=(3, 4)", {"tiled": True}, {}),
}  # fmt: skip


def asked(stage: str) -> dict[str, Any]:
    return {"tiled": False, "output_type": "np"} if stage == "decode" else {}


def out_of_memory(stage: str, number: int) -> None:
    """Have this rank run out of memory in a pass: for a gradient, for a velocity, or in decoding."""
    owner, name = (WanVideoVAE, "decode_chunks") if stage == "decode" else (WanModel, "run_blocks")
    real, passes = getattr(owner, name), []

    def short(*inputs: Any, **named: Any) -> Any:
        guided = torch.is_grad_enabled()
        if stage == "decode" or guided == (stage == "guidance"):
            passes.append(1)
            if len(passes) == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*inputs, **named)

    setattr(owner, name, short)


def ended_by_memory(checkpoint: Path, folder: Path, stage: str) -> str:
    """What a rank is told when memory runs out on one."""
    alone = stage == "decode"  # rank 0 decodes a whole video, while the others are done
    if dist.get_rank() == (0 if alone else 1):
        out_of_memory(stage, SHORT[stage][0])
    with pytest.raises(RuntimeError) if not alone or dist.get_rank() == 0 else nullcontext() as failure:
        made(checkpoint, folder, asked(stage))
    dist.destroy_process_group()  # the others wait for this one
    return "gloo" if failure is None else str(failure.value)


@pytest.mark.parametrize(
    "stage", ["guidance", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("sampling", "decode"))]
)
def test_ranks_start_again_with_less_memory_if_one_has_too_little(stage, tiny_checkpoint, tmp_path):
    _, words, settings, changes = SHORT[stage]
    told = on_ranks(2, ended_by_memory, tiny_checkpoint, tmp_path / "run", stage)
    (memory,) = [text for text in told if "gloo" not in text]
    assert memory.startswith(f"memory ran out on a rank in the stage {stage!r} (CUDA out of memory")
    assert memory.endswith(f"if started again, it continues, and {words}")
    again = on_ranks(2, made, tiny_checkpoint, tmp_path / "run", asked(stage))
    lowered = on_ranks(2, made, tiny_checkpoint, tmp_path / "lowered", asked(stage) | changes)
    for (latents, steps, video), (expected, every, _) in zip(again, lowered, strict=True):
        assert torch.equal(latents, expected)
        assert settings.items() <= settings_of(video.options).items()
        # The last step before the end was saved.
        assert steps == every[{"guidance": 2, "sampling": 0, "decode": 4}[stage] :]
    assert not (tmp_path / "run" / RUNG).exists()


SHORT_OF_MEMORY = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from diffsynth.models.wan_video_dit import WanModel

    real, guided = WanModel.run_blocks, []

    def run_blocks(dit, state, stop=None, checkpoint="none", **named):
        guided.append(torch.is_grad_enabled())
        if guided[-1] and guided.count(True) > {"none": 2, "attention": 1}.get(checkpoint, 99):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(dit, state, stop, checkpoint, **named)

    WanModel.run_blocks = run_blocks
"""


@pytest.mark.slow
def test_the_command_starts_its_ranks_again_until_memory_suffices(tmp_path, monkeypatch):
    write_clip(tmp_path / "ref.mp4")
    command = [sys.executable, "-m", "diffsynth", "transfer", tmp_path / "ref.mp4", "--model", "nano", "-q"]
    command += ["--prompt", "a red circle", "--seed", "1", "--num-inference-steps", "6", "--gpus", "2"]
    command += ["--motion-guided-steps", "3", "--motion-inner-steps", "2", "--no-resume", "--json", "-v"]
    frugal = [*command, "-o", tmp_path / "frugal.mp4", "--motion-checkpoint", "block"]
    subprocess.run(frugal, check=True, capture_output=True)
    (tmp_path / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    run = subprocess.run([*command, "-o", tmp_path / "out.mp4"], capture_output=True, text=True, check=True)
    told = [line.rpartition(", and ")[2] for line in run.stderr.splitlines() if line.startswith("ERROR")]
    assert told == [f"guidance runs with checkpoint={kept!r}" for kept in ("attention", "block")]
    assert "continuing after step" in run.stderr
    hashes = [
        json.loads((tmp_path / f"{name}.mp4.json").read_text())["video"]["frames_sha256"]
        for name in ("out", "frugal")
    ]
    assert hashes[0] == hashes[1]
    assert json.loads(run.stdout)["record"]["options"]["motion"]["checkpoint"] == "block"
    assert not (tmp_path / ".out.mp4.run").exists()


def hanging(port: int, mode: str) -> tuple[str, float]:
    """What a rank is told when rank 1 never answers, or fails by itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started = time.monotonic()
    try:
        # A busy machine may need more than seconds and the grace to tell the error.
        with as_rank(5.0 if mode == "hang" else 60.0):
            if rank == 1 and mode == "hang":
                time.sleep(15)
                raise SystemExit(0)
            if rank == 1:
                raise ValueError("a thing is wrong")
            dist.all_reduce(torch.ones(3))
    except (RuntimeError, ValueError, SystemExit) as error:
        dist.destroy_process_group()
        return repr(error), time.monotonic() - started
    raise AssertionError("nothing was told")


def test_a_rank_that_does_not_answer_is_named_and_an_error_is_told_once():
    for mode, expected in (
        # On a busy machine, another rank may be late as well.
        (
            "hang",
            r"RuntimeError\('rank\(s\) \[(0, )?1(, 2)?\] did not answer for 5 s; finished steps are saved'\)",
        ),
        ("error", r"ValueError\('a thing is wrong'\)"),
    ):
        # As under torchrun, whoever started the ranks has the store: it outlives each of them.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        found = on_ranks(3, hanging, store.port, mode)
        (told,) = [told for told, _ in found if "SystemExit" not in told]
        assert re.fullmatch(expected, told)
        # Ended by itself, long before the group's own time-out.
        assert max(seconds for told, seconds in found if "SystemExit(0)" not in told) < 200


@pytest.mark.slow
def test_the_command_ends_with_its_dead_rank_and_continues(tmp_path):
    write_clip(tmp_path / "ref.mp4")
    options = [
        "--num-inference-steps",
        "6",
        "--motion-guided-steps",
        "2",
        "--checkpoint-every",
        "1",
        "--lossless",
    ]
    command = [sys.executable, "-m", "diffsynth", "transfer", tmp_path / "ref.mp4", "--model", "nano", "-q"]
    command += ["--prompt", "a red circle", "--seed", "1", "--lossless", *options]
    subprocess.run([*command, "-o", tmp_path / "one.mkv", "--resume"], check=True, capture_output=True)
    several = [*command, "-o", tmp_path / "two.mkv", "--gpus", "2"]
    run = subprocess.Popen(several, stderr=subprocess.PIPE, text=True)
    state = tmp_path / ".two.mkv.run" / "step.safetensors"
    while run.poll() is None and not state.exists():
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "was ended by SIGKILL; the same command continues" in run.communicate(timeout=600)[1]
    assert run.returncode == 1
    assert state.exists()
    subprocess.run(several, check=True, capture_output=True)
    assert not state.exists()
    one, two = (np.stack(VideoData(tmp_path / f"{name}.mkv")).astype(int) for name in ("one", "two"))
    assert abs(one - two).max() <= 1
    assert json.loads((tmp_path / "two.mkv.json").read_text())["device"]["ranks"] == 2


def test_what_ranks_cannot_do_is_refused_before_they_start(capsys):
    from diffsynth.cli.main import main

    clip = str(ROOT / "examples" / "data" / "bounce.mp4")
    assert main(["transfer", clip, "--prompt", "a", "--mode", "No_transfer", "--gpus", "2"]) == 2
    assert "needs -o OUT" in capsys.readouterr().err
