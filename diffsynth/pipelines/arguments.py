"""What a call runs with: what the caller gives, else what the checkpoint declares, else the reference's."""

import logging
from collections.abc import Sequence
from typing import Any

from diffsynth.configs.defaults import RunDefaults
from diffsynth.data.frames import checked_int
from diffsynth.data.tensors import Video, frame_size

logger = logging.getLogger(__name__)

# Of a text-to-video run with a published checkpoint.
PUBLISHED_SIZE = (480, 832)
PUBLISHED_LENGTH = 81
LONGEST_PROMPT = 100_000  # characters; models read 512 tokens


def given_or(default: Any, *given: Any) -> Any:
    """The last of `given` that is not None; `default` if all are."""
    return next((value for value in reversed(given) if value is not None), default)


def video_size(
    height: int | None, width: int | None, usual: RunDefaults, video: Video | None
) -> tuple[int, int]:
    """Height and width in pixels: as asked, else the checkpoint's, else the reference's, else 480 x 832."""
    rows, cols = PUBLISHED_SIZE if video is None else frame_size(video)
    return given_or(rows, usual.height, height), given_or(cols, usual.width, width)


def video_length(asked: int | None, usual: RunDefaults, video: Video | None) -> int:
    """Frames: as asked, else the checkpoint's, at most the reference's, else all the reference's, else 81.

    Raises ValueError if more are asked for than the reference has.
    """
    if video is None:
        return given_or(PUBLISHED_LENGTH, usual.num_frames, asked)
    there = len(video)
    if asked is not None and asked > there:
        raise ValueError(f"num_frames is {asked}, but input_video has {there} frames")
    return min(there, given_or(there, usual.num_frames, asked))


def starting_strength(asked: float | None, usual: RunDefaults, video: Video | None) -> float:
    """denoising_strength; without a reference a run starts from noise, and a warning says so if need be."""
    if video is not None:
        return given_or(usual.denoising_strength, asked)
    if asked is not None and 0 < asked < 1:
        logger.warning("denoising_strength=%s has no effect without input_video: starting from noise", asked)
        return 1.0
    return given_or(1.0, asked)


def negative_prompts(given: str | Sequence[str], count: int) -> list[str]:
    """One for each prompt. Raises ValueError if a list has another number of entries."""
    negatives = prompt_list("negative_prompt", given)
    if isinstance(given, str):
        return negatives * count
    if len(negatives) != count:
        raise ValueError(f"negative_prompt has {len(negatives)} entries for {count} prompts")
    return negatives


def round_size(name: str, pixels: int, multiple: int) -> int:
    """Pixels rounded up to a multiple, with a warning that says so. Raises ValueError below 1."""
    pixels = checked_int(name, pixels)
    rounded = -(-pixels // multiple) * multiple
    if rounded != pixels:
        logger.warning("%s %d is not a multiple of %d: rounded up to %d", name, pixels, multiple, rounded)
    return rounded


def prompt_list(name: str, given: object) -> list[str]:
    """One prompt or several as a list. Raises TypeError if it is not text, ValueError if there is none or one
    is longer than LONGEST_PROMPT.
    """
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"{name} must be a str or a list of str; got {given!r}")
    if not prompts:
        raise ValueError(f"{name} must be at least one prompt; got {given!r}")
    longest = max(map(len, prompts))
    if longest > LONGEST_PROMPT:
        raise ValueError(f"{name} must have at most {LONGEST_PROMPT} characters; got {longest}")
    return list(prompts)
