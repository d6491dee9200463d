"""Which block, heads and temperature of a checkpoint read motion best: measured on clips with known motion.

python -m benchmarks.probe --model_dir nano --clips 24 --sigmas 0.9 0.7  (see help(probe_motion))
"""

import inspect
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

from tqdm import tqdm

from benchmarks.probe.measure import probe_motion
from benchmarks.probe.report import GUIDED_SIGMAS, suggest
from diffsynth import WanVideoPipeline

KINDS: dict[str, type] = {"sigmas": float, "taus": float, "tokens": str, "prompt": str}
KINDS |= dict.fromkeys(("clips", "height", "width", "num_frames", "blocks", "sf", "seed"), int)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_dir", default="nano", help="checkpoint folder, or nano, 1.3b, 14b")
    parser.add_argument("--output_dir", default="results/probe", help="folder for table and picture")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--range", type=float, nargs=2, default=GUIDED_SIGMAS, help="noise levels to rank by")
    parser.add_argument("--rows", type=int, default=20, help="rows of the table to print")
    probe = inspect.signature(probe_motion).parameters
    for name, kind in KINDS.items():
        many = "+" if name in ("blocks", "sigmas", "taus") else None
        parser.add_argument(f"--{name}", type=kind, nargs=many, default=probe[name].default, help="see above")
    args = vars(parser.parse_args())
    pipe = WanVideoPipeline.from_pretrained(args["model_dir"], device=args["device"])
    result = probe_motion(pipe, progress=tqdm, **{name: args[name] for name in KINDS})
    print(f"files: {', '.join(map(str, result.save(args['output_dir'])))}")
    print(result.table(args["rows"], tuple(args["range"])))
    best = (f"{name}={value!r}" for name, value in suggest(result, tuple(args["range"])).items())
    print(f"best: MotionGuidance({', '.join(best)})")


if __name__ == "__main__":
    main()
