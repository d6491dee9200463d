"""Reference clips to choose from: those of the clone, which are inside an installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (_PACKAGE / "embedded" / "data", _PACKAGE.parent / "examples" / "data")


def starting_clips() -> list[Path]:
    """Return videos to choose from, sorted by name."""
    return sorted(path for folder in FOLDERS for path in folder.glob("*.mp4"))
