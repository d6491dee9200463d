"""Reference clips to choose from: those of the clone, or drawn ones like them in an installed package."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from diffsynth.data import save_video
from diffsynth.evaluation.synthetic import PLAIN, make_clip

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples" / "data"
# Trajectory -> seed, shape, colour and background of a clip.
DRAWN: Mapping[str, tuple[int, str, str, str]] = MappingProxyType(
    {
        "bounce": (21, "circle", "red", "white"),
        "circle": (22, "square", "green", "black"),
        "zigzag": (23, "triangle", "purple", "yellow"),
    }
)


def starting_clips(folder: Path, examples: Path = EXAMPLES) -> list[Path]:
    """Return videos to choose from, sorted by name: those in `examples`, else clips drawn into `folder`."""
    shipped = sorted(path for path in examples.glob("*.mp4") if path.is_file())
    return shipped or [_drawn(name, folder) for name in sorted(DRAWN)]


def _drawn(name: str, folder: Path) -> Path:
    path = folder / f"{name}.mp4"
    if path.is_file():
        return path
    seed, shape, colour, background = DRAWN[name]
    scene = {"trajectory": name, "shape": shape, "colour": colour, "background": background}
    clip = make_clip(seed, options=PLAIN, **scene, num_frames=17, height=256, width=256)
    return save_video(clip.frames, path, fps=12, quality=8)
