"""A visitor's request, checked before it joins the queue."""

from collections.abc import Mapping
from typing import Any

from diffsynth.configs.descriptors import DEFAULT_MODE, NO_TRANSFER
from diffsynth.configs.fields import Kind, Number, Text, Whole, check_value, options_of
from diffsynth.configs.options import ReferenceOptions, call_options

# Bounds for a visitor of a shared machine, where they are narrower than those of the call.
PAGE_BOUNDS: Mapping[str, Kind] = {
    "prompt": Text(4000),
    "negative_prompt": Text(4000),
    "seed": Whole(0, 2**53),
    "denoising_strength": Number(least=0.05, most=1),
    "num_inference_steps": Whole(1, 200),
    "motion_scale": Number(least=0.1, most=10),
    "height": Whole(16, 2160),
    "width": Whole(16, 2160),
    "num_frames": Whole(1, 481),
    "ref_fps": Number(above=0, most=240),
}


def checked_request(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked options of a visitor's request; a ValueError names what is not allowed."""
    stated = {**call_options(), **options_of(ReferenceOptions)}
    request: dict[str, Any] = {"mode": DEFAULT_MODE}
    for name, value in asked.items():
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        kind = PAGE_BOUNDS[name] if name in PAGE_BOUNDS else stated[name][0].kind
        request[name] = check_value(name, kind, value)
    if not request.get("prompt", "").strip():
        raise ValueError("prompt is empty: say what the video shall show")
    if not request.get("negative_prompt", "").strip():
        request.pop("negative_prompt", None)
    if request["mode"] == NO_TRANSFER or request.get("motion_scale") == 1:
        request.pop("motion_scale", None)
    return request
