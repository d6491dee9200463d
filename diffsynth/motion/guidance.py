"""Every number of motion transfer, with its unit and its source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.locate import checkpoint_folder
from diffsynth.models.local_attention import Window, check_attention_window
from diffsynth.motion.heads import Heads, check_heads
from diffsynth.motion.tile_flow import check_tile, check_window

MODES = ("effi_AMF", "AMF", "FlowMotion")
CHECKPOINTS = ("auto", "none", "block", "offload")
VARIANTS = ("paper", "released")
REUSES = ("repeat", "falling", "extrapolate")
UPDATE_RULES = ("adamw", "gradient")
NO_CHANGES: Mapping[str, object] = MappingProxyType({})
PAPER_BLOCK = 14
PAPER_DEPTHS = (30, 40)  # blocks of Wan2.1 1.3B and 14B; both are read at PAPER_BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionGuidance:
    """How motion is read and transferred. Defaults: FastVMT (arXiv 2602.05551), section 3 and its code.

    What is transferred
        mode: "effi_AMF", tile attention motion flow; "AMF", dense; "FlowMotion", the predicted clean
        latents (FlowMotion, CVPR 2026; take `MotionGuidance.latent_prediction()` for its other numbers).
        variant: "paper", or "released", the released code's departures from it (tile AMF only).
    Reading the DiT
        block: block whose queries and keys are read, from 0; None, or 14 in a DiT that has no block 14, is
        the same relative depth, round(14/30 * depth). heads: "mean_qk", "mean_logits", head indices or
        "token_groups" (see `reduce_heads`). checkpoint: activations kept for the backward pass: "none" keeps
        all, "block" each block's input, "offload" the same on the CPU, "auto" decides by the memory there is.
        attention_window: (frames, rows, columns) of tokens that self-attention sees to each side, for
        reference and generated alike; None: all. coarse: the side of the squares of latents that are averaged
        before the DiT sees them, with timestep and noise to match (see `coarse`); 1: none. Everything in
        tokens, window, tile and attention_window, is then of the coarser grid. Neither is for mode
        "FlowMotion".
    Flow (tokens)
        sf: pairs of frames i <= j < i + sf. window: side of the search window, odd. tile: (rows, columns)
        that share a window. tau: factor on the logits. chunk: frame pairs held in memory at a time.
    Loss
        amf_weight, window_weight: of the two losses. pair_weights: of pairs j = i and j = i + sf - 1, linear
        between. intra_weight: factor on pairs j = i. token_scale: factor on the mean over tokens (1560, the
        token count at 480x832); None sums over the tokens there are. prediction_weight, difference_weight:
        of the clean latents and of their frame differences. prediction_cfg: guidance scale of the velocity
        that predicts them; across_velocity: how much of it is kept across the mean velocity so far.
    Optimiser
        guided_steps: denoising steps, from the first, that are guided. inner_steps: optimiser steps in each.
        interval: each interval-th of them computes a fresh gradient, those between reuse it. reuse: how,
        "repeat" as published, "falling" or "extrapolate" (see `GradientReuse`). reuse_above: only while the
        last two fresh gradients have at least this cosine; None, as published, always. update: "adamw" as
        published, or "gradient", plain descent. lr: (first, end) learning rate, linear, the end not reached.
        fade: what it is multiplied by at the end of the guided steps, linear from 1 at the first, the end not
        reached; below 1, early steps place what moves and late ones leave its looks to the prompt.
        weight_decay: a step's, times lr. recompute_every: each such guided step computes gradients, from the
        first; those between repeat its gradients and do not run the DiT. recompute_below: so does the next
        one, while the first gradients of the last two that did have a cosine below it (see
        `GradientMemory`); None: never.
    Raises ValueError, naming the argument, for a number that is not allowed.
    """

    mode: str = "effi_AMF"
    variant: str = "paper"
    block: int | None = PAPER_BLOCK
    heads: Heads = "mean_qk"
    checkpoint: str = "auto"
    attention_window: Window | None = None
    coarse: int = 1
    sf: int = 4
    window: int = 21
    tile: tuple[int, int] = (3, 4)
    tau: float = 1.0
    chunk: int = 4
    amf_weight: float = 5.0
    window_weight: float = 1.0
    pair_weights: tuple[float, float] = (1.0, 0.8)
    intra_weight: float = 1.0
    token_scale: float | None = 1560.0
    prediction_weight: float = 20.0
    difference_weight: float = 5.0
    prediction_cfg: float = 6.0
    across_velocity: float = 0.1
    guided_steps: int = 10
    inner_steps: int = 10
    interval: int = 3
    reuse: str = "repeat"
    reuse_above: float | None = None
    update: str = "adamw"
    lr: tuple[float, float] = (0.003, 0.002)
    fade: float = 1.0
    weight_decay: float = 0.01
    recompute_every: int = 1
    recompute_below: float | None = None

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("variant", self.variant, VARIANTS)
        _check_choice("checkpoint", self.checkpoint, CHECKPOINTS)
        _check_choice("reuse", self.reuse, REUSES)
        _check_choice("update", self.update, UPDATE_RULES)
        _check_cosine("reuse_above", self.reuse_above)
        _check_cosine("recompute_below", self.recompute_below)
        if self.variant == "released" and self.mode != "effi_AMF":
            raise ValueError(f"variant 'released' exists for mode 'effi_AMF' only; got mode {self.mode!r}")
        if self.block is not None:
            _check_whole("block", self.block, 0)
        check_heads(self.heads)
        check_window(self.window)
        check_tile(self.tile)
        if self.attention_window is not None:
            check_attention_window(self.attention_window)
        for name, least in (
            ("sf", 2),
            ("chunk", 1),
            ("guided_steps", 0),
            ("inner_steps", 1),
            ("interval", 1),
            ("recompute_every", 1),
            ("coarse", 1),
        ):
            _check_whole(name, getattr(self, name), least)
        if self.mode == "FlowMotion" and (self.attention_window is not None or self.coarse > 1):
            raise ValueError(
                "attention_window and coarse are for modes that read attention; mode 'FlowMotion' does not, "
                f"got attention_window={self.attention_window!r}, coarse={self.coarse!r}"
            )
        if self.token_scale is not None:
            _check_number("token_scale", self.token_scale)
        _check_number("tau", self.tau)
        _check_range("lr", self.lr)
        _check_range("pair_weights", self.pair_weights, zero=True)
        for name in (
            "amf_weight", "window_weight", "intra_weight", "prediction_weight", "difference_weight",
            "prediction_cfg", "across_velocity", "fade", "weight_decay",
        ):  # fmt: skip
            _check_number(name, getattr(self, name), zero=True)

    @classmethod
    def released(cls, **changes: object) -> "MotionGuidance":
        """The released code to the letter: its features, windows, displacements and window loss.

        changes: fields to set otherwise. With heads="mean_qk" its scrambled features alone are mended.
        """
        return replace(cls(variant="released", heads="token_groups", token_scale=None), **changes)

    @classmethod
    def latent_prediction(cls, **changes: object) -> "MotionGuidance":
        """FlowMotion's numbers: three steps of plain Adam at one rate, each on a fresh gradient."""
        flow_motion = cls(mode="FlowMotion", inner_steps=3, interval=1, lr=(0.003, 0.003), weight_decay=0.0)
        return replace(flow_motion, **changes)

    @classmethod
    def for_mode(cls, mode: str, numbers: Mapping[str, object] = NO_CHANGES) -> "MotionGuidance":
        """The published numbers of a mode; `numbers` are fields to set otherwise, as read from JSON.

        Raises ValueError, naming it, for an unknown field or a number that is not allowed.
        """
        published = cls.latent_prediction() if mode == "FlowMotion" else cls(mode=mode)
        unknown = numbers.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"motion has no field {', '.join(sorted(unknown))}")
        changes = {name: tuple(v) if isinstance(v, list) else v for name, v in numbers.items()}
        return replace(published, **changes)

    @classmethod
    def for_checkpoint(
        cls, checkpoint: str | Path, mode: str = "effi_AMF", **changes: object
    ) -> "MotionGuidance":
        """The numbers of a mode that suit a checkpoint: those its config.json names, else the published.

        checkpoint: a folder, or a name as for `from_pretrained`. changes: fields to set otherwise. Raises
        FileNotFoundError without the checkpoint, ValueError for numbers that are not allowed.
        """
        declared = run_defaults(checkpoint_folder(checkpoint)).motion.get(mode, NO_CHANGES)
        return cls.for_mode(mode, {**declared, **changes})

    def faded(self, step: int) -> "MotionGuidance":
        """The numbers of a guided step, from 0: the learning rates times its share of `fade`."""
        factor = 1 - (1 - self.fade) * step / max(self.guided_steps, 1)
        return replace(self, lr=(factor * self.lr[0], factor * self.lr[1]))

    def flow_options(self) -> dict:
        """What both kinds of flow take."""
        return {"sf": self.sf, "tau": self.tau, "heads": self.heads, "chunk": self.chunk}

    def block_for(self, num_layers: int) -> int:
        """The block to read in a DiT of `num_layers` blocks. Raises ValueError if it has no such block."""
        scaled = PAPER_BLOCK if num_layers in PAPER_DEPTHS else round(PAPER_BLOCK / 30 * num_layers)
        if self.block is None or (self.block == PAPER_BLOCK >= num_layers and self.variant == "paper"):
            return min(scaled, num_layers - 1)
        if self.block >= num_layers:
            raise ValueError(f"block must be in 0..{num_layers - 1} for this DiT; got {self.block}")
        return self.block


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")


def _check_whole(name: str, given: int, least: int) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {given!r}")


def _check_cosine(name: str, given: float | None) -> None:
    if given is not None and not -1 <= given <= 1:
        raise ValueError(f"{name} must be None or a cosine, -1 to 1; got {given!r}")


def _check_number(name: str, given: float, zero: bool = False) -> None:
    """A finite number above 0, or 0 itself if `zero`."""
    good = isinstance(given, int | float) and math.isfinite(given) and (given > 0 or (zero and given == 0))
    if not good:
        raise ValueError(f"{name} must be finite and {'at least' if zero else 'above'} 0; got {given!r}")


def _check_range(name: str, given: tuple[float, float], zero: bool = False) -> None:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"{name} must be two numbers, (first, last); got {given!r}")
    for number in given:
        _check_number(name, number, zero)
