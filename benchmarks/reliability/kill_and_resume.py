"""Kill -9 a run at random moments, in every stage, and resume it: are the frames those of a run that
nothing happened to, and is a good video file ever broken?

    python benchmarks/reliability/kill_and_resume.py \
        [--model nano --moments 30 --steps 5 --seed 0 --json table.json]

Each run is a fork of its own, which loads the model, runs with a checkpoint_dir and writes a video over an
older one. It kills itself at a block, a file operation or a frame drawn by lot; while the model loads, the
parent kills it after a time drawn by lot. Without --model a tiny random checkpoint is used.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.data.files import PARTIAL
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.runs.checkpoint import STEP
from diffsynth.runs.state import load_state
from diffsynth.testing import write_checkpoint, write_clip

STAGES = (
    "load", "encode text", "encode video", "guidance", "sampling", "save state", "decode", "write video",
)  # fmt: skip
COLUMNS = ("stage", "moment", "steps kept", "steps done again", "old video", "frames equal")
KILLED = -signal.SIGKILL
SMALL = {"height": 32, "width": 32, "num_frames": 5}
TINY_MOTION = {"block": 1, "window": 3, "tile": (1, 1), "sf": 2}
GUIDED = {"guided_steps": 3, "inner_steps": 4, "interval": 2, "recompute_every": 2}


class Board:
    """Memory that forks share with their parent: whether the model is loaded, and how many moments passed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self._memory[8 * index : 8 * index + 8], "little")

    def __setitem__(self, index: int, value: int) -> None:
        self._memory[8 * index : 8 * index + 8] = value.to_bytes(8, "little")


class Moments:
    """Counts the moments of each stage, and kills the process at one of them."""

    def __init__(self, guided_steps: int, kill_at: tuple[str, int] | None) -> None:
        self.counts = dict.fromkeys(STAGES, 0)
        self.steps: list[int] = []
        self.stage = "encode text"
        self._guided_steps, self._kill_at = guided_steps, kill_at

    def tick(self, stage: str | None = None) -> None:
        stage = stage or self.stage
        if self._kill_at == (stage, self.counts[stage]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.counts[stage] += 1

    def observe(self, event: RunEvent) -> None:
        """Which stage the blocks belong to that run after an event."""
        if event.stage == "guidance":
            self.stage = "sampling"
        elif event.stage == "sampling":
            self.steps.append(event.step)
            self.stage = "guidance" if event.step < self._guided_steps else "sampling"
        else:
            self.stage = event.stage

    def watch(self, pipe: WanVideoPipeline) -> None:
        """Every block of the DiT and the text encoder, part of the VAE and file operation is a moment."""
        pipe.dit.register_forward_pre_hook(lambda *_: self._denoising())
        for block in pipe.dit.blocks:
            block.register_forward_pre_hook(lambda *_: (self._denoising(), self.tick())[0])
        for part in (
            *pipe.text_encoder.encoder.block,
            *pipe.vae.encoder.modules(),
            *pipe.vae.decoder.modules(),
        ):
            part.register_forward_pre_hook(lambda *_: self.tick())
        for name in ("fsync", "replace"):
            setattr(os, name, self._around(getattr(os, name)))

    def _denoising(self) -> None:
        if self.stage in ("encode text", "encode video"):
            self.stage = "guidance" if self._guided_steps else "sampling"

    def _around(self, call: Callable) -> Callable:
        def watched(*args: object) -> object:
            stage = "write video" if self.stage == "write video" else "save state"
            self.tick(stage)
            result = call(*args)
            self.tick(stage)
            return result

        return watched

    def frames(self, images: np.ndarray) -> Iterator[np.ndarray]:
        self.stage = "write video"
        for image in images:
            self.tick()
            yield image


def run(args: argparse.Namespace, folder: Path, board: Board, kill_at: tuple[str, int] | None) -> None:
    """Load, generate and write folder/out.mp4; the frames and counts go to files beside it."""
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    board[0] = 1
    clip = VideoData(args.clip)
    motion = pipe.defaults.motion.get("effi_AMF", {})
    size = {name: pipe.defaults.options.get(name, small) for name, small in SMALL.items()}
    numbers = {**motion, **(TINY_MOTION if args.tiny else {}), **GUIDED}
    guidance = MotionGuidance.for_mode("effi_AMF", numbers)
    moments = Moments(GUIDED["guided_steps"], kill_at)
    moments.watch(pipe)
    frames = pipe(
        "a red car on a road", input_video=clip, motion=guidance, num_inference_steps=args.steps, seed=1,
        sampler="unipc", output_type="np", checkpoint_dir=folder / "state", checkpoint_every=1,
        observer=moments.observe, progress_bar_cmd=list, **size,
    )  # fmt: skip
    save_video(moments.frames(frames), folder / "out.mp4", fps=8)
    np.save(folder / "frames.npy", frames)
    (folder / "counts.json").write_text(json.dumps([moments.counts, moments.steps]))


def fork(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a process of its own and return its exit status; minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001  a fork must never return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kept_steps(folder: Path) -> int:
    """Steps of the state that a killed run left."""
    if list((folder / "state").glob("latents-*")):
        return -1
    path = folder / "state" / STEP
    return load_state(path)[1]["step"] if path.exists() else 0


def trial(args: argparse.Namespace, folder: Path, stage: str, draw: random.Random, whole: dict) -> dict:
    """Kill one run in a stage, resume it, and return the outcome."""
    folder.mkdir()
    shutil.copy(args.old, folder / "out.mp4")
    board = Board()
    if stage == "load":
        moment = draw.uniform(0, whole["load seconds"])
        status = fork(lambda: run(args, folder, board, None), kill_after=moment)
        assert not board[0], "the model was loaded before the kill"
    else:
        moment = draw.randrange(whole["counts"][stage])
        status = fork(lambda: run(args, folder, board, (stage, moment)))
    assert status == KILLED, f"the run to be killed in {stage!r} ended with {status}"
    old = (folder / "out.mp4").read_bytes() == args.old.read_bytes()
    complete = len(VideoData(folder / "out.mp4")) == whole["frames"].shape[0]
    kept = kept_steps(folder)
    assert fork(lambda: run(args, folder, board, None)) == 0, "the run that went on failed"
    frames = np.load(folder / "frames.npy")
    steps = json.loads((folder / "counts.json").read_text())[1]
    partial = list((folder / "state").glob(f"{PARTIAL}*"))
    equal = np.array_equal(frames, whole["frames"]) and len(VideoData(folder / "out.mp4")) == len(frames)
    return {
        "stage": stage,
        "moment": round(moment, 3),
        "steps kept": args.steps if kept < 0 else kept,
        "steps done again": len(steps) - (0 if kept < 0 else args.steps - kept),
        "old video": "kept" if old else "new, complete" if complete else "BROKEN",
        "frames equal": bool(equal and not partial),
    }


def import_everything(args: argparse.Namespace) -> None:
    """Import the modules of a run, once for all forks."""
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    pipe.prompter.encode_prompt("", pipe.text_encoder)
    save_video(np.zeros((1, 16, 16, 3), np.uint8), args.clip.with_name("warm.mp4"))


def measure_whole(args: argparse.Namespace, folder: Path) -> dict:
    """The run that nothing happens to."""
    folder.mkdir()
    board, started = Board(), time.perf_counter()
    assert fork(lambda: WanVideoPipeline.from_pretrained(args.model, device="cpu")) == 0
    loading = time.perf_counter() - started
    assert fork(lambda: run(args, folder, board, None)) == 0
    return {
        "load seconds": 0.8 * loading,
        "frames": np.load(folder / "frames.npy"),
        "counts": json.loads((folder / "counts.json").read_text())[0],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint folder or a name such as nano")
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="in turn; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        args.tiny = args.model is None
        if args.tiny:
            args.model = write_checkpoint(folder / "tiny")
        args.clip, args.old = folder / "clip.mp4", folder / "old.mp4"
        for path in (args.clip, args.old):
            write_clip(path, 17, height=64, width=64)
        import_everything(args)
        whole = measure_whole(args, folder / "whole")
        # Each stage in turn, so that few moments reach all of them.
        stages = [args.stages[i % len(args.stages)] for i in range(args.moments)]
        rows = [trial(args, folder / str(i), stage, draw, whole) for i, stage in enumerate(stages)]
    lines = [COLUMNS, *[tuple(str(row[name]) for name in COLUMNS) for row in rows]]
    for line in lines:
        print("| " + " | ".join(cell.ljust(16) for cell in line) + " |")
    good = sum(row["frames equal"] and row["old video"] != "BROKEN" for row in rows)
    print(f"{good} of {len(rows)} runs gave the frames of the run that nothing happened to")
    if args.json:
        args.json.write_text(json.dumps({"moments": whole["counts"], "rows": rows}, indent=1))
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
