"""Train Wan2.2-TI2V-nano to a checkpoint folder; continues where a killed run stopped.

python examples/train_nano/train_all.py --run results/train_nano --output models/Wan2.2-TI2V-nano
Starts from the weights of the nano that draws shapes; --start "" starts from nothing.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="results/train_nano")
    parser.add_argument("--output", default="models/Wan2.2-TI2V-nano")
    parser.add_argument("--start", default="models/Wan2.1-T2V-nano")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    start = ["--start", args.start] if args.start else []
    for script, options in (
        ("train_vae.py", ["--device", args.device, "--decoder_steps", "1500", *start]),
        ("train_dit.py", ["--device", args.device, *start]),
        ("package.py", ["--output", args.output]),
    ):
        subprocess.run([sys.executable, HERE / script, "--run", args.run, *options], check=True)


if __name__ == "__main__":
    main()
