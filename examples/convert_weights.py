"""Store a checkpoint's DiT as bfloat16: half the disk, loaded at once, mapped instead of held in memory.

python examples/convert_weights.py --model_dir models/Wan2.1-T2V-14B --output_dir models/Wan2.1-T2V-14B-bf16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.jobs.convert import DTYPES, convert_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, required=True, help="folder in the official layout")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16")
    args = parser.parse_args(arguments)
    try:
        print(convert_checkpoint(checkpoint_folder(args.model_dir), args.output_dir, dtypes[args.dtype]))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
