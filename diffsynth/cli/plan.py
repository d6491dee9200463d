"""`fastvmt plan`: predict memory and cost of a run before it starts, without its weights."""

import json
import shlex
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from diffsynth.cli.arguments import check_shard, option_words
from diffsynth.cli.console import DONE, Console
from diffsynth.configs.checkpoints import published_key
from diffsynth.configs.defaults import published_defaults
from diffsynth.configs.options import LoadOptions
from diffsynth.jobs.errors import RunFailedError
from diffsynth.jobs.models import choose_model, load_pipeline
from diffsynth.jobs.task import task_options, with_motion
from diffsynth.planning.plan import NotEnoughMemoryError, plan_run, resolve_plan
from diffsynth.planning.sizes import ModelSizes, published_sizes

# What errors about memory call by the names of Python.
_OPTIONS = {
    "vram_gb": "--vram", "coarse=2": "--motion-coarse 2", "checkpoint='auto'": "--motion-checkpoint auto",
    "tiled=True": "--tiled", "batch_cfg=False": "--no-batch-cfg",
}  # fmt: skip


def run(options: Namespace, console: Console) -> int:
    """Print the plan; RunFailedError if no settings fit, which says what would help."""
    check_shard(vars(options), options.gpus is not None)
    dtype = torch.bfloat16 if options.dtype is None else getattr(torch, options.dtype)
    if options.model is not None and (key := published_key(options.model)):
        sizes, defaults = published_sizes(key, dtype), published_defaults(key)
    else:
        folder = choose_model(options.model, options.models_dir, console.note)
        console.note("load the model")
        pipe = load_pipeline(folder, LoadOptions(device="cpu", dtype=options.dtype))
        sizes, defaults = ModelSizes.of(pipe.residency.models), pipe.defaults
    asked = {name: value for name, value in task_options(vars(options)).items() if value is not None}
    call = with_motion(asked)
    run_options = resolve_plan(call, defaults, sizes.facts())
    try:
        guided = run_options.motion is not None
        plan = plan_run(sizes, run_options, vram_gb=call.get("vram_budget_gb"), with_reference=guided)
    except NotEnoughMemoryError as error:
        told = str(error)
        for name, option in _OPTIONS.items():
            told = told.replace(name, option)
        raise RunFailedError(told) from error
    console.say(str(plan))
    names = ("model", "models_dir", "dtype", "gpus", "shard")
    given = {name: getattr(options, name) for name in names} | asked
    shown = [item for item in given.items() if item[1] not in (None, Path("models"))]
    words = [word for item in shown for word in option_words(*item)]
    command = f'fastvmt transfer REF.mp4 --prompt "..." -o OUT.mp4 {shlex.join(words)}'.rstrip()
    console.say(f"to run it: {command}")
    several = {}
    if options.gpus is not None:
        from diffsynth.distributed.predict import plan_ranks

        of_rank = plan_ranks(sizes, plan, options.gpus, options.tflops, options.gb_per_s, options.shard)
        console.say(str(of_rank))
        several = {"of_rank": asdict(of_rank)}
    console.result(json.loads(plan.to_json()) | {"command": command} | several)
    return DONE
