"""The methods that quality is measured of, and what their guidance costs by count."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffsynth.configs.defaults import EXACT
from diffsynth.configs.descriptors import DEFAULT_MODE, DESCRIPTORS, NO_TRANSFER
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.planning.cost import guidance_cost

VIDEO_TO_VIDEO = {f"video-to-video {strength}": strength for strength in (0.7, 0.8, 0.9)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to make a video from a reference and a prompt, by name.

    arguments: of the pipeline's call; what they leave out is the checkpoint's default. takes_reference:
    whether the call gets the reference. reconstructs: no generation, the VAE's reconstruction of the
    reference: the floor under every error.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    takes_reference: bool = True
    reconstructs: bool = False

    @property
    def motion(self) -> MotionGuidance | None:
        return self.arguments.get("motion")


def guided(name: str, motion: MotionGuidance, **arguments: object) -> Method:
    """A method that guides with these numbers; arguments: others of the pipeline's call."""
    return Method(name=name, arguments={"motion": motion, **arguments})


def standard_methods(pipe: WanVideoPipeline, height: int = 64, width: int = 64) -> list[Method]:
    """Return the methods to compare, every mode of the registry among them, for videos of a size in pixels.

    They have the numbers that the checkpoint declares, else the published ones.
    """
    tile_flow = _declared(pipe, "effi_AMF")
    dense = _declared(pipe, "AMF") if "AMF" in pipe.defaults.motion else replace(tile_flow, mode="AMF")
    prediction = _declared(pipe, "FlowMotion")
    steps, layers = pipe.defaults["num_inference_steps"], pipe.dit.num_layers
    rows, cols = pipe.models.facts().pixels_per_token
    others = [mode for mode in DESCRIPTORS if mode not in ("effi_AMF", "AMF", "FlowMotion")]
    return [
        Method(name="VAE_floor", reconstructs=True),
        Method(name=NO_TRANSFER, arguments={"mode": NO_TRANSFER}, takes_reference=False),
        *(
            Method(name=name, arguments={"mode": NO_TRANSFER, "denoising_strength": strength})
            for name, strength in VIDEO_TO_VIDEO.items()
        ),
        guided("AMF", dense),
        guided("effi_AMF", tile_flow),
        guided("effi_AMF released()", released_for((height // rows, width // cols))),
        guided("FlowMotion", prediction),
        guided("FlowMotion at equal FFE", at_equal_cost(prediction, tile_flow, layers, steps)),
        *(guided(mode, _declared(pipe, mode)) for mode in others),
    ]


def methods_from(path: str | Path, pipe: WanVideoPipeline) -> list[Method]:
    """Variants to compare, from a JSON file: name -> {"mode": ..., "motion": {...}, arguments of the call}.

    motion: fields of MotionGuidance that differ from what the checkpoint uses in that mode, or in the preset
    that the variant names. Raises ValueError for a file that is not such JSON and for unknown fields.
    """
    variants = json.loads(Path(path).read_text())
    if not isinstance(variants, dict) or not all(isinstance(item, dict) for item in variants.values()):
        raise ValueError(f"{path} must map names of variants to their settings")
    methods = []
    for name, given in variants.items():
        arguments = dict(given)
        mode, changes = arguments.pop("mode", DEFAULT_MODE), arguments.pop("motion", {})
        defaults = pipe.defaults.with_preset(arguments.get("preset", EXACT))
        numbers = {**defaults.motion.get(mode, {}), **changes}
        methods.append(guided(name, MotionGuidance.for_mode(mode, numbers), **arguments))
    return methods


def _declared(pipe: WanVideoPipeline, mode: str) -> MotionGuidance:
    return MotionGuidance.for_mode(mode, pipe.defaults.motion.get(mode, {}))


def released_for(grid: tuple[int, int]) -> MotionGuidance:
    """The released numbers for a grid of tokens, changed where the released code could not run on it.

    Its tiles must divide the grid, half of its window must be smaller than each side, and its block is the
    one at the same relative depth.
    """
    published = MotionGuidance.released()
    tile = tuple(
        max(step for step in range(1, most + 1) if side % step == 0)
        for side, most in zip(grid, published.tile, strict=True)
    )
    return replace(published, block=None, tile=tile, window=min(published.window, 2 * min(grid) - 1))


def at_equal_cost(
    prediction: MotionGuidance, flow: MotionGuidance, num_layers: int, num_steps: int
) -> MotionGuidance:
    """FlowMotion with as many guided steps as a flow guidance, and as many inner steps as cost the same."""
    guided_steps = min(flow.guided_steps, num_steps)
    budget = guidance_cost(flow, num_layers, num_steps) / max(guided_steps, 1)
    one = replace(prediction, guided_steps=1, inner_steps=1, interval=1)
    two = replace(one, inner_steps=2)
    first, second = (guidance_cost(motion, num_layers, num_steps) for motion in (one, two))
    inner_steps = max(1, round(1 + (budget - first) / (second - first)))
    return replace(prediction, guided_steps=flow.guided_steps, inner_steps=inner_steps, interval=1)
