"""Have a pipeline obey a memory budget: plan the run, then place models and choose settings as planned."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from diffsynth.configs.options import RunOptions
from diffsynth.planning.plan import plan_run

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger(__name__)


def within_budget(
    pipe: "WanVideoPipeline", options: RunOptions, vram_gb: float, *, with_reference: bool
) -> RunOptions:
    """The options as planned for vram_gb, and the pipeline's models placed likewise.

    What was asked for by name (a checkpoint other than "auto", batch_cfg, tiled) stays. Raises
    NotEnoughMemoryError, a ValueError, if nothing fits.
    """
    plan = plan_run(
        pipe,
        vram_gb=vram_gb,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_steps=options.num_inference_steps,
        motion=options.motion,
        cfg_scale=options.cfg_scale,
        cfg_interval=options.cfg_interval,
        cache=options.cache,
        with_reference=with_reference,
        batch_cfg=options.batch_cfg,
        tiled=options.tiled,
        tile_size=options.tile_size,
    )
    logger.info("planned for %s GB:\n%s", vram_gb, plan)
    if plan.offload:
        pipe.enable_vram_management(plan.num_persistent_param_in_dit, plan.stream_text_encoder)
    else:
        pipe.residency.stop_streaming()
        pipe.residency.offload = False
    motion = options.motion and replace(options.motion, checkpoint=plan.checkpoint)
    return replace(options, motion=motion, batch_cfg=plan.batch_cfg)
