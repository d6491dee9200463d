"""Before a run: the fastest settings that fit into the memory there is, with predicted peaks and cost.

The rungs of the ladder (see `settings`) are tried in order with every other setting at its most frugal, and
the first that fits is taken. Then each stage alone takes its fast way if that fits, too: the text encoder
whole, the VAE untiled, both prompts in one DiT call.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.fields import Number, check_value
from diffsynth.configs.options import RunOptions
from diffsynth.configs.resolve import ModelFacts, ReferenceFacts, resolve
from diffsynth.planning.cost import RunCount, run_cost, vae_flops
from diffsynth.planning.memory import StageMemory, predict_stages
from diffsynth.planning.settings import Settings, keeping, rungs
from diffsynth.planning.sizes import ModelSizes

GB = 2**30  # as cards are sold
# Memory besides tensors: the device's context and work space of kernels, and gaps between tensors, a share.
RESERVED, GAPS = GB * 3 // 4, 0.06


class NotEnoughMemoryError(ValueError):
    """No settings fit into the budget; `needed` is the bytes that the most frugal ones take, all included."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def resolve_plan(given: Mapping[str, Any], defaults: RunDefaults, model: ModelFacts) -> RunOptions:
    """Return the options of a run that is planned before it has a reference; see `resolve`.

    The reference is assumed to have the output's size and length.
    """
    facts = {name: given.get(name) or defaults[name] for name in ("num_frames", "height", "width")}
    return resolve(given, defaults, ReferenceFacts(**facts), model)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The settings of a run, and the memory and operations that it will take.

    Attributes:
        model: name of the model.
        options: options of the run, as resolved.
        settings: the settings that were chosen.
        num_persistent_param_in_dit: argument of `enable_vram_management`, if the DiT's blocks stream.
        stages: predicted bytes of each stage.
        cost: operations of the run, by count.
        budget: bytes that may be used; None without a limit.
    """

    model: str
    options: RunOptions
    settings: Settings
    num_persistent_param_in_dit: int | None
    stages: tuple[StageMemory, ...]
    cost: RunCount
    budget: int | None

    @property
    def peak_stage(self) -> StageMemory:
        """Return the stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Predicted bytes of tensors at the run's peak."""
        return self.peak_stage.total

    @property
    def tight(self) -> bool:
        """Whether the budget leaves no room for gaps between tensors."""
        return self.budget is not None and self.budget < RESERVED + int((1 + GAPS) * self.peak)

    def minutes(self) -> dict[str, float]:
        """Return the predicted minutes by card, of those in cards.json, weights loaded and copies hidden."""
        cards = json.loads(files("diffsynth.configs").joinpath("cards.json").read_text())
        return {
            card["name"]: self.cost.flops / (card["bf16_TFLOPs"] * card["dit_share"]) / 6e13
            + self.cost.vae_flops / (card["tf32_TFLOPs"] * card["vae_share"]) / 6e13
            for card in cards
        }

    def chosen(self) -> dict[str, object]:
        """Return what was chosen, by name."""
        names = ("checkpoint", "batch_cfg", "tiled", "offload")
        return {
            **{name: getattr(self.settings, name) for name in names},
            "num_persistent_param_in_dit": self.num_persistent_param_in_dit,
            "stream_text_encoder": self.settings.stream_text_encoder,
        }

    def to_json(self) -> str:
        """Return all of it as JSON; memory in bytes."""
        run = self.options
        facts = {
            "model": self.model,
            "mode": run.mode,
            **{name: getattr(run, name) for name in ("height", "width", "num_frames", "num_inference_steps")},
            **self.chosen(),
            "stages": [asdict(stage) for stage in self.stages],
            "cost": asdict(self.cost) | {"total_ffe": self.cost.total_ffe},
            "predicted_minutes": self.minutes(),
            "budget": self.budget,
            "peak": self.peak,
            "peak_stage": self.peak_stage.stage,
            "reserved": RESERVED + (0 if self.tight else int(GAPS * self.peak)),
            "tight": self.tight,
        }
        return json.dumps(facts, indent=1)

    def __str__(self) -> str:
        run = self.options
        lines = [
            f"{self.model}, {run.height}x{run.width}x{run.num_frames}, "
            f"{run.num_inference_steps} steps, {run.mode}",
            f"{'GB':<14}{'weights':>10}{'activations':>13}{'peak':>8}",
        ]
        for stage in self.stages:
            weights, activations, total = (n / GB for n in (stage.weights, stage.activations, stage.total))
            mark = "  <- peak" if stage is self.peak_stage else ""
            lines.append(f"{stage.stage:<14}{weights:>10.2f}{activations:>13.2f}{total:>8.2f}{mark}")
        budget = "no budget" if self.budget is None else f"budget {self.budget / GB:.1f} GB"
        kept = f"{RESERVED / GB:.2f} GB{', which is tight,' if self.tight else f' + {GAPS:.0%}'}"
        minutes = [f"{card} {n:.{0 if n > 10 else 1}f}" for card, n in self.minutes().items()]
        lines += [
            f"{self.peak / GB:.2f} GB of tensors and {kept} for the device itself; {budget}",
            f"minutes, predicted: {', '.join(minutes)}",
            f"settings: {self.settings}",
            f"cost: {self.cost.sampling_ffe:.4g} FFE of sampling + {self.cost.guidance_ffe:.4g} of guidance "
            f"= {self.cost.total_ffe:.4g}; {self.cost.flops / 1e15:.4g} PFLOP and "
            f"{self.cost.vae_flops / 1e15:.3g} of the VAE",
        ]
        return "\n".join(lines)


def plan_run(
    sizes: ModelSizes, options: RunOptions, *, vram_gb: float | None = None, with_reference: bool
) -> RunPlan:
    """Return the fastest settings of a run that fit into vram_gb; without it, the fastest.

    A checkpoint other than "auto" is obeyed, and so are batch_cfg and tiled that are not None. Weights keep
    their dtype.

    Args:
        sizes: sizes of the models.
        options: options of the run, as resolved.
        vram_gb: all the memory of the device that may be used, in GB of 2**30 bytes.
        with_reference: whether a video is encoded.

    Raises:
        ValueError: vram_gb is not allowed.
        NotEnoughMemoryError: no settings fit.
    """
    if vram_gb is not None:
        check_value("vram_gb", Number(above=0), vram_gb)
    budget = None if vram_gb is None else int(vram_gb * GB)
    usable = float("inf") if budget is None else (budget - RESERVED) / (1 + GAPS)

    def peak(settings: Settings) -> int:
        return max(stage.total for stage in predict_stages(sizes, options, settings, with_reference))

    ladder = rungs(_frugal(options), keeping(options.motion), sizes.dit.num_layers)
    settings = next((rung for rung in ladder if peak(rung) <= usable), None)
    if settings is None and budget is not None and peak(_frugal(options)) <= budget - RESERVED:
        settings, usable = _frugal(options), budget - RESERVED  # no room for gaps: better than not at all
    if settings is None:
        assert budget is not None, "without a budget, all settings fit"
        raise _not_enough(sizes, options, budget, with_reference)
    wishes: dict[str, Any] = {"stream_text_encoder": False}
    if options.tiled is None:
        wishes["tiled"] = False
    if options.batch_cfg is None:
        wishes["batch_cfg"] = options.cfg_scale != 1
    for name, wish in wishes.items():
        changed: dict[str, Any] = {name: wish}
        trial = replace(settings, **changed)
        settings = trial if peak(trial) <= usable else settings
    resident = settings.resident_blocks
    latents = sizes.latent_shape(options.height, options.width, options.num_frames)
    return RunPlan(
        model=sizes.name,
        options=options,
        settings=settings,
        num_persistent_param_in_dit=None if resident is None else resident * sizes.dit.block_parameters,
        stages=predict_stages(sizes, options, settings, with_reference),
        cost=replace(
            run_cost(sizes.dit, latents, options, settings.checkpoint),
            vae_flops=vae_flops(sizes.vae, latents, options, settings.tiled, with_reference),
        ),
        budget=budget,
    )


def _frugal(options: RunOptions) -> Settings:
    """The settings that need least, of those that the options allow."""
    return Settings(
        checkpoint=keeping(options.motion)[-1],
        batch_cfg=bool(options.batch_cfg),
        **{**options.tiling, "tiled": options.tiled is not False},
        offload=True,
        resident_blocks=0,
        stream_text_encoder=True,
    )


def _not_enough(
    sizes: ModelSizes, options: RunOptions, budget: int, with_reference: bool
) -> NotEnoughMemoryError:
    """Return an error that names what is missing and what would make the run smaller."""

    def least(run: RunOptions) -> StageMemory:
        return max(predict_stages(sizes, run, _frugal(run), with_reference), key=lambda stage: stage.total)

    changes: dict[str, dict[str, Any]] = {
        "half the frames": {"num_frames": -(-options.num_frames // 2)},
        "half of height and width": {"height": options.height // 2, "width": options.width // 2},
    }
    motion = options.motion
    if motion is not None:
        if motion.checkpoint not in ("auto", "offload"):
            changes["checkpoint='auto'"] = {"motion": replace(motion, checkpoint="auto")}
        if DESCRIPTORS[motion.mode].reads_attention and motion.coarse == 1:
            changes["coarse=2"] = {"motion": replace(motion, coarse=2)}
    if options.tiled is False:
        changes["tiled=True"] = {"tiled": True}
    if options.batch_cfg:
        changes["batch_cfg=False"] = {"batch_cfg": False}
    now = least(options)
    peaks = {name: least(replace(options, **change)).total for name, change in changes.items()}
    helps = [f"{name} ({(RESERVED + peak) / GB:.1f} GB)" for name, peak in peaks.items() if peak < now.total]
    needed = RESERVED + now.total
    return NotEnoughMemoryError(
        f"{sizes.name} at {options.height}x{options.width}x{options.num_frames} needs at least "
        f"{needed / GB:.1f} GB (stage {now.stage!r}), and vram_gb is {budget / GB:.1f}"
        f"{'; less is needed with ' + ', '.join(helps) if helps else ''}",
        needed,
    )
