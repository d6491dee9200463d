"""Try thousands of damaged and hostile files on everything that reads files, and print how they ended.

python benchmarks/reliability/fuzz.py --cases 10000
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from fuzzing import make_targets, peak_megabytes, run_target

from diffsynth.cli.main import main as fastvmt
from diffsynth.testing import write_checkpoint, write_clip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of a target's name")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)
        run = ["transfer", clip, "--model", write_checkpoint(folder / "tiny"), "--prompt", "a cat", "-q"]
        size = ["--height", "32", "--width", "32", "--num-inference-steps", "2"]
        if fastvmt([*run, *size, "-o", folder / "out.mp4"]) != 0:
            raise SystemExit("the run that makes a record failed")
        targets = make_targets(folder, json.loads((folder / "out.mp4.json").read_text()))
        total = sum(target.weight for target in targets)
        print("| target | cases | read | refused | slowest s |\n|---|--:|--:|---|--:|")
        begun, before, count = time.perf_counter(), peak_megabytes(), 0
        for target in targets:
            if args.only and args.only not in target.name:
                continue
            outcome = run_target(target, folder, round(args.cases * target.weight / total), args.seed)
            read = outcome.ends.pop("read", 0)
            refused = ", ".join(f"{error} {number}" for error, number in outcome.ends.most_common())
            cases = read + sum(outcome.ends.values())
            count += cases
            print(f"| {target.name} | {cases} | {read} | {refused} | {outcome.slowest:.2f} |", flush=True)
    grown = peak_megabytes() - before
    print(f"\n{count} cases in {time.perf_counter() - begun:.0f} s; peak memory grew by {grown:.0f} MB")


if __name__ == "__main__":
    main()
