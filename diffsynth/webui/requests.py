"""What the page asks for, checked before it joins the queue."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffsynth.configs.defaults import EXACT
from diffsynth.configs.options import MODES
from diffsynth.pipelines.guidance import DEFAULT_MODE, NO_TRANSFER

LONGEST_PROMPT = 4000  # characters
# name -> (least, most): what one visitor may ask of a machine that others share.
RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**53),
    "denoising_strength": (0.05, 1.0),
    "num_inference_steps": (1, 200),
    "motion_scale": (0.1, 10.0),
    "height": (16, 2160),
    "width": (16, 2160),
    "num_frames": (1, 481),
}
WHOLE = ("seed", "num_inference_steps", "height", "width", "num_frames")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One video to make.

    motion_scale: factor on how strongly guidance pulls. seed: None for a new one. height, width, num_frames:
    None for the model's own. Other fields: as in the pipeline's call.
    Raises ValueError or TypeError, naming the field.
    """

    prompt: str
    negative_prompt: str = ""
    preset: str = EXACT
    mode: str = DEFAULT_MODE
    seed: int | None = None
    denoising_strength: float | None = None
    num_inference_steps: int | None = None
    motion_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "preset", "mode"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text; got {getattr(self, name)!r:.80}")
        if not self.prompt.strip():
            raise ValueError("prompt is empty: say what the video shall show")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name)) > LONGEST_PROMPT:
                raise ValueError(f"{name} is longer than {LONGEST_PROMPT} characters")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r:.80}")
        for name, (least, most) in RANGES.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), least, most))

    def given(self) -> dict[str, Any]:
        """The options of `fastvmt transfer` that say the same."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mode == NO_TRANSFER or self.motion_scale == 1:
            del values["motion_scale"]
        if not self.negative_prompt.strip():
            del values["negative_prompt"]
        return {name: value for name, value in values.items() if value is not None}


def _number(name: str, value: float | None, least: float, most: float) -> float | int | None:
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and name in WHOLE:
        good = value == int(value)
    if not good or not least <= value <= most:
        kind = "a whole number" if name in WHOLE else "a number"
        raise ValueError(f"{name} must be {kind} from {least:g} to {most:g}; got {value!r:.40}")
    return int(value) if name in WHOLE else float(value)
