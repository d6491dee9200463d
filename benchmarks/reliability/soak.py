"""Many runs in one process: does memory grow, do file handles stay open?

python benchmarks/reliability/soak.py --runs 50
"""

import argparse
import gc
import logging
import os
import tempfile
from pathlib import Path

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.testing import write_checkpoint, write_clip


def resident_megabytes() -> float:
    """Return the resources that the process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_handles() -> int:
    """How many files, pipes and sockets the process has open (Linux)."""
    return len(os.listdir("/proc/self/fd"))


def soak(model: str | Path, runs: int, folder: Path, **options: object) -> list[tuple[float, int]]:
    """(resident MB, open handles) after each run, from loading the reference to writing the video."""
    pipe = WanVideoPipeline.from_pretrained(model, device="cpu")
    clip = write_clip(folder / "ref.mp4", num_frames=9, height=64, width=64)
    seen = []
    for run in range(runs):
        with VideoData(clip, height=64, width=64) as video:
            frames = pipe("a red circle", input_video=video, seed=run, progress_bar_cmd=iter, **options)
        save_video(frames, folder / "out.mp4", fps=8)
        del frames
        gc.collect()
        seen.append((resident_megabytes(), open_handles()))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", default="nano", help='"tiny" for a random checkpoint')
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    if args.runs < 20:
        parser.error("--runs must be at least 20")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_checkpoint(folder / "tiny") if args.model_dir == "tiny" else args.model_dir
        seen = soak(model, args.runs, folder, num_inference_steps=args.steps, num_frames=9)
    # What is in use at the moment varies by some MB; the least of ten runs is what stays.
    early, late = (min(memory for memory, _handles in part) for part in (seen[3:13], seen[-10:]))
    print(" ".join(f"{memory:.0f}" for memory, _handles in seen), "MB")
    growth = f"{100 * (late / early - 1):+.1f} %"
    print(f"{args.runs} runs: {early:.0f} MB after the third, {late:.0f} MB at the end, {growth}")
    print(f"open handles {seen[3][1]}, then {seen[-1][1]}")


if __name__ == "__main__":
    main()
