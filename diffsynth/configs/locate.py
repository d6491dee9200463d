"""Finding a checkpoint's folder."""

from pathlib import Path

from diffsynth.configs.checkpoints import PUBLISHED

# The model that comes with the package: beside it in a clone, inside it when installed from a wheel.
EMBEDDED = "Wan2.1-T2V-nano"
_PACKAGE = Path(__file__).resolve().parent.parent
_EMBEDDED_IN = (_PACKAGE / "embedded", _PACKAGE.parent / "models")


def checkpoint_folder(name: str | Path, root: str | Path = "models") -> Path:
    """The folder of a checkpoint: an existing folder as given, a published name ("1.3b", "14b") below `root`,
    or "nano", the model that comes with the package.

    Raises FileNotFoundError that says how to fetch it.
    """
    if name == "nano":
        return _embedded_folder()
    key = next(
        (key for key, known in PUBLISHED.items() if str(name) == key or Path(name).name == known.folder), None
    )
    folder = Path(root) / PUBLISHED[name].folder if name in PUBLISHED else Path(name)
    if folder.is_dir():
        return folder
    if key is None:
        names = ", ".join(["nano", *PUBLISHED])
        raise FileNotFoundError(f"{name} is neither a checkpoint folder nor one of the names {names}")
    raise FileNotFoundError(
        f"{folder} does not exist; fetch it by: "
        f"python examples/download_model.py --model {key} --output_dir {folder.parent}"
    )


def _embedded_folder() -> Path:
    places = [place / EMBEDDED for place in _EMBEDDED_IN]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise FileNotFoundError(
            f"the embedded model is missing: neither {' nor '.join(map(str, places))} is there; "
            "install the package again"
        )
    return found
