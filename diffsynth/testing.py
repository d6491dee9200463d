"""Small stand-ins for tests and first tries: checkpoints with random weights and a clip with known motion.

A checkpoint written here has the official layout and the real model classes at toy size; it makes noise, not
pictures.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from diffsynth.data import save_video
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae22 import WanVideoVAE22

_TOKENIZER = Path(__file__).with_name("testing_data") / "umt5-xxl"  # a small vocabulary
_TEXT = {"dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 2, "num_buckets": 32}
_DIT = {"dim": 24, "ffn_dim": 48, "freq_dim": 32, "num_heads": 2, "num_layers": 2}
_CLIP = {"image_size": 28, "patch_size": 14, "dim": 80, "mlp_ratio": 2, "num_heads": 1, "num_layers": 3}
_IMAGE = {"in_dim": 36, "has_image_input": True, "image_dim": 80}
_DEEP = {"dim": 48, "ffn_dim": 96, "freq_dim": 32, "num_heads": 4, "num_layers": 16}
# Arguments of the DiT by size, and model_type in its config.json; sizes of "a14b" have two experts.
SIZES: dict[str, tuple[dict, str]] = {
    "tiny": (_DIT, "t2v"),
    "deep": (_DEEP, "t2v"),
    "tiny-i2v": ({**_DIT, **_IMAGE}, "i2v"),
    "tiny-flf2v": ({**_DIT, **_IMAGE, "image_positions": 10}, "flf2v"),
    "tiny-ti2v": ({**_DIT, "in_dim": 48, "out_dim": 48}, "ti2v"),
    "tiny-a14b": (_DIT, "t2v"),
    "tiny-a14b-i2v": ({**_DIT, "in_dim": 36}, "i2v"),
}


def write_checkpoint(directory: str | Path, size: str = "tiny", seed: int = 0) -> Path:
    """Write a random, seeded checkpoint in the official layout: sharded DiT, .pth T5 and VAE, tokenizer.

    Args:
        directory: the folder to make.
        size: "tiny", "deep" (16 blocks), or the layout of a model of the family: "tiny-i2v", "tiny-flf2v",
            "tiny-ti2v", "tiny-a14b" (two experts) or "tiny-a14b-i2v".
        seed: seed of the random weights.

    Returns:
        The directory.

    Raises:
        ValueError: the size is unknown.
        FileExistsError: the directory has files in it.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
    directory = Path(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} has files in it; write the checkpoint to a new folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there whole, so that a killed run leaves no half of a checkpoint.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory.parent) as temporary:
        _write_parts(Path(temporary) / "checkpoint", size, seed)
        (Path(temporary) / "checkpoint").replace(directory)
    return directory


def _write_parts(directory: Path, size: str, seed: int) -> None:
    dit_kwargs, model_type = SIZES[size]
    tokenizer = shutil.copytree(_TOKENIZER, directory / "google" / "umt5-xxl")
    vocab = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        is_ti2v = model_type == "ti2v"
        vae = WanVideoVAE22(dim=4, dec_dim=4) if is_ti2v else WanVideoVAE(dim=4)
        text = WanTextEncoder(vocab=vocab, **_TEXT)
        sizes = {"in_dim": vae.z_dim, "out_dim": vae.z_dim, "text_dim": _TEXT["dim"], **dit_kwargs}
        folders = ["high_noise_model", "low_noise_model"] if "a14b" in size else ["."]
        dits = [WanModel(**sizes) for _ in folders]
        clip = WanImageEncoder(**_CLIP) if dits[0].has_image_input else None
        for model in (*dits, text, vae, *([] if clip is None else [clip])):
            _randomise(model)
    for folder, dit in zip(folders, dits, strict=True):
        (directory / folder).mkdir(exist_ok=True)
        weights = _weights(dit, torch.float32)
        save_torch_state_dict(
            weights,
            directory / folder,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size=sum(w.nbytes for w in weights.values()) * 6 // 10,  # two shards
        )
        config = {"_class_name": "WanModel", "model_type": model_type, "text_len": dit.text_len}
        config |= {"eps": dit.eps, "in_dim": dit.in_dim, "out_dim": dit.out_dim}
        config |= {name: dit_kwargs[name] for name in _DIT}
        (directory / folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.save(_weights(text, torch.bfloat16), directory / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(_weights(vae, torch.float32), directory / f"Wan2.{2 if is_ti2v else 1}_VAE.pth")
    if clip is not None:
        weights = {f"visual.{key}": value for key, value in _weights(clip, torch.float32).items()}
        # The published file has a last block, which the encoder does not use.
        for key in [key for key in weights if key.startswith("visual.transformer.0.")]:
            weights[key.replace(".0.", f".{_CLIP['num_layers'] - 1}.", 1)] = weights[key]
        torch.save(weights, directory / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")


def _randomise(model: nn.Module) -> None:
    """Set every tensor to random values of a scale that neither damps nor amplifies the activations."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.1 * noise if fan_in == 1 else noise / fan_in**0.5


def _weights(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}


def write_clip(
    path: str | Path,
    num_frames: int = 17,
    height: int = 96,
    width: int = 160,
    velocity: tuple[int, int] = (1, 4),
) -> Path:
    """Write a video of a bright square that moves by `velocity` (rows, columns) pixels a frame.

    The square starts at a quarter of the picture and wraps around its borders.
    """
    rows, cols = np.mgrid[0:height, 0:width]
    background = np.stack(
        [rows * 120 // height, cols * 120 // width, (rows + cols) * 60 // (height + width)], axis=-1
    )
    side = height // 4
    frames = []
    for t in range(num_frames):
        top, left = height // 4 + t * velocity[0], width // 4 + t * velocity[1]
        inside = ((rows - top) % height < side) & ((cols - left) % width < side)
        frames.append(np.where(inside[..., None], (240, 200, 40), background).astype(np.uint8))
    return save_video(frames, path, fps=15, quality=8)
