"""`fastvmt plan`: memory and cost of a run, before it is started and without its weights."""

import json
from argparse import Namespace

import torch

from diffsynth.caches.choose import choose_run_cache
from diffsynth.cli.console import Console
from diffsynth.cli.errors import DONE, RunFailedError
from diffsynth.cli.models import Setup, choose_model, load_pipeline
from diffsynth.cli.tasks import motion_of
from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.configs.defaults import EXACT, RunDefaults, with_preset
from diffsynth.pipelines.arguments import PUBLISHED_LENGTH, PUBLISHED_SIZE, given_or
from diffsynth.planning.plan import NotEnoughMemoryError, plan_run
from diffsynth.planning.sizes import ModelSizes, sizes_of


def run(options: Namespace, console: Console) -> int:
    """Print the plan. Raises RunFailedError, with what would help, if no settings fit."""
    given = vars(options)
    sizes, usual = _model(options, console)
    usual = with_preset(usual, given.get("preset", EXACT))
    cache = {name: given.get(name) for name in ("cache", "cache_threshold", "tea_cache_l1_thresh")}
    rows, cols = PUBLISHED_SIZE
    try:
        plan = plan_run(
            sizes,
            height=given_or(rows, usual.height, given.get("height")),
            width=given_or(cols, usual.width, given.get("width")),
            num_frames=given_or(PUBLISHED_LENGTH, usual.num_frames, given.get("num_frames")),
            num_steps=given.get("num_inference_steps", usual.num_inference_steps),
            motion=motion_of(given, usual, has_reference=True),
            vram_gb=options.vram,
            cfg_scale=given.get("cfg_scale", usual.cfg_scale),
            cfg_interval=given.get("cfg_interval", usual.cfg_interval),
            cache=choose_run_cache(
                usual, sizes.dit.dim, *cache.values(), given.get("tea_cache_model_id", "")
            ),
            batch_cfg=given.get("batch_cfg"),
            tiled=given.get("tiled"),
            tile_size=given.get("tile_size", (30, 52)),
        )
    except NotEnoughMemoryError as error:
        raise RunFailedError(str(error)) from error
    console.say(str(plan))
    console.result(json.loads(plan.to_json()))
    return DONE


def _model(options: Namespace, console: Console) -> tuple[ModelSizes, RunDefaults]:
    """Sizes and defaults of the model: of a published one by its name alone, else of the loaded one."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.model in PUBLISHED:
        return sizes_of(options.model, dtype), RunDefaults()
    folder = choose_model(options.model, options.models_dir, console)
    console.note("load the model")
    pipe = load_pipeline(folder, Setup(device="cpu", dtype=options.dtype))
    return sizes_of(pipe, None), pipe.defaults
