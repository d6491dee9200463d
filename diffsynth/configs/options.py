"""Every option of a run, stated once: its kind, bounds, unit, help and default.

`RunOptions` are what a run goes by. `Shorthands` are arguments of the call that set some of them; `resolve`,
in resolve.py, turns both into `RunOptions`. Defaults here are the published method's. A new option is a field
here, its type for type checkers in `call_types.pyi`, and the code that reads it.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.descriptors import DESCRIPTORS, NO_TRANSFER
from diffsynth.configs.fields import (
    Choice,
    Levels,
    Number,
    Option,
    OrNone,
    Several,
    Switch,
    Text,
    Whole,
    check_options,
    describe,
    only_known,
    option,
    options_of,
)
from diffsynth.configs.guidance import MotionGuidance, shifted_level
from diffsynth.configs.kinds import AlignmentKind, CacheKind, CacheMaker, MotionChanges, MotionKind

# The samplers of `diffsynth.schedulers`.
SAMPLERS: dict[str, str] = {
    "euler": "diffsynth.schedulers.flow_match:FlowMatchScheduler",
    "unipc": "diffsynth.schedulers.unipc:UniPCScheduler",
    "renoise": "diffsynth.schedulers.flow_match:RenoiseScheduler",
}
# Every mode, also of a descriptor that is registered later. Iterated, the one without transfer is the last.
MODES: Mapping[str, Any] = ChainMap({NO_TRANSFER: None}, DESCRIPTORS)
TILING = ("tiled", "tile_size", "tile_stride")  # as the VAE names them, too
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FITS = ("crop", "pad", "stretch")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
WIDE_DTYPES = DTYPES[:3]  # that models compute in; eight bits are for storage
MOTION_PREFIX = "motion_"  # of the names of motion's numbers on the command line and in batch files
# Pictures, by argument of the call: the name in commands and batch files, and what the video does with it.
PICTURES = {"input_image": ("image", "begins with"), "end_image": ("end_image", "ends with")}
DEFAULT_FPS = 15.0  # of a video whose reference and checkpoint name no rate
ATTENTION = ("flash_attn_3", "flash_attn_2", "sdpa", "sage")
MOST_PIXELS = 2**33  # of all frames together: 1,000 of 3840x2160
_ROWS_COLUMNS = ("rows", "columns")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedOptions:
    """Options whose values are checked: ValueError that names the option whose value is not allowed."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of a run, apart from prompts, reference and callbacks.

    Raises:
        ValueError: a value that is not allowed; the message names the option.
    """

    height: int = option(Whole(1, 16384), "pixels", default=480)
    width: int = option(Whole(1, 16384), "pixels", default=832)
    num_frames: int = option(Whole(1, 100_000), "frames of the output, any count", default=81, short="frames")
    num_inference_steps: int = option(Whole(1, 1000), "denoising steps", default=50, short="steps")
    denoising_strength: float = option(
        Number(above=0, most=1), "how far the reference is noised", default=0.75, short="strength"
    )
    cfg_scale: float = option(
        Number(), "classifier-free guidance, v_neg + cfg_scale * (v_pos - v_neg); 1: without", default=5.8
    )
    low_noise_cfg_scale: float | None = option(
        OrNone(Number(), "cfg_scale"), "cfg_scale of the low-noise expert, for models of two"
    )
    low_noise_motion: Mapping[str, Any] | None = option(
        OrNone(MotionChanges()), "numbers of motion that the low-noise expert has instead, for models of two"
    )
    boundary: float = option(
        Number(least=0, most=1),
        "share of the timesteps from which on the high-noise expert runs, for models of two",
        default=0.875,
    )
    sigma_shift: float = option(Number(above=0, most=1000), "shift of the noise schedule", default=7.0)
    # PyTorch's generator of a CPU uses the low 32 bits: larger seeds would repeat videos.
    seed: int = option(Whole(0, 2**32 - 1), "seed of the noise; drawn if not given or -1", default=0)
    rand_device: str = option(Text(), "device on which the noise is drawn", default="cpu")
    tiled: bool | None = option(
        OrNone(Switch(), "where the whole does not fit"),
        "encode and decode in spatial tiles, which saves memory",
    )
    tile_size: tuple[int, int] = option(
        Several(Whole(1), _ROWS_COLUMNS), "side of a VAE tile, in latent units", default=(30, 52)
    )
    tile_stride: tuple[int, int] = option(
        Several(Whole(1), _ROWS_COLUMNS), "from VAE tile to VAE tile, in latent units", default=(15, 26)
    )
    sampler: str = option(Choice(SAMPLERS), "the solver; renoise: of few-step (DMD) models", default="euler")
    sigmas: tuple[float, ...] | None = option(
        OrNone(Levels(), "none"), "noise levels, one a step, instead of steps, strength and shift"
    )
    refine: float = option(
        Number(least=0, most=1),
        "noise the finished sample so far and denoise it again without transfer, which brings details back",
        default=0.0,
    )
    align: Any = option(
        AlignmentKind(),
        "where a picture's object lies elsewhere than what moves in the reference, the reference is moved "
        "there (object) or not (none), or right, down (pixels) and scaled as you say",
        default="object",
    )
    motion: MotionGuidance | None = option(MotionKind(), "what is transferred and how")
    cache: CacheOptions | CacheMaker | None = option(
        CacheKind(), "steps that reuse the work of an earlier one"
    )
    cfg_interval: tuple[float, float] = option(
        Several(Number(least=0, most=1), ("from", "to")),
        "shares of the steps in which the negative prompt runs",
        default=(0.0, 1.0),
    )
    batch_cfg: bool | None = option(
        OrNone(Switch(), "by the memory at hand"), "both prompts in one call of the DiT"
    )
    output_type: str = option(Choice(OUTPUT_TYPES), "what a call returns", default="pil")
    deterministic: bool = option(
        Switch(), "on a CUDA device give the same bits again, more slowly; a CPU always does", default=False
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.height * self.width * self.num_frames > MOST_PIXELS:
            raise ValueError(
                f"height * width * num_frames must be at most {MOST_PIXELS} pixels; got "
                f"{self.height} * {self.width} * {self.num_frames}"
            )
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise ValueError(f"cfg_interval must be (from, to) with from <= to; got {self.cfg_interval!r}")
        if self.sigmas is not None:
            object.__setattr__(self, "num_inference_steps", len(self.sigmas))
            if self.sampler == "unipc" and self.sigmas[0] == 1:
                raise ValueError("sigmas must be below 1 for sampler unipc; the first is 1")
        if any(stride > size for stride, size in zip(self.tile_stride, self.tile_size, strict=True)):
            raise ValueError(
                "tile_stride must not exceed tile_size, or gaps are left; "
                f"got {self.tile_stride} > {self.tile_size}"
            )

    @property
    def mode(self) -> str:
        return NO_TRANSFER if self.motion is None else self.motion.mode

    @property
    def size(self) -> tuple[int, int, int]:
        """Number, height and width of the frames."""
        return self.num_frames, self.height, self.width

    @property
    def guided(self) -> range:
        """The indices of the guided steps."""
        return range(0) if self.motion is None else self.motion.guided_range(self.num_inference_steps)

    @property
    def second_pass(self) -> "RunOptions | None":
        """The options of the pass that `refine` adds to a run with motion; None if there is none."""
        if not self.refine or self.motion is None:
            return None
        begins = replace(self, refine=0.0, denoising_strength=self.refine, seed=(self.seed + 1) % 2**32)
        steps = max(1, round(self.refine * self.num_inference_steps))
        return replace(begins, num_inference_steps=steps, motion=None, cache=None, sigmas=None)

    @property
    def of_low_noise(self) -> "RunOptions":
        """The options of the low-noise expert of two."""
        scale = self.cfg_scale if self.low_noise_cfg_scale is None else self.low_noise_cfg_scale
        motion = self.motion and replace(self.motion, **(self.low_noise_motion or {}))
        return replace(self, cfg_scale=scale, motion=motion)

    @property
    def levels(self) -> list[float]:
        """The noise level of each step, in 0..1; those of UniPC are up to a thousandth lower."""
        if self.sigmas is not None:
            return list(self.sigmas)
        steps = self.num_inference_steps
        falling = (self.denoising_strength * (1 - i / steps) for i in range(steps))
        return [shifted_level(level, self.sigma_shift) for level in falling]

    @property
    def tiling(self) -> dict[str, Any]:
        """The VAE's arguments for tiling."""
        return {name: getattr(self, name) for name in TILING}

    @property
    def cfg_steps(self) -> range:
        """The steps with classifier-free guidance; the bounds of cfg_interval are rounded to whole steps."""
        first, end = (round(share * self.num_inference_steps) for share in self.cfg_interval)
        return range(first, end) if self.cfg_scale != 1 else range(0)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON can hold them; a caller's own cache is named by its repr."""
        values, cache = asdict(replace(self, cache=None)), self.cache
        if cache is not None:
            values["cache"] = asdict(cache) if isinstance(cache, CacheOptions) else {"name": repr(cache)}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunOptions":
        """Return the options in a mapping from `to_json`; those that are missing have their defaults.

        Raises:
            ValueError: an option is unknown, or a value is not allowed.
        """
        only_known(values, cls, "options")
        motion, cache = values.get("motion"), values.get("cache")
        for name, value in {"motion": motion, "cache": cache}.items():
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"options: {name} must be an object or null; got {value!r:.80}")
        if motion is not None:
            motion = MotionGuidance.for_mode(motion.get("mode", ""), motion)
        if cache is not None:
            cache = CacheOptions.from_json(cache)
        return cls(**{**values, "motion": motion, "cache": cache})


@dataclass(frozen=True, kw_only=True, slots=True)
class Shorthands(CheckedOptions):
    """Arguments of the call that set options of the run. None or an empty text leaves those options alone."""

    preset: str = option(Text(), "set of defaults: exact, balanced, fast or the model's own", default="exact")
    mode: str | None = option(OrNone(Choice(MODES)), "how motion is transferred")
    sf: int | None = option(OrNone(Whole(2)), "frames that each latent frame is compared with, as in motion")
    motion_scale: float | None = option(
        OrNone(Number(least=0.001, most=1000)),
        "factor on the learning rates: above 1 follows the motion more closely, 0.5 half as strongly",
    )
    cache_threshold: float | None = option(
        OrNone(Number(least=0)), "threshold of the cache, instead of the published one"
    )
    tea_cache_l1_thresh: float | None = option(OrNone(Number(least=0)), "threshold of TeaCache")
    tea_cache_model_id: str = option(Text(), "whose coefficients TeaCache takes", default="")
    vram_budget_gb: float | None = option(
        OrNone(Number(above=0, most=100_000)), "device memory for the run, GB of 2**30 bytes", short="vram"
    )


def call_options() -> dict[str, tuple[Option, Any]]:
    """Return name -> (option, default) for all options of the call."""
    return {**options_of(Shorthands), **options_of(RunOptions)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOptions(CheckedOptions):
    """Options of the video file that frames are written to."""

    fps: float | None = option(
        OrNone(Number(above=0), "the reference's, else the model's"), "frames a second"
    )
    quality: float = option(Number(least=0, most=10), "0 (small file) to 10 (best)", default=8.0)
    lossless: bool = option(
        Switch(), "keep every pixel bit-identical; for .mkv, .avi and .webm", default=False
    )
    keep_audio: bool = option(Switch(), "keep the sound of the reference", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceOptions(CheckedOptions):
    """Options of reading a reference video."""

    ref_fps: float | None = option(
        OrNone(Number(above=0), "its own"), "frames a second at which the reference is read"
    )
    start: float | None = option(OrNone(Number(least=0)), "second of the reference at which its use begins")
    end: float | None = option(OrNone(Number(above=0)), "second of the reference at which its use ends")
    fit: str = option(Choice(FITS), "how the reference's frames get another aspect", default="crop")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions(CheckedOptions):
    """Options of loading and running a model, which records hold; None leaves a choice to the pipeline.

    Attributes:
        dit: a file, or a folder that holds one; likewise text_encoder and vae.
        loras: LoRA file -> strength; the files are merged into the DiT.
    """

    dit: str | None = option(OrNone(Text()), "weights of the DiT, instead of the model's")
    text_encoder: str | None = option(OrNone(Text()), "text encoder instead of the model's")
    vae: str | None = option(OrNone(Text()), "weights of the VAE, instead of the model's")
    device: str | None = option(OrNone(Text()), "auto, cpu, cuda, cuda:1, ...")
    dtype: str | None = option(OrNone(Choice(DTYPES)), "type of the weights; float32 on a CPU, else bfloat16")
    vae_dtype: str | None = option(OrNone(Choice(WIDE_DTYPES)), "type of the VAE (float32)")
    attention: str | None = option(
        OrNone(Choice(ATTENTION)), "attention kernel; by default the best one that is installed"
    )
    compile: bool | None = option(OrNone(Switch()), "compile the DiT's blocks")
    offload: bool | None = option(OrNone(Switch()), "models stay on the CPU between stages")
    persistent: int | None = option(
        OrNone(Whole(0)),
        "stream the DiT's blocks from the CPU but for this many parameters, which stay on the device",
    )
    loras: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingOptions(CheckedOptions):
    """Options of saving the state of a long run."""

    checkpoint_every: int = option(Whole(1), "steps from save to save", default=5)
    checkpoint_minutes: float = option(Number(above=0), "or minutes, whichever comes first", default=2.0)
    resume: bool = option(Switch(), "continue an unfinished run; otherwise it is discarded", default=True)


_DESCRIBED = RunOptions, Shorthands, MotionGuidance, CacheOptions, FileOptions, ReferenceOptions, LoadOptions
for _owner in _DESCRIBED:
    describe(_owner)
