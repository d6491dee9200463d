"""Final latents in a file, from which `fastvmt decode` makes the video."""

import glob
import logging
import os
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffsynth.data.files import hold
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state, save_state

logger = logging.getLogger(__name__)

KIND = "final latents"
HIDDEN = ".latents.safetensors"  # how the names of hidden files of final latents end


def latents_facts(
    vae: WanVideoVAE, size: tuple[int, int, int], fps: float | None, cost: RunCost | None = None
) -> dict[str, Any]:
    """Return the facts that are saved with final latents."""
    facts = {"kind": KIND, **dict(zip(("num_frames", "height", "width"), size, strict=True))}
    costs = {} if cost is None else cost.state()
    return {**facts, "fps": fps, "vae": weights_fingerprint(vae), "cost": costs}


def decode_line(path: Path, output: Path | None = None) -> str:
    """Return words that say how a file of final latents becomes a video, the one that was asked for."""
    name = "OUT.mp4" if output is None or output.exists() else shlex.quote(str(output))
    return f"its final latents are kept: fastvmt decode {shlex.quote(str(path))} -o {name} makes it"


@contextmanager
def latents_until_done(
    place: Path, output: Path | None, job: str | None
) -> Iterator[Callable[[Tensor, Mapping[str, object]], None]]:
    """Yield a function that saves a run's final latents in a hidden file beside `place`, its video's path.

    The file goes at the end of this context, unless a kill or Ctrl-C ends it. What killed runs left beside
    the same place is told first; this run's video replaces what the same job left, the hash of a request, if
    output names its path, and the rest gets a name that is seen.
    """
    stem = f".{place.name}.{(job or '')[:8]}"
    kept = place.with_name(f"{stem}-{uuid.uuid4().hex[:8]}{HIDDEN}")
    going, handles = [kept], list[int | None]()
    for left in place.parent.glob(f".{glob.escape(place.name)}.*{HIDDEN}"):
        handles.append(hold(left))
        if handles[-1] is None:
            continue  # its run lives
        if output is None or not left.name.startswith(stem):
            number = left.name.removesuffix(HIDDEN)[-8:]
            left = left.rename(left.with_name(f"{place.stem}-latents-{number}.safetensors"))
        else:
            going.append(left)
        logger.warning("an earlier run was killed before its video was there; %s", decode_line(left, output))

    def keep(latents: Tensor, facts: Mapping[str, object]) -> None:
        with suppress(OSError, ValueError):  # a failed copy must not end the run
            save_state(kept, {"latents": latents}, facts)
            handles.append(hold(kept))

    try:
        yield keep
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            kept.unlink(missing_ok=True)
        elif kept.exists():
            logger.warning("there is no video, but %s", decode_line(kept, output))
        raise
    else:
        for path in going:
            path.unlink(missing_ok=True)
    finally:
        for handle in filter(None, handles):
            os.close(handle)


def keep_latents(
    latents: Tensor, facts: Mapping[str, object], error: BaseException, output: Path | None = None
) -> None:
    """Save final latents that are no video yet beside the one that was asked for, else among temporary files.

    The file becomes the `latents_path` of the error that prevented the video; None where none takes it.
    """
    kept = None
    folders, stem = ([], "fastvmt") if output is None else ([output.parent], output.stem)
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = folder / f"{stem}-latents-{uuid.uuid4().hex[:8]}.safetensors"
        with suppress(OSError, ValueError):
            save_state(path, {"latents": latents}, facts)
            kept = path
            break
    error.latents_path = kept  # type: ignore[attr-defined]  # for callers
    if kept is not None:
        logger.error("there is no video (%s), but %s", error, decode_line(kept, output))


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
