"""Before a run: the fastest settings that fit into the memory there is, with predicted peaks and cost.

Settings are tried in this order, and the first that fits is taken:

1. what the guidance pass keeps: everything; each block's input, which costs a forward more a gradient; these
   inputs on the CPU;
2. for each of these, where weights are: all on the device; each model in its own stages only; the DiT's
   blocks streamed, with as many of them resident as fit.

With these two decided, each stage on its own takes the fast way if that fits: the text encoder whole, the VAE
untiled, both prompts in one DiT call. Streaming goes before keeping less, because at sizes that do not fit
blocks compute for longer than they take to come.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import CacheMaker, RunOptions
from diffsynth.planning.cost import RunCount, run_cost
from diffsynth.planning.memory import MemorySettings, StageMemory, Video, predict_stages
from diffsynth.planning.sizes import ModelSizes
from diffsynth.vram_management import Residency

GB = 2**30  # as cards are sold
# Of the budget, for what is not a tensor: the device's context, work space of kernels, gaps between tensors.
RESERVED = GB * 3 // 4
KEEPING = ("none", "block", "offload")


class NotEnoughMemoryError(ValueError):
    """No settings fit into the budget. needed: bytes that the most frugal ones take, all included."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """A run to be planned: as the arguments of `plan_run`, with the models' sizes."""

    sizes: ModelSizes
    height: int
    width: int
    num_frames: int
    num_steps: int
    motion: MotionGuidance | None
    with_reference: bool
    with_negative: bool
    cfg_interval: tuple[float, float]
    cache: CacheMaker | None
    batch_cfg: bool | None
    tiled: bool | None
    tile_size: tuple[int, int]

    def stages(self, settings: MemorySettings) -> tuple[StageMemory, ...]:
        """Predicted memory under some settings."""
        latents = self.sizes.latent_shape(self.height, self.width, self.num_frames)
        video = Video(latents=latents, num_frames=self.num_frames, has_reference=self.with_reference)
        return predict_stages(
            self.sizes,
            video,
            settings,
            motion=self.motion,
            with_negative=self.with_negative,
            cache=self.cache,
        )

    def keeping(self) -> tuple[str, ...]:
        """What the guidance pass may keep."""
        if self.motion is None or self.motion.mode == "FlowMotion":
            return ("none",)
        return KEEPING if self.motion.checkpoint == "auto" else (self.motion.checkpoint,)

    def frugal(self) -> MemorySettings:
        """The settings that need least, of those that are allowed."""
        return MemorySettings(
            checkpoint=self.keeping()[-1],
            batch_cfg=bool(self.batch_cfg),
            tiled=self.tiled is not False,
            tile_size=self.tile_size,
            offload=True,
            resident_blocks=0,
            stream_text_encoder=True,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """How a run is to be made, and what it will take.

    model, mode: their names. height, width: pixels. checkpoint: for `MotionGuidance`; batch_cfg, tiled: for
    the call. offload: models rest on the CPU, each on the device in its stages; then
    num_persistent_param_in_dit, if not None, streams the DiT's blocks but for those of so many parameters,
    and stream_text_encoder streams the text encoder's. stages: predicted bytes; cost: by count.
    budget: bytes, None without.
    """

    model: str
    mode: str
    height: int
    width: int
    num_frames: int
    num_steps: int
    checkpoint: str
    batch_cfg: bool
    tiled: bool
    offload: bool
    num_persistent_param_in_dit: int | None
    stream_text_encoder: bool
    stages: tuple[StageMemory, ...]
    cost: RunCount
    budget: int | None

    @property
    def peak_stage(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Predicted bytes of tensors at the run's peak."""
        return self.peak_stage.total

    def place(self, residency: Residency) -> None:
        """Have the models of a pipeline where the plan says."""
        if not self.offload:
            residency.stop_streaming()
            residency.offload = False
            return
        residency.offload = True
        residency.rest()
        residency.stop_streaming()
        if self.num_persistent_param_in_dit is not None:
            residency.stream("dit", residency.models["dit"].blocks, self.num_persistent_param_in_dit)
        if self.stream_text_encoder:
            residency.stream("text_encoder", residency.models["text_encoder"].encoder.block)

    def settings(self) -> dict[str, object]:
        """What was chosen, by name."""
        names = (
            "checkpoint", "batch_cfg", "tiled", "offload", "num_persistent_param_in_dit",
            "stream_text_encoder",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """All of it as JSON; memory in bytes."""
        totals = {"peak": self.peak, "peak_stage": self.peak_stage.stage, "reserved": RESERVED}
        cost = asdict(self.cost) | {"total_ffe": self.cost.total_ffe}
        return json.dumps(asdict(self) | {"cost": cost} | totals, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.height}x{self.width}x{self.num_frames}, "
            f"{self.num_steps} steps, {self.mode}",
            f"{'GB':<14}{'weights':>10}{'activations':>13}{'peak':>8}",
        ]
        for stage in self.stages:
            numbers = (stage.weights / GB, stage.activations / GB, stage.total / GB)
            mark = "  <- peak" if stage is self.peak_stage else ""
            lines.append("{:<14}{:>10.2f}{:>13.2f}{:>8.2f}".format(stage.stage, *numbers) + mark)
        budget = "no budget" if self.budget is None else f"budget {self.budget / GB:.1f} GB"
        lines += [
            f"{self.peak / GB:.2f} GB of tensors and {RESERVED / GB:.2f} GB for the device itself; {budget}",
            "settings: " + ", ".join(f"{name}={value}" for name, value in self.settings().items()),
            f"cost: {self.cost.sampling_ffe:.4g} FFE of sampling + {self.cost.guidance_ffe:.4g} of guidance "
            f"= {self.cost.total_ffe:.4g}; {self.cost.flops / 1e15:.4g} PFLOP",
        ]
        return "\n".join(lines)


def plan_run(
    sizes: ModelSizes, options: RunOptions, *, vram_gb: float | None, with_reference: bool
) -> RunPlan:
    """Return the fastest settings of a run that fit into vram_gb, in the order above.

    A checkpoint other than "auto" is obeyed, and so is a batch_cfg that is not None. Weights keep their
    dtype.

    Args:
        sizes: of the models.
        options: of the run, as resolved.
        vram_gb: all the memory of the device that may be used, in GB of 2**30 bytes; None for no limit.
        with_reference: whether a video is encoded.

    Raises:
        NotEnoughMemoryError: no settings fit.
    """
    request = RunRequest(
        sizes=sizes,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_steps=options.num_inference_steps,
        motion=options.motion,
        with_reference=with_reference,
        with_negative=options.cfg_scale != 1,
        cfg_interval=options.cfg_interval,
        cache=options.cache,
        batch_cfg=options.batch_cfg,
        tiled=options.tiled,
        tile_size=options.tile_size,
    )
    budget = None if vram_gb is None else int(vram_gb * GB)
    usable = float("inf") if budget is None else budget - RESERVED
    settings = next(_fitting(request, usable), None)
    if settings is None:
        raise _not_enough(request, budget)
    return _plan(request, settings, budget)


def _plan(request: RunRequest, settings: MemorySettings, budget: int | None) -> RunPlan:
    dit, motion = request.sizes.dit, request.motion
    resident = settings.resident_blocks
    return RunPlan(
        model=request.sizes.name,
        mode="No_transfer" if motion is None else motion.mode,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_steps=request.num_steps,
        checkpoint=settings.checkpoint,
        batch_cfg=settings.batch_cfg,
        tiled=settings.tiled,
        offload=settings.offload,
        num_persistent_param_in_dit=None if resident is None else resident * dit.block_parameters,
        stream_text_encoder=settings.stream_text_encoder,
        stages=request.stages(settings),
        cost=run_cost(
            dit,
            request.sizes.latent_shape(request.height, request.width, request.num_frames),
            num_steps=request.num_steps,
            motion=motion,
            checkpoint=settings.checkpoint,
            with_negative=request.with_negative,
            cfg_interval=request.cfg_interval,
            cache=request.cache,
        ),
        budget=budget,
    )


def _fitting(request: RunRequest, usable: float) -> Iterator[MemorySettings]:
    """All settings that fit, the fastest first."""
    for checkpoint in request.keeping():
        kept = replace(request.frugal(), checkpoint=checkpoint)
        placements = [
            replace(kept, offload=False, resident_blocks=None, stream_text_encoder=False),
            replace(kept, resident_blocks=None),
        ]
        streamed = _most_resident(request, kept, usable)
        for settings in placements if streamed is None else [*placements, streamed]:
            if _peak(request, settings) <= usable:
                yield _fast_stages(request, settings, usable)


def _most_resident(request: RunRequest, kept: MemorySettings, usable: float) -> MemorySettings | None:
    """Streaming with as many resident blocks as fit; None if not even without any."""
    counts = range(request.sizes.dit.num_layers - 1, -1, -1)
    trials = (replace(kept, resident_blocks=count) for count in counts)
    return next((trial for trial in trials if _peak(request, trial) <= usable), None)


def _fast_stages(request: RunRequest, settings: MemorySettings, usable: float) -> MemorySettings:
    """The fast way of each stage that still fits."""
    wishes: dict[str, bool] = {"stream_text_encoder": False}
    if request.tiled is None:
        wishes["tiled"] = False
    if request.batch_cfg is None:
        wishes["batch_cfg"] = request.with_negative
    for name, wish in wishes.items():
        trial = replace(settings, **{name: wish})
        if _peak(request, trial) <= usable:
            settings = trial
    return settings


def _peak(request: RunRequest, settings: MemorySettings) -> int:
    return max(stage.total for stage in request.stages(settings))


def _not_enough(request: RunRequest, budget: int) -> NotEnoughMemoryError:
    """What is missing, and what would make the run smaller."""
    least = max(request.stages(request.frugal()), key=lambda stage: stage.total)
    changes: dict[str, RunRequest] = {
        "half the frames": replace(request, num_frames=-(-request.num_frames // 2)),
        "half of height and width": replace(request, height=request.height // 2, width=request.width // 2),
    }
    motion = request.motion
    if motion is not None:
        if motion.checkpoint not in ("auto", "offload"):
            changes["checkpoint='auto'"] = replace(request, motion=replace(motion, checkpoint="auto"))
        if motion.mode != "FlowMotion" and motion.coarse == 1:
            changes["coarse=2"] = replace(request, motion=replace(motion, coarse=2))
    if request.tiled is False:
        changes["tiled=True"] = replace(request, tiled=True)
    if request.batch_cfg:
        changes["batch_cfg=False"] = replace(request, batch_cfg=False)
    helps = {name: _peak(changed, changed.frugal()) for name, changed in changes.items()}
    help_text = ", ".join(
        f"{name} ({(peak + RESERVED) / GB:.1f} GB)" for name, peak in helps.items() if peak < least.total
    )
    needed = least.total + RESERVED
    return NotEnoughMemoryError(
        f"{request.sizes.name} at {request.height}x{request.width}x{request.num_frames} needs at least "
        f"{needed / GB:.1f} GB (stage {least.stage!r}), and vram_gb is {budget / GB:.1f}"
        f"{'; less is needed with ' + help_text if help_text else ''}",
        needed,
    )
