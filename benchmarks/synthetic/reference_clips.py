"""Write the reference clips of examples/data: shapes on known paths, for the nano model and for real ones.

python -m benchmarks.synthetic.reference_clips --output_dir examples/data
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth import save_video

# name -> seed and what make_clip is asked for
CLIPS: dict[str, tuple[int, dict[str, Any]]] = {
    "bounce": (21, {"trajectory": "bounce", "shape": "circle", "colour": "red", "background": "white"}),
    "circle": (22, {"trajectory": "circle", "shape": "square", "colour": "green", "background": "black"}),
    "zigzag": (23, {"trajectory": "zigzag", "shape": "triangle", "colour": "purple", "background": "yellow"}),
}
SMALL: dict[str, Any] = {"num_frames": 17, "height": 256, "width": 256}
LARGE: dict[str, Any] = {"num_frames": 81, "height": 480, "width": 832}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("examples/data"))
    folder = parser.parse_args().output_dir
    for name, (seed, scene) in CLIPS.items():
        clip = make_clip(seed, options=PLAIN, **scene, **SMALL)
        print(save_video(clip.frames, folder / f"{name}.mp4", fps=12, quality=8))
    seed, scene = CLIPS["bounce"]
    print(save_video(make_clip(seed, options=PLAIN, **scene, **LARGE).frames, folder / "source.mp4", fps=16))


if __name__ == "__main__":
    main()
