"""Kill the workers of a batch at random moments: is each output made once, and as by a run alone?

    python benchmarks/reliability/kill_workers.py [--jobs 50 --kills 10 --workers 2 --ray --seed 0]

The jobs are small runs of the embedded model. A killed worker is one that is making a video.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from diffsynth import VideoData
from diffsynth.cli.main import main as fastvmt
from diffsynth.testing import write_clip

RUN = ["--model", "nano", "-q", "--num-frames", "5", "--num-inference-steps", "8"]
RUN += ["--motion-guided-steps", "8", "--motion-inner-steps", "2"]


def workers(on_ray: bool) -> list[int]:
    """Return the process ids of the workers."""
    if not on_ray:
        return [child.pid for child in multiprocessing.active_children() if child.pid]
    names = ((entry, entry / "cmdline") for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [int(entry.name) for entry, file in names if file.exists() and b"ray::_Batch" in file.read_bytes()]


def kill(folder: Path, kills: int, on_ray: bool, ended: threading.Event, killed: list[int]) -> None:
    """Kill a worker at a random moment, while videos are being made, until there were so many."""
    while len(killed) < kills and not ended.wait(random.uniform(0.2, 3)):
        if list(folder.glob(".*.run/step.safetensors")) and (alive := workers(on_ray)):
            killed.append(random.choice(alive))
            os.kill(killed[-1], signal.SIGKILL)


def main() -> int:
    """Run the batch twice, with kills and alone, and compare; return 1 if an output differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("jobs", 50), ("kills", 10), ("workers", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-workers-"))
    write_clip(folder / "ref.mp4")
    lines = [
        {
            "reference": "ref.mp4",
            "prompt": "a red circle",
            "seed": i,
            "lossless": True,
            "output": f"{i:03d}.mkv",
        }
        for i in range(options.jobs)
    ]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ["batch", str(folder / "jobs.jsonl"), *RUN, "-o"]
    how = ["--checkpoint-every", "1", "--workers", str(options.workers), *(["--ray"] if options.ray else [])]
    killed: list[int] = []
    ended, started = threading.Event(), time.monotonic()
    arguments = folder / "several", options.kills, options.ray, ended, killed
    killer = threading.Thread(target=kill, args=arguments)
    killer.start()
    codes = [fastvmt([*batch, str(folder / "several"), *how])]
    ended.set()
    killer.join()
    seconds = time.monotonic() - started
    codes.append(fastvmt([*batch, str(folder / "alone")]))
    made, wanted = (
        sorted(path.name for path in (folder / name).glob("*.mkv")) for name in ("several", "alone")
    )
    equal = [
        np.array_equal(*(np.stack(list(VideoData(folder / side / name))) for side in ("several", "alone")))
        for name in wanted
    ]
    left = len(list((folder / "several").glob(".*.run")))
    print(
        f"{options.jobs} jobs, {len(killed)} workers killed, {seconds:.0f} s, exit codes {codes}: "
        f"{len(made)} outputs, {sum(equal)} equal to a run alone, {left} unfinished runs left"
    )
    return int(made != wanted or not all(equal) or left > 0)


if __name__ == "__main__":
    sys.exit(main())
