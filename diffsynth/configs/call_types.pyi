"""Types of the call's arguments, for type checkers alone; a test compares their names with the options."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import Unpack as Unpack

from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.kinds import CacheMaker

class _OptionsOfAllOutputs(TypedDict, total=False):
    height: int | None
    width: int | None
    num_frames: int | None
    num_inference_steps: int | None
    denoising_strength: float | None
    cfg_scale: float | None
    low_noise_cfg_scale: float | None
    boundary: float | None
    sigma_shift: float | None
    seed: int | None
    rand_device: str | None
    tiled: bool | None
    tile_size: tuple[int, int] | None
    tile_stride: tuple[int, int] | None
    sampler: str | None
    sigmas: Sequence[float] | None
    refine: float | None
    align: str | Sequence[float] | None
    motion: MotionGuidance | Mapping[str, Any] | None
    cache: str | CacheOptions | CacheMaker | None
    cfg_interval: tuple[float, float] | None
    batch_cfg: bool | None
    deterministic: bool
    preset: str | None
    mode: str | None
    sf: int | None
    motion_scale: float | None
    cache_threshold: float | None
    tea_cache_l1_thresh: float | None
    tea_cache_model_id: str | None
    vram_budget_gb: float | None

class CallOptions(_OptionsOfAllOutputs, total=False):
    """Types of the arguments of the call that `RunOptions` and `Shorthands` state, for type checkers."""

    output_type: str | None

class CallArguments(_OptionsOfAllOutputs, total=False):
    """Types of all that the call takes by name alone, but for output_type, which decides what it returns."""

    input_image: Any
    end_image: Any
    progress_bar_cmd: Callable[..., Any] | None
    callback_on_step_end: Callable[..., Any] | None
    observer: Callable[..., Any] | None
    test_latency: bool
    latency_dir: str | Path | None
    checkpoint_dir: str | Path | None
    checkpoint_every: int
    checkpoint_minutes: float
    resume: bool
