"""The diffusers layout of the VAE, written the other way round than the package reads it."""

import re

from diffsynth.models.wan_video_vae_keys import _HALF, _RESIDUAL, _TOP


def diffusers_vae_key(official_key, config):
    """The diffusers name of a tensor. config: arguments of `WanVideoVAE`."""
    match = re.fullmatch(
        r"(?:(encoder|decoder)\.)?(conv\d|(?:middle|head|downsamples|upsamples)\.\d+)"
        r"(?:\.(.+))?\.(weight|bias|gamma)",
        official_key,
    )
    half, module, inner, tensor = match.groups()
    kind, _, index = module.partition(".")
    top, within, residual = ({ours: theirs for theirs, ours in t.items()} for t in (_TOP, _HALF, _RESIDUAL))
    if half is None:
        module = top[module]
    elif (half, kind) == ("encoder", "downsamples"):
        module = f"down_blocks.{index}"
    elif (half, kind) == ("decoder", "upsamples"):
        # A level of the decoder is one residual block more than in the encoder, then the upsampler.
        num_resnets = config["num_res_blocks"] + 1
        level, place = divmod(int(index), num_resnets + 1)
        part = "upsamplers.0" if place == num_resnets else f"resnets.{place}"
        module = f"up_blocks.{level}.{part}"
    else:
        module = within[module]
    return ".".join(part for part in (half, module, residual.get(inner, inner), tensor) if part)
