"""The flow that a reference video would transfer, read without generating anything."""

import torch
from torch import Tensor

from diffsynth.configs.descriptors import flow_modes
from diffsynth.configs.resolve import round_size
from diffsynth.data.tensors import Video, frame_size, video_to_tensor
from diffsynth.motion import MotionGuidance, make_descriptor
from diffsynth.motion.descriptors import StepInputs
from diffsynth.pipelines.wan_video import WanVideoPipeline


@torch.no_grad()
def reference_flow(
    pipe: WanVideoPipeline,
    video: Video,
    *,
    motion: MotionGuidance | None = None,
    sigma: float = 0.7,
    seed: int = 0,
) -> Tensor:
    """Return the attention motion flow of a video as guidance reads it.

    Args:
        pipe: the model.
        video: two frames or more.
        motion: which flow, by a mode that has one; None for the published settings.
        sigma: noise level in (0, 1] at which the flow is read.
        seed: seed of the noise.

    Returns:
        [P, H, W, 2] in tokens, (rows, columns), over the pairs i <= j < i + sf of latent frames.

    Raises:
        ValueError: the mode has no flow, sigma is out of range, or the video has one frame.
    """
    motion = MotionGuidance() if motion is None else motion
    if motion.mode not in flow_modes():
        known = ", ".join(flow_modes())
        raise ValueError(f"motion.mode must be one of {known}, which have a flow; got {motion.mode!r}")
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma must be in (0, 1]; got {sigma!r}")
    if len(video) < 2:
        raise ValueError("a video of one frame has no motion")
    sides = zip(("height", "width"), frame_size(video), pipe.models.facts().pixels_per_token, strict=True)
    height, width = (round_size(*side) for side in sides)
    with pipe.residency.using("vae"):
        clean = pipe.vae.encode(video_to_tensor(video, len(video), height, width), tiled=True)
    with pipe.residency.using("text_encoder"):
        context = pipe.prompter.encode_prompt("", pipe.text_encoder).to(pipe.device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    timestep = torch.tensor([1000.0 * sigma], device=clean.device)
    inputs = StepInputs(dit=pipe.dit, timestep=timestep, sigma=sigma, null_context=context)
    descriptor = make_descriptor(motion)
    with pipe.residency.using("dit"):
        features = descriptor.observe((1 - sigma) * clean + sigma * noise, context, inputs)
        return descriptor.describe(features).flow
