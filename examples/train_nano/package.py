"""Write Wan2.2-TI2V-nano, a checkpoint folder in the official layout, from the states of both trainings.

python examples/train_nano/package.py --run results/train_nano --output models/Wan2.2-TI2V-nano
Numbers of motion that are in the folder's config.json already are kept.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from captions import TEXT_LEN, WORDS, write_tokenizer
from runs import load_state
from safetensors.torch import save_file
from sprite_package import FOLDER
from torch import Tensor
from train_dit import DIT, TextToVideo
from train_vae import SIZE as VAE_SIZE

from diffsynth.models.wan_video_vae import WanVideoVAE

USUAL = {
    "num_inference_steps": 25,
    "cfg_scale": 2.0,
    "sigma_shift": 3.0,
    "denoising_strength": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 17,
}


def normalised(vae: WanVideoVAE, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Weights of the VAE with latents of mean 0 and deviation 1: its outer 1x1x1 convolutions take that on.

    mean, std [z]: of the latents that the training of the DiT saw.
    """
    weights = {key: value.detach().double() for key, value in vae.state_dict().items()}
    wide = std[:, None, None, None, None]
    to_mean, to_variance = weights["conv1.weight"].chunk(2)
    mean_bias, variance_bias = weights["conv1.bias"].chunk(2)
    weights["conv1.weight"] = torch.cat([to_mean / wide, to_variance])
    weights["conv1.bias"] = torch.cat([(mean_bias - mean) / std, variance_bias - 2 * std.log()])
    from_latents = weights["conv2.weight"]
    weights["conv2.bias"] = weights["conv2.bias"] + from_latents[..., 0, 0, 0] @ mean
    weights["conv2.weight"] = from_latents * std[None, :, None, None, None]
    return weights


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("results/train_nano"))
    parser.add_argument("--output", type=Path, default=Path("models/Wan2.2-TI2V-nano"))
    args = parser.parse_args()
    state = load_state(args.run / "dit.state")
    vae = WanVideoVAE(**VAE_SIZE)
    vae.load_state_dict(load_state(args.run / "vae.state")["model"])
    model = TextToVideo()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])

    args.output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / "LICENSE", args.output / "LICENSE.fluent-emoji")
    write_tokenizer(args.output / "google" / "umt5-xxl")
    mean, std = (numbers.flatten().double() for numbers in state["stats"])
    write_weights(args.output / "Wan2.1_VAE.safetensors", normalised(vae, mean, std))
    write_weights(args.output / "models_t5_umt5-enc-bf16.safetensors", model.text.state_dict())
    write_weights(args.output / "diffusion_pytorch_model.safetensors", model.dit.state_dict())
    z = VAE_SIZE["z_dim"]
    config = {
        "_class_name": "WanModel",
        "model_type": "ti2v",
        "text_len": TEXT_LEN,
        "in_dim": z,
        "out_dim": z,
        **DIT,
    }
    path = args.output / "config.json"
    earlier = json.loads(path.read_text())["fastvmt"] if path.exists() else {}
    path.write_text(json.dumps({**config, "fastvmt": {**USUAL, **earlier, "words": WORDS}}, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, trained for {state['step']} steps")


if __name__ == "__main__":
    main()
