"""Final latents in a file, from which `fastvmt decode` makes the video."""

import logging
import shlex
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state, save_state

logger = logging.getLogger(__name__)

KIND = "final latents"


def latents_facts(
    vae: WanVideoVAE, size: tuple[int, int, int], fps: float | None, cost: RunCost | None = None
) -> dict[str, Any]:
    """Return the facts that are saved with final latents."""
    facts = {"kind": KIND, **dict(zip(("num_frames", "height", "width"), size, strict=True))}
    costs = {} if cost is None else cost.state()
    return {**facts, "fps": fps, "vae": weights_fingerprint(vae), "cost": costs}


def decode_line(path: Path) -> str:
    """Return words that say how a file of final latents becomes a video."""
    return f"its final latents are kept: fastvmt decode {shlex.quote(str(path))} -o OUT.mp4 makes it"


@contextmanager
def latents_until_done(path: Path) -> Iterator[None]:
    """Remove the file of a run's final latents at the end of this context, unless Ctrl-C ends it."""
    try:
        yield
    except KeyboardInterrupt:
        if path.exists():
            logger.warning("there is no video, but %s", decode_line(path))
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def keep_latents(
    latents: Tensor, facts: Mapping[str, object], folders: Iterable[Path], stem: str, error: BaseException
) -> None:
    """Save final latents that are no video yet, in the first folder that takes them, else the system's.

    The file becomes the `latents_path` of the error that prevented the video; None where none takes it.
    """
    kept = None
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = folder / f"{stem}-{uuid.uuid4().hex[:8]}.safetensors"
        with suppress(OSError, ValueError):
            save_state(path, {"latents": latents}, facts)
            kept = path
            break
    error.latents_path = kept  # type: ignore[attr-defined]  # for callers
    if kept is not None:
        logger.error("there is no video (%s), but %s", error, decode_line(kept))


def read_latents(path: str | Path) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the latents [1, C, F, h, w] in a file, and their `latents_facts`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind.
    """
    state, facts = load_state(Path(path))
    if facts.get("kind") != KIND:
        raise ValueError(f"{path} holds no final latents, but another part of a run")
    return state["latents"], facts
