"""`fastvmt plan`: predict memory and cost of a run before it starts, without its weights."""

import json
from argparse import Namespace
from dataclasses import asdict

import torch

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.checkpoints import published_key
from diffsynth.configs.defaults import published_defaults
from diffsynth.configs.options import LoadOptions, call_options
from diffsynth.jobs.errors import RunFailedError
from diffsynth.jobs.models import choose_model, load_pipeline
from diffsynth.jobs.task import with_motion
from diffsynth.planning.plan import NotEnoughMemoryError, plan_run, resolve_plan
from diffsynth.planning.sizes import ModelSizes, published_sizes


def run(options: Namespace, console: Console) -> int:
    """Print the plan; RunFailedError if no settings fit, which says what would help."""
    dtype = torch.bfloat16 if options.dtype is None else getattr(torch, options.dtype)
    if options.model is not None and (key := published_key(options.model)):
        sizes, defaults = published_sizes(key, dtype), published_defaults(key)
    else:
        folder = choose_model(options.model, options.models_dir, console.note)
        console.note("load the model")
        pipe = load_pipeline(folder, LoadOptions(device="cpu", dtype=options.dtype))
        sizes, defaults = ModelSizes.of(pipe.residency.models), pipe.defaults
    asked = with_motion({name: value for name, value in vars(options).items() if value is not None})
    call = {name: value for name, value in asked.items() if name in call_options()}
    run_options = resolve_plan(call, defaults, sizes.facts())
    try:
        guided = run_options.motion is not None
        plan = plan_run(sizes, run_options, vram_gb=options.vram, with_reference=guided)
    except NotEnoughMemoryError as error:
        raise RunFailedError(str(error)) from error
    console.say(str(plan))
    several = {}
    if options.gpus is not None:
        from diffsynth.distributed.predict import plan_ranks

        of_rank = plan_ranks(sizes, plan, options.gpus, options.tflops, options.gb_per_s)
        console.say(str(of_rank))
        several = {"of_rank": asdict(of_rank)}
    console.result(json.loads(plan.to_json()) | several)
    return DONE
