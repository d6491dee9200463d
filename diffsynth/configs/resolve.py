"""Decide the options of a run, for Python calls, the command line, the web page and batch files alike.

Order of precedence, highest first: the arguments, the preset, the checkpoint's defaults, the reference, the
published method.
"""

import logging
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from diffsynth.configs.caches import CACHES, choose_cache
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.defaults import RunDefaults, run_defaults
from diffsynth.configs.descriptors import DEFAULT_MODE, DESCRIPTORS, NO_TRANSFER
from diffsynth.configs.fields import OrNone, Whole, check_value, options_of
from diffsynth.configs.guidance import (
    MOTION_BELOW,
    MotionGuidance,
    changed_numbers,
    check_coarse,
    check_heads,
    check_released,
)
from diffsynth.configs.options import RunOptions, Shorthands, call_options

logger = logging.getLogger(__name__)

# Option names in other libraries and ours for the same thing, for the error message.
OTHER_NAMES = {
    "guidance_scale": "cfg_scale", "cfg": "cfg_scale", "strength": "denoising_strength", "generator": "seed",
    "flow_shift": "sigma_shift", "shift": "sigma_shift", "cfg_merge": "batch_cfg", "video": "input_video",
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "frames": "num_frames",
}  # fmt: skip
NEW_SEED = -1  # draws a random seed, as in other programs
LONGEST_PROMPT = 100_000  # characters; models read only the first 512 tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceFacts:
    """Facts about a reference video that decide options of a run.

    Attributes:
        num_frames: number of the frames.
        height, width: size of the frames in pixels.
        fps: frames a second; None if unknown.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Facts about a model that decide options.

    Attributes:
        dim, num_layers, num_heads: width of the DiT, number of its blocks, and heads in each block.
        pixels_per_token: (height, width) of a token in pixels.
        pixels_per_latent: height, and also width, of a latent position in pixels.
        frames_per_latent: video frames in each latent frame but the first, which holds one.
        boundary: noise level in 0..1 at and above which the high-noise expert runs; None for a single DiT.
    """

    dim: int
    num_layers: int
    num_heads: int
    pixels_per_token: tuple[int, int]
    pixels_per_latent: int
    frames_per_latent: int
    boundary: float | None = None


def resolve(
    given: Mapping[str, Any],
    defaults: RunDefaults,
    reference: ReferenceFacts | None,
    model: ModelFacts | None = None,
) -> RunOptions:
    """Return the options of a run.

    Args:
        given: arguments of the call by name: fields of `RunOptions` and `Shorthands`. A value of None counts
            as absent, even under an unknown name, and so does seed=-1. `motion` may also be a mapping of
            fields of `MotionGuidance`.
        defaults: defaults of the checkpoint.
        reference: facts about the reference video; None without one.
        model: facts about the model; None to check only what is known before it is loaded.

    Raises:
        TypeError: an argument is unknown.
        ValueError: a value is not allowed, or arguments contradict one another.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in call_options():
            here = f"; here it is {OTHER_NAMES[name]}" if name in OTHER_NAMES else ""
            raise TypeError(f"the call got an unexpected keyword argument {name!r}{here}")
    if isinstance(given.get("seed"), Integral) and given["seed"] == NEW_SEED:
        del given["seed"]
    short = Shorthands(**{name: given.pop(name) for name in options_of(Shorthands) if name in given})
    defaults = defaults.with_preset(short.preset)
    options: dict[str, Any] = {name: defaults[name] for name in options_of(RunOptions)} | given
    options["height"], options["width"] = _size(given, defaults, reference, model)
    options["num_frames"] = _length(given, defaults, reference)
    if reference is None:  # the run starts from noise
        strength = given.get("denoising_strength", 1.0)
        if isinstance(strength, int | float) and 0 < strength < 1:
            text = "denoising_strength=%s has no effect without input_video: starting from noise"
            logger.warning(text, strength)
            strength = 1.0
        options["denoising_strength"] = strength
    options["seed"] = given.get("seed", secrets.randbelow(2**32))
    if "num_inference_steps" in given and "sigmas" not in given:
        options["sigmas"] = None
    if model is not None and model.boundary is not None and "boundary" not in {**defaults.options, **given}:
        options["boundary"] = model.boundary
    options["motion"] = None
    options["cache"] = _cache(given.get("cache"), short, defaults, model)
    run = RunOptions(**options)
    num_frames = None if reference is None else run.num_frames
    motion = _motion(given.get("motion"), short, defaults, num_frames, run.num_inference_steps)
    if motion is not None:
        motion = motion.placed(run.levels)
        guided = [run.levels[step] for step in motion.guided_range(run.num_inference_steps)]
        if guided and guided[-1] > MOTION_BELOW:
            logger.warning(
                "all guided steps lie above noise level %.2f (the last at %.3f), where attention shows "
                "hardly any motion: use more guided_steps, or set guided=(from, to) in noise levels",
                *(MOTION_BELOW, guided[-1]),
            )
    elif given.get("refine"):
        logger.warning("refine has no effect without transfer of motion")
    if motion is not None and model is not None:
        _check_fits(motion, run, model)
    return replace(run, motion=motion)


def resolve_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, defaults: RunDefaults
) -> list[tuple[str, str]]:
    """Return (prompt, negative prompt) of each video that a call makes.

    Raises:
        TypeError: a prompt is not text or a list of texts.
        ValueError: a list is empty, a prompt is too long, or the lists have different lengths.
    """
    prompts = _texts("prompt", prompt)
    if not all(text.strip() for text in prompts):
        logger.warning("prompt is empty: the model chooses what the video shows")
    if negative_prompt is None:
        negative_prompt = defaults["negative_prompt"] or ""
    negatives = _texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts")
    return list(zip(prompts, negatives, strict=True))


def unknown_words(prompts: Sequence[str], words: Sequence[str] | None) -> str | None:
    """Return a message that names the words in prompts which are not among a model's words, in lower case.

    It is None if there are none, and for a model that reads any word, whose words are None.
    """
    asked = dict.fromkeys(re.findall(r"\w+", " ".join(prompts).lower()))
    ignored = [word for word in asked if words is not None and word not in words]
    if words is None or not ignored:
        return None
    shown = ", ".join(ignored[:12]) + (", ..." if len(ignored) > 12 else "")
    return f"the model knows {len(words)} words; ignored: {shown}; it knows: {', '.join(words)}"


def round_size(name: str, pixels: int, multiple: int) -> int:
    """Return `pixels` rounded up to a multiple of `multiple`; a change is logged as a warning."""
    pixels = check_value(name, Whole(1), pixels)
    rounded = -(-pixels // multiple) * multiple
    if rounded != pixels:
        logger.warning("%s %d is not a multiple of %d: rounded up to %d", name, pixels, multiple, rounded)
    return rounded


def motion_for(checkpoint: str | Path, mode: str = DEFAULT_MODE, **changes: Any) -> MotionGuidance:
    """Return the motion guidance of a mode: values that the checkpoint declares, else the published ones.

    Args:
        checkpoint: a folder, or a name as for `from_pretrained`.
        mode: a key of `DESCRIPTORS`.
        changes: fields to override.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a value is not allowed.
    """
    declared = run_defaults(checkpoint_folder(checkpoint)).motion.get(mode, {})
    return MotionGuidance.for_mode(mode, changed_numbers(declared, changes))


def _size(
    given: Mapping[str, Any],
    defaults: RunDefaults,
    reference: ReferenceFacts | None,
    model: ModelFacts | None,
) -> tuple[int, int]:
    """Return height and width in pixels; the declared size is transposed for a portrait reference."""
    declared: tuple[int, int] = (defaults["height"], defaults["width"])
    if reference is not None and not defaults.options.keys() >= {"height", "width"}:
        declared = (reference.height, reference.width)
    upright = reference is not None and reference.height > reference.width
    if upright and declared[0] < declared[1]:
        declared = declared[::-1]
    rows, cols = (1, 1) if model is None else model.pixels_per_token
    height = round_size("height", given.get("height", declared[0]), rows)
    return height, round_size("width", given.get("width", declared[1]), cols)


def _length(given: Mapping[str, Any], defaults: RunDefaults, reference: ReferenceFacts | None) -> int:
    """Return the number of frames: the requested, else the declared number, at most the reference's."""
    asked = given.get("num_frames")
    if asked is not None:
        asked = check_value("num_frames", Whole(1), asked)
    if reference is None:
        return defaults["num_frames"] if asked is None else asked
    available = reference.num_frames
    if asked is not None and asked > available:
        raise ValueError(f"num_frames is {asked}, but input_video has {available} frames")
    length = min(available, defaults.options.get("num_frames", available)) if asked is None else asked
    if length < available:
        message = f"the reference has {available} frames: the first {length} are used"
        if rate := reference.fps:
            slower = math.floor(100 * length / available * rate) / 100
            message += f", {length / rate:.3g} of its {available / rate:.3g} seconds; "
            message += f"reading it at {slower:.3g} frames a second (ref_fps) covers all"
        logger.log(logging.WARNING if asked is None else logging.INFO, message)
    return length


def _motion(
    motion: MotionGuidance | Mapping[str, Any] | None,
    short: Shorthands,
    defaults: RunDefaults,
    num_frames: int | None,
    num_steps: int,
) -> MotionGuidance | None:
    """Return the guidance that motion, mode, sf and motion_scale request together; None for no transfer."""
    mode = short.mode
    if mode is None and isinstance(motion, MotionGuidance):
        mode = motion.mode
    elif mode is None:
        mode = NO_TRANSFER if num_frames is None and not motion else DEFAULT_MODE
        logger.info("no mode is named: using %s", mode)
    if mode == NO_TRANSFER:
        if isinstance(motion, Mapping) and motion:
            raise ValueError(f"motion ({', '.join(sorted(motion))}) has no effect in mode {NO_TRANSFER}")
        if motion or short.sf is not None or short.motion_scale is not None:
            logger.warning("motion, sf and motion_scale have no effect in mode %s", NO_TRANSFER)
        return None
    if motion is not None and not isinstance(motion, MotionGuidance | Mapping):
        raise ValueError(f"motion must be a MotionGuidance or a mapping of its numbers; got {motion!r:.80}")
    if not isinstance(motion, MotionGuidance):
        numbers = changed_numbers(defaults.motion.get(mode, {}), motion or {})
        motion = MotionGuidance.for_mode(mode, numbers)
    motion = replace(motion, mode=mode, sf=motion.sf if short.sf is None else short.sf)
    if short.motion_scale is not None:
        motion = motion.scaled(short.motion_scale)
    if num_frames is None:
        raise ValueError(f"mode {motion.mode!r} transfers motion and needs input_video; none is given")
    if num_frames < 2:
        raise ValueError(f"mode {motion.mode!r} needs num_frames and input_video of 2 frames or more; got 1")
    if motion.guided is None and motion.guided_steps > num_steps:
        logger.warning("guided_steps=%d: the run has only %d steps", motion.guided_steps, num_steps)
        motion = replace(motion, guided_steps=num_steps)
    return motion


def _check_fits(motion: MotionGuidance, run: RunOptions, model: ModelFacts) -> None:
    """Raise ValueError if a parameter of motion does not fit the DiT or the size of the run's latents."""
    motion.block_for(model.num_layers)
    if not DESCRIPTORS[motion.mode].reads_attention:
        return
    size, pixel = (run.height, run.width), model.pixels_per_latent
    check_coarse(motion.coarse, size[0] // pixel, size[1] // pixel)
    grid = tuple(
        -(-side // (motion.coarse * token)) for side, token in zip(size, model.pixels_per_token, strict=True)
    )
    frames = -(-(run.num_frames - 1) // model.frames_per_latent) + 1
    check_heads(motion.heads, model.num_heads, (frames, grid[0], grid[1]))
    if motion.variant == "released":
        check_released(grid, motion.tile, motion.window)


def _cache(asked: Any, short: Shorthands, defaults: RunDefaults, model: ModelFacts | None) -> Any:
    """Return the step cache that cache, cache_threshold and TeaCache's own arguments request together."""
    threshold, tea_threshold = short.cache_threshold, short.tea_cache_l1_thresh
    if tea_threshold is not None:
        if asked not in (None, "teacache") or threshold is not None:
            raise ValueError(
                f"tea_cache_l1_thresh={tea_threshold!r} is TeaCache's threshold; it contradicts "
                f"cache={asked!r}, cache_threshold={threshold!r}"
            )
        asked, threshold = "teacache", tea_threshold
    if asked is None and threshold is not None:
        raise ValueError(f"cache_threshold={threshold!r} needs cache, one of {', '.join(CACHES)}")
    if asked is not None and not isinstance(asked, str):
        if threshold is not None:
            raise ValueError(f"cache_threshold={threshold!r} needs cache as a name; got cache={asked!r:.80}")
        return asked
    declared = asked is None
    name = check_value(
        "cache", OrNone(call_options()["cache"][0].kind), defaults["cache"] if declared else asked
    )
    if name is None or model is None:
        return None
    if declared:
        threshold = defaults["cache_threshold"]
    try:
        return choose_cache(name, threshold, model.dim, defaults.mag_ratios, short.tea_cache_model_id)
    except ValueError as error:
        if not declared:
            raise
        logger.warning("no step cache: %s", error)
        return None


def _texts(name: str, given: object) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a str or a list of str; got {given!r:.80}")
    if not texts:
        raise ValueError(f"{name} must be at least one prompt; got {given!r}")
    longest = max(map(len, texts))
    if longest > LONGEST_PROMPT:
        raise ValueError(f"{name} must have at most {LONGEST_PROMPT} characters; got {longest}")
    return list(texts)
