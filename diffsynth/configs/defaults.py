"""What a checkpoint says about how to run it, beyond the sizes of its tensors.

The published Wan2.1 checkpoints say nothing, so the published numbers hold. A model of another size may need
others; its config.json then has a section, for example

    "fastvmt": {"num_inference_steps": 25, "height": 64, "width": 64, "num_frames": 17,
                "motion": {"effi_AMF": {"block": 4, "tau": 4.0}}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

SECTION = "fastvmt"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDefaults:
    """Arguments of the pipeline's call where the caller gives none; defaults: the released FastVMT code.

    height, width, num_frames: None takes the reference's. A checkpoint that names them was made for them.
    motion: mode -> fields of `MotionGuidance` that differ from the mode's published numbers.
    """

    num_inference_steps: int = 50
    denoising_strength: float = 0.75
    cfg_scale: float = 5.8
    sigma_shift: float = 7.0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    motion: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


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
    motion = section.get("motion", {})
    if not isinstance(motion, dict) or not all(isinstance(numbers, dict) for numbers in motion.values()):
        raise ValueError(f"{config}: {SECTION!r}: motion must map modes to their numbers; it is {motion!r}")
    return RunDefaults(**section)
