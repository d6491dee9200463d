"""The arguments of one generation, checked before any heavy work."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from diffsynth.data.frames import checked_int
from diffsynth.models.wan_video_vae_tiling import TileGrid
from diffsynth.motion import MODES as MOTION_MODES
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.denoise import steps_with_cfg
from diffsynth.pipelines.guidance import NO_TRANSFER
from diffsynth.pipelines.step_cache import CacheMaker
from diffsynth.schedulers import SAMPLERS

logger = logging.getLogger(__name__)

MODES = (*MOTION_MODES, NO_TRANSFER)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """What a generation does, apart from prompts, reference and callbacks.

    height, width: pixels. num_frames: of the output, any count from 1.
    num_inference_steps: denoising steps. denoising_strength: in (0, 1], how far towards noise the reference
    is taken. cfg_scale: classifier-free guidance, v_neg + cfg_scale * (v_pos - v_neg); 1 runs the positive
    prompt alone. sigma_shift: of the noise schedule. seed: of the noise; rand_device: where it is drawn.
    tiled, tile_size, tile_stride: spatial tiling of the VAE, (rows, columns) in latent units.
    motion: what is transferred and how; None for no transfer.
    cache: which steps reuse an earlier one's work; None for none. cfg_interval: (from, to) as shares of the
    run's steps, in which the negative prompt runs; in the others the positive one runs alone.
    batch_cfg: both prompts in one DiT call (True), two calls (False), or by memory (None).
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    denoising_strength: float
    cfg_scale: float
    sigma_shift: float
    seed: int
    rand_device: str
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]
    sampler: str
    motion: MotionGuidance | None
    cache: CacheMaker | None
    cfg_interval: tuple[float, float]
    batch_cfg: bool | None
    output_type: str

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            _set(self, name, checked_int(name, getattr(self, name)))
        for name in ("denoising_strength", "cfg_scale", "sigma_shift"):
            given = getattr(self, name)
            _check(isinstance(given, int | float) and math.isfinite(given), name, given, "a finite number")
        _check(0 < self.denoising_strength <= 1, "denoising_strength", self.denoising_strength, "in (0, 1]")
        _check(0 < self.sigma_shift <= 1000, "sigma_shift", self.sigma_shift, "above 0, at most 1000")
        _set(self, "seed", checked_int("seed", self.seed, minimum=-(2**63)))
        _check(self.seed < 2**64, "seed", self.seed, "a whole number of at most 64 bits")
        for name in ("tile_size", "tile_stride"):
            _set(self, name, _pair(name, getattr(self, name)))
        TileGrid(shape=(1, 1), size=self.tile_size, stride=self.tile_stride)
        _check(self.batch_cfg in (None, True, False), "batch_cfg", self.batch_cfg, "True, False or None")
        steps_with_cfg(self.cfg_interval, self.num_inference_steps)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("output_type", self.output_type, OUTPUT_TYPES)
        self.generator()

    def generator(self) -> torch.Generator:
        """A new random generator of the run's noise. Raises ValueError if rand_device has none."""
        try:
            return torch.Generator(self.rand_device).manual_seed(self.seed)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"rand_device is {self.rand_device!r}, which draws no numbers here ({error})"
            ) from error

    @property
    def mode(self) -> str:
        return NO_TRANSFER if self.motion is None else self.motion.mode

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def _check(good: bool, name: str, given: object, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}; got {given!r}")


def check_mode(mode: str | None) -> None:
    """Raises ValueError, naming the known modes, for an unknown one."""
    if mode is not None:
        _check_choice("mode", mode, MODES)


def _set(options: GenerationOptions, name: str, value: object) -> None:
    """Replace a field by its checked value; the dataclass is frozen for everybody else."""
    object.__setattr__(options, name, value)


def _pair(name: str, given: object) -> tuple[int, int]:
    """Two whole numbers of at least 1 from any kind of pair."""
    _check(
        isinstance(given, Iterable) and len(list(given)) == 2,
        name,
        given,
        "two whole numbers, (rows, columns)",
    )
    return tuple(checked_int(name, n) for n in given)


def _check_choice(name: str, given: object, known: Sequence[str]) -> None:
    _check(given in known, name, given, f"one of {', '.join(known)}")
