"""What a checkpoint says about how to run it, beyond the sizes of its tensors.

The published Wan2.1 checkpoints say nothing, so the published numbers hold. A model of another size may need
others; its config.json then has a section, for example

    "fastvmt": {"num_inference_steps": 25, "height": 64, "width": 64, "num_frames": 17,
                "motion": {"effi_AMF": {"block": 4, "tau": 4.0}},
                "presets": {"fast": {"sampler": "unipc", "motion": {"effi_AMF": {"guided_steps": 6}}}}}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

SECTION = "fastvmt"
EXACT = "exact"
# For the sizes of the published checkpoints. Counted in full DiT forwards at 480x832x81 they cost 0.24
# and 0.12 of the published procedure.
PUBLISHED_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "balanced": {
            "cache": "magcache",
            "motion": {"effi_AMF": {"coarse": 2, "window": 11}, "AMF": {"coarse": 2}},
        },
        "fast": {
            "num_inference_steps": 25,
            "sampler": "unipc",
            "cache": "magcache",
            "motion": {
                "effi_AMF": {"coarse": 2, "window": 11, "guided_steps": 5, "recompute_every": 2},
                "AMF": {"coarse": 2, "guided_steps": 5, "recompute_every": 2},
                "FlowMotion": {"guided_steps": 5, "recompute_every": 2},
            },
        },
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDefaults:
    """Arguments of the pipeline's call where the caller gives none; defaults: the released FastVMT code.

    height, width, num_frames: None takes the reference's. A checkpoint that names them was made for them.
    motion: mode -> fields of `MotionGuidance` that differ from the mode's published numbers.
    sampler, cache, cache_threshold, cfg_interval: as in the call. mag_ratios: what MagCache decides by, as
    `calibrate_magcache` measures it. presets: name -> any of these fields but `presets` (see `with_preset`).
    """

    num_inference_steps: int = 50
    denoising_strength: float = 0.75
    cfg_scale: float = 5.8
    sigma_shift: float = 7.0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    motion: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    sampler: str = "euler"
    cache: str | None = None
    cache_threshold: float | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    mag_ratios: Mapping[str, Sequence[float]] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: dict(PUBLISHED_PRESETS))


def with_preset(usual: RunDefaults, preset: str) -> RunDefaults:
    """The defaults of a preset: "exact" leaves them as they are, the others trade likeness for time.

    Fields that the preset names replace those of `usual`; of `motion`, the fields of a mode. Raises
    ValueError, with the names there are, for another one.
    """
    if preset == EXACT:
        return usual
    if preset not in usual.presets:
        raise ValueError(f"preset must be one of {', '.join((EXACT, *usual.presets))}; got {preset!r}")
    changes = dict(usual.presets[preset])
    motion = {mode: dict(numbers) for mode, numbers in usual.motion.items()}
    for mode, numbers in changes.pop("motion", {}).items():
        motion[mode] = {**motion.get(mode, {}), **numbers}
    return replace(usual, **changes, motion=motion)


def run_defaults(folder: Path) -> RunDefaults:
    """The defaults of the checkpoint in a folder. Raises ValueError for a section that cannot be read."""
    config = folder / "config.json"
    try:
        declared = json.loads(config.read_text()) if config.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not valid JSON ({error})") from error
    section = declared.get(SECTION, {}) if isinstance(declared, dict) else {}
    known = {item.name for item in fields(RunDefaults)}
    if not isinstance(section, dict) or not section.keys() <= known:
        raise ValueError(f"{config}: {SECTION!r} may hold {', '.join(sorted(known))}; it holds {section!r}")
    presets = section.get("presets", {})
    if not _maps_to_maps(presets) or not all(preset.keys() < known for preset in presets.values()):
        raise ValueError(f"{config}: {SECTION!r}: presets must map names to other fields; it is {presets!r}")
    for place, fields_of in {SECTION: section, **presets}.items():
        motion = fields_of.get("motion", {})
        if not _maps_to_maps(motion):
            raise ValueError(f"{config}: {place!r}: motion must map modes to their numbers; it is {motion!r}")
    return RunDefaults(**section)


def _maps_to_maps(given: object) -> bool:
    return isinstance(given, dict) and all(isinstance(item, dict) for item in given.values())
