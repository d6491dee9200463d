"""Defaults that a checkpoint declares: options, numbers of motion, presets.

A published checkpoint has `PUBLISHED_DEFAULTS`. Any checkpoint may declare its own in its config.json:

    "fastvmt": {"num_inference_steps": 25, "height": 64, "width": 64, "num_frames": 17,
                "motion": {"effi_AMF": {"block": 4, "tau": 4.0}},
                "presets": {"fast": {"sampler": "unipc", "motion": {"effi_AMF": {"guided_steps": 6}}}},
                "words": ["a", "red", "circle"], "dtype": "float32", "reads_db": 27.5}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from diffsynth.configs.cache_tables import MagRatios
from diffsynth.configs.checkpoints import PUBLISHED, PUBLISHED_DEFAULTS, PUBLISHED_PRESETS, published_key
from diffsynth.configs.fields import Number, Option, check_value, options_of
from diffsynth.configs.guidance import MotionGuidance, changed_numbers, check_heads
from diffsynth.configs.options import FileOptions, LoadOptions, RunOptions, call_options

SECTION = "fastvmt"
EXACT = "exact"
Numbers = Mapping[str, Mapping[str, Any]]
_STATED = {**call_options(), **options_of(FileOptions), "dtype": options_of(LoadOptions)["dtype"]}
_STATED["reads_db"] = (Option(kind=Number(above=0), help="PSNR of the VAE that guidance needs, in dB"), None)
# What a checkpoint or preset may declare.
_DECLARABLE = {*options_of(RunOptions), "cache_threshold", "fps", "negative_prompt"}
_DECLARABLE -= {"motion", "seed", "output_type", "rand_device"}
_OTHERS = ("motion", "mag_ratios", "presets", "words")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDefaults:
    """Defaults for the options that a caller leaves out.

    Attributes:
        options: options of the call, fps and negative_prompt that differ from the published method's, and
            dtype, the type of weights on every device.
        motion: mode -> fields of `MotionGuidance` that differ from the mode's published numbers.
        mag_ratios: MagCache's ratios, as `calibrate_magcache` measures them.
        presets: name -> options and motion that the preset changes (see `with_preset`).
        words: all words that the model knows, in lower case; None for a model of any words.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    motion: Numbers = field(default_factory=dict)
    mag_ratios: Mapping[str, Sequence[float]] | None = None
    presets: Numbers = field(default_factory=lambda: dict(PUBLISHED_PRESETS))
    words: Sequence[str] | None = None

    def __getitem__(self, name: str) -> Any:
        """Return the default of an option: the declared one, else the published method's, else None."""
        return self.options.get(name, _STATED[name][1] if name in _STATED else None)

    def with_preset(self, preset: str) -> "RunDefaults":
        """Return the defaults of a preset; "exact" leaves them as they are.

        Raises:
            ValueError: the preset is unknown; the message lists the known ones.
        """
        if preset == EXACT:
            return self
        if preset not in self.presets:
            raise ValueError(f"preset must be one of {', '.join((EXACT, *self.presets))}; got {preset!r:.80}")
        changes = dict(self.presets[preset])
        motion = {mode: dict(numbers) for mode, numbers in self.motion.items()}
        for mode, numbers in changes.pop("motion", {}).items():
            motion[mode] = changed_numbers(motion.get(mode, {}), numbers)
        return replace(self, options={**self.options, **changes}, motion=motion)


class Blocks(Protocol):
    """A DiT, of which blocks and heads can be read."""

    num_layers: int
    num_heads: int


def run_defaults(folder: Path, dit: Blocks | None = None) -> RunDefaults:
    """Return the defaults of the checkpoint in a folder, checked against its DiT if that is loaded.

    Raises:
        ValueError: config.json is not valid, or declares an unknown entry; the message names file and entry.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    section = config.get(SECTION, {}) if isinstance(config, dict) else {}
    known = {*_DECLARABLE, "dtype", "reads_db", *_OTHERS}
    if not isinstance(section, dict) or not section.keys() <= known:
        raise ValueError(f"{path}: {SECTION!r} may hold {', '.join(sorted(known))}; it has {section!r:.200}")
    presets = section.get("presets", {})
    if not _maps_to_maps(presets) or any(p.keys() - {*_DECLARABLE, "motion"} for p in presets.values()):
        raise ValueError(f"{path}: {SECTION!r}: presets must map names to other fields; it is {presets!r}")
    for name, entry in {SECTION: section, **presets}.items():
        if not _maps_to_maps(entry.get("motion", {})):
            raise ValueError(f"{path}: {name!r}: motion must map modes to numbers; it is {entry['motion']!r}")
        try:
            for option, value in entry.items():
                if option in _STATED and option != "motion":
                    check_value(option, _STATED[option][0].kind, value)
            for mode, numbers in entry.get("motion", {}).items():
                guidance = MotionGuidance.for_mode(mode, numbers)
                if dit is not None:
                    guidance.block_for(dit.num_layers)
                    check_heads(guidance.heads, dit.num_heads, (1, 1, dit.num_heads))
            if entry.get("mag_ratios") is not None:
                MagRatios.from_json(entry["mag_ratios"])
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from error
    words = section.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: {SECTION!r}: words must be a list of texts; it is {words!r:.200}")
    options = {name: value for name, value in section.items() if name not in _OTHERS}
    others = {name: value for name, value in section.items() if name in _OTHERS}
    place = folder.resolve()  # of an expert, or of a DiT in the diffusers layout: inside the checkpoint's
    key = published_key(place) or published_key(place.parent)
    published = RunDefaults() if key is None else published_defaults(key)
    return replace(published, **{"options": {**published.options, **options}, **others})


def published_defaults(key: str) -> RunDefaults:
    """Return the defaults of a published checkpoint, a key of `PUBLISHED`."""
    options = {**PUBLISHED_DEFAULTS, **PUBLISHED[key].defaults}
    return RunDefaults(motion=options.pop("motion", {}), options=options)


def _maps_to_maps(given: object) -> bool:
    return isinstance(given, dict) and all(isinstance(item, dict) for item in given.values())
