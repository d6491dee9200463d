"""The condition of models that continue pictures: which frames are given, and the latents of these frames.

The channels stand behind the noise in the input of the DiT: a mask of `temporal_factor` channels, one for
each frame of a latent frame, and the latents of a video that is mid grey where no picture is given.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import picture_to_tensor
from diffsynth.models.conditions import ImageCondition
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.components import Components


def image_condition(
    vae: WanVideoVAE, image: Tensor, num_frames: int, last_image: Tensor | None = None, **tiling: Any
) -> Tensor:
    """Return the condition y [B, 4 + z, F, h, w], float32, of a video that begins with a picture.

    Args:
        vae: the VAE of the model.
        image: the first frame [B, 3, H, W] in [-1, 1].
        num_frames: frames of the video.
        last_image: the last frame, likewise, if it is given.
        tiling: arguments of `vae.encode`.

    Raises:
        ValueError: last_image has another shape, or there is one frame only for two pictures.
    """
    video = image.new_zeros(*image.shape[:2], num_frames, *image.shape[2:])
    given = torch.zeros(num_frames, device=vae.device)
    video[:, :, 0], given[0] = image, 1
    if last_image is not None:
        if last_image.shape != image.shape or num_frames < 2:
            raise ValueError(
                f"last_image must be {tuple(image.shape)} as image, in 2 frames or more; "
                f"got {tuple(last_image.shape)}, {num_frames} frames"
            )
        video[:, :, -1], given[-1] = last_image, 1
    latents = vae.encode(video, **tiling)
    # The first latent frame is one frame; the last frame is repeated to fill the last one, as in the VAE.
    step, frames = vae.temporal_factor, latents.shape[2]
    repeats = torch.ones(num_frames, dtype=torch.long, device=vae.device)
    repeats[0] = step
    repeats[-1] += frames * step - repeats.sum()
    mask = given.repeat_interleave(repeats).unflatten(0, (frames, step)).T[None, :, :, None, None]
    return torch.cat([mask.expand(len(latents), -1, -1, *latents.shape[3:]), latents], dim=1)


def encode_pictures(
    models: Components, pictures: Mapping[str, Image.Image], options: RunOptions
) -> ImageCondition:
    """Return what one or two pictures, first and last frame, give to the DiT; CLIP sees them whole."""
    clip_feature = None
    if models.dit.has_image_input and models.image_encoder is not None:
        with models.residency.using("image_encoder"):
            tokens = [models.image_encoder.encode_image(picture_to_tensor(p)) for p in pictures.values()]
        clip_feature = torch.cat(tokens, dim=1).float()
    sized = {n: picture_to_tensor(p, options.height, options.width) for n, p in pictures.items()}
    first, last = sized["input_image"], sized.get("end_image")
    with models.residency.using("vae"):
        if models.dit.in_dim == models.dit.out_dim:
            return ImageCondition(first_frame=models.vae.encode(first[:, :, None], **options.tiling))
        y = image_condition(models.vae, first, options.num_frames, last, **options.tiling)
    return ImageCondition(
        y=y, clip_feature=clip_feature, first_frame=y[:, models.vae.temporal_factor :, :1].contiguous()
    )
