"""The options of a run as command line options.

The names and choices of the rooms that need torch are written out here, so that `--help` and completion do
not wait for it; tests/test_cli.py compares them with the originals.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from diffsynth.cli.values import Reader, heads, lora, number, or_none, several, whole

MODES = ("effi_AMF", "AMF", "FlowMotion", "No_transfer")
SAMPLERS = ("euler", "unipc")
CACHES = ("teacache", "magcache", "first_block")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
WIDE_DTYPES = DTYPES[:3]
ATTENTION = ("flash_attn_3", "flash_attn_2", "sdpa", "sage")
MOTION = "motion_"

# Options that are keywords of the pipeline's call under the same name: (how to read, help).
CALL_OPTIONS: Mapping[str, tuple[Reader, str]] = MappingProxyType(
    {
        "height": (whole, "pixels; the model's own, else the reference's (480x832 with published models)"),
        "width": (whole, "pixels, as height"),
        "num_frames": (whole, "the reference's, at most 81, or the model's own"),
        "num_inference_steps": (whole, "denoising steps (50)"),
        "denoising_strength": (number, "how far the reference is noised, in (0, 1] (0.75)"),
        "cfg_scale": (number, "weight of the prompt (5.8)"),
        "sigma_shift": (number, "of the noise schedule (7)"),
        "seed": (whole, "of the noise; drawn, and recorded, by default"),
        "rand_device": (str, "where the noise is drawn (cpu)"),
        "tile_size": (several(whole, 2), "ROWS,COLUMNS of latents in a VAE tile (30,52)"),
        "tile_stride": (several(whole, 2), "ROWS,COLUMNS from tile to tile (15,26)"),
        "sf": (whole, "frames that each latent frame is compared with (4)"),
        "preset": (str, "exact, balanced, fast, or another that the model declares (exact)"),
        "cache_threshold": (number, "of the cache, instead of the published one"),
        "cfg_interval": (several(number, 2), "FROM,TO: shares of the steps with the negative prompt"),
        "tea_cache_l1_thresh": (number, "TeaCache with this threshold"),
        "tea_cache_model_id": (str, "whose coefficients TeaCache takes"),
        "vram_budget_gb": (number, "memory of the device that the run may use, GB"),
    }
)
CALL_CHOICES = MappingProxyType({"mode": MODES, "sampler": SAMPLERS, "cache": CACHES})
CALL_SWITCHES = MappingProxyType(
    {
        "tiled": "encode and decode in tiles, which saves memory (on)",
        "batch_cfg": "both prompts in one call of the DiT (decided by memory)",
    }
)
SHORT_NAMES = MappingProxyType(
    {"num_inference_steps": "steps", "denoising_strength": "strength", "num_frames": "frames"}
)
PLAN_OPTIONS = (
    "mode", "cache", "height", "width", "num_frames", "num_inference_steps", "cfg_scale", "sf", "preset",
    "cache_threshold", "cfg_interval", "tea_cache_l1_thresh", "tea_cache_model_id", "tile_size", "tiled",
    "batch_cfg",
)  # fmt: skip
# The fields of MotionGuidance, but mode and sf, which are options of the call.
MOTION_OPTIONS: Mapping[str, tuple[Reader, str]] = MappingProxyType(
    {
        "variant": (str, "paper or released"),
        "block": (or_none(whole), "block of the DiT that is read, from 0; none: at the published depth"),
        "heads": (heads, "mean_qk, mean_logits, token_groups, or indices such as 0,3"),
        "checkpoint": (str, "activations kept for gradients: auto, none, block or offload"),
        "attention_window": (or_none(several(whole, 3)), "FRAMES,ROWS,COLUMNS seen to each side; none: all"),
        "coarse": (whole, "side of the squares of latents that are averaged for guidance"),
        "window": (whole, "side of the search window, odd, in tokens"),
        "tile": (several(whole, 2), "ROWS,COLUMNS of tokens that share a window"),
        "tau": (number, "factor on the attention logits"),
        "chunk": (whole, "frame pairs held in memory at a time"),
        "amf_weight": (number, "of the motion flow loss"),
        "window_weight": (number, "of the window loss"),
        "pair_weights": (several(number, 2), "NEAR,FAR: weights of near and far frame pairs"),
        "intra_weight": (number, "factor on pairs of a frame with itself"),
        "token_scale": (or_none(number), "factor on the mean over tokens; none: their sum"),
        "prediction_weight": (number, "of the predicted clean latents (FlowMotion)"),
        "difference_weight": (number, "of their frame differences (FlowMotion)"),
        "prediction_cfg": (number, "guidance scale of the prediction (FlowMotion)"),
        "across_velocity": (number, "gradient kept across the mean velocity (FlowMotion)"),
        "guided_steps": (whole, "denoising steps that are guided, from the first"),
        "inner_steps": (whole, "optimiser steps in each"),
        "interval": (whole, "every so many of them compute a fresh gradient"),
        "reuse": (str, "repeat, falling or extrapolate"),
        "reuse_above": (or_none(number), "reuse only above this cosine of gradients; none: always"),
        "update": (str, "adamw or gradient"),
        "lr": (several(number, 2), "FIRST,END learning rate"),
        "fade": (number, "factor on lr at the end of the guided steps, from 1 at the first (1)"),
        "weight_decay": (number, "a step's, times lr"),
        "recompute_every": (whole, "every so many guided steps compute gradients"),
        "recompute_below": (or_none(number), "and the next one below this cosine; none: never"),
    }
)


def flag(name: str) -> str:
    """The option of a keyword: "num_frames" -> "--num-frames"."""
    return "--" + name.replace("_", "-")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of one video: prompts, the pipeline's call, motion, encoding.

    Those that are not given are absent from the namespace, so that "none" can be told from them.
    """
    run = parser.add_argument_group("what is generated")
    _add(run, "prompt", help="what the video shall show")
    _add(run, "negative_prompt", help="what it shall not show (a usual one with published models)")
    for name in (*CALL_CHOICES, *CALL_OPTIONS, *CALL_SWITCHES):
        _add_of_the_call(run, name)
    _add_motion_options(parser)
    video = parser.add_argument_group("the file")
    _add(video, "fps", type=number, metavar="X", help="frames a second; the reference's, else 15")
    _add(video, "quality", type=number, metavar="X", help="0 (small file) to 10 (best) (8)")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of `add_run_options` that memory and cost depend on."""
    run = parser.add_argument_group("the run")
    for name in PLAN_OPTIONS:
        _add_of_the_call(run, name)
    _add_motion_options(parser)


def _add_motion_options(parser: argparse.ArgumentParser) -> None:
    motion = parser.add_argument_group("motion (see MotionGuidance; by default the model's numbers)")
    text = "factor on the learning rates: above 1 follows the motion more closely, 0.5 half as strongly"
    _add(motion, MOTION + "scale", type=number, metavar="X", help=text)
    for name, (read, text) in MOTION_OPTIONS.items():
        _add(motion, MOTION + name, type=read, metavar=_metavar(read), help=text)


def _add_of_the_call(group: argparse._ArgumentGroup, name: str) -> None:
    if name in CALL_CHOICES:
        _add(group, name, choices=CALL_CHOICES[name])
    elif name in CALL_SWITCHES:
        _add(group, name, action=argparse.BooleanOptionalAction, help=CALL_SWITCHES[name])
    else:
        read, text = CALL_OPTIONS[name]
        _add(group, name, type=read, metavar=_metavar(read), help=text)


def _add(group: argparse._ArgumentGroup, name: str, **how: object) -> None:
    names = [flag(name)] + ([flag(SHORT_NAMES[name])] if name in SHORT_NAMES else [])
    group.add_argument(*names, dest=name, default=argparse.SUPPRESS, **how)


def add_saving_options(parser: argparse.ArgumentParser) -> None:
    """How the state of a long run is kept; as the keywords of the pipeline's call."""
    saving = parser.add_argument_group("long runs")
    saving.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="save the run as it goes on in .OUT.run, which is removed after success, and go on with "
        "an unfinished one that is there; --no-resume discards it",
    )
    saving.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="the folder, instead of .OUT.run")
    saving.add_argument("--checkpoint-every", type=whole, metavar="N", help="steps from save to save (5)")
    saving.add_argument("--checkpoint-minutes", type=number, metavar="X", help="or minutes (2)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model runs, where and how."""
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model",
        help="nano, 1.3b, 14b or a checkpoint folder; by default the largest complete one below "
        "--models-dir, else nano",
    )
    model.add_argument("--models-dir", default="models", metavar="DIR", help="where models are (models)")
    model.add_argument("--device", help="auto, cpu, cuda, cuda:1, ... (auto)")
    model.add_argument("--dtype", choices=DTYPES, help="of the weights; float32 on a CPU, else bfloat16")
    model.add_argument("--vae-dtype", choices=WIDE_DTYPES, help="of the VAE (float32)")
    model.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=lora,
        metavar="FILE[=X]",
        help="merge a LoRA into the DiT at strength X (1); may be given several times",
    )
    model.add_argument("--attention", choices=ATTENTION, help="attention kernel; the best there is")
    model.add_argument("--compile", action="store_true", default=None, help="compile the DiT's blocks")
    model.add_argument(
        "--offload", action="store_true", default=None, help="models rest on the CPU between their stages"
    )
    model.add_argument(
        "--persistent",
        type=whole,
        metavar="N",
        help="stream the DiT's blocks from the CPU but for N parameters, which stay on the device",
    )
    model.add_argument("--no-hash", action="store_true", help="leave the model's hashes out of the record")


def _metavar(read: Reader) -> str:
    return {whole: "N", number: "X", str: "NAME"}.get(read, "VALUE")
