"""Finding a checkpoint's folder."""

from pathlib import Path

from diffsynth.configs.checkpoints import PUBLISHED


def checkpoint_folder(name: str | Path, root: str | Path = "models") -> Path:
    """The folder of a checkpoint: an existing folder as given, or a published name ("1.3b", "14b") below
    `root`.

    Raises FileNotFoundError that says how to fetch it.
    """
    key = next(
        (key for key, known in PUBLISHED.items() if str(name) == key or Path(name).name == known.folder), None
    )
    folder = Path(root) / PUBLISHED[name].folder if name in PUBLISHED else Path(name)
    if folder.is_dir():
        return folder
    if key is None:
        raise FileNotFoundError(
            f"{name} is neither a checkpoint folder nor one of the published names {', '.join(PUBLISHED)}"
        )
    raise FileNotFoundError(
        f"{folder} does not exist; fetch it by: "
        f"python examples/download_model.py --model {key} --output_dir {folder.parent}"
    )
