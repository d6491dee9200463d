"""How well a packaged VAE gives held-out clips back, in dB: the mean over clips, and over all their pixels.

python examples/train_nano/reconstruction.py --model_dir nano --clips 128
"""

import argparse

import latents
import train_vae

from diffsynth import WanVideoPipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", default="nano")
    parser.add_argument("--clips", type=int, default=128)
    args = parser.parse_args()
    vae = WanVideoPipeline.from_pretrained(args.model_dir, device="cpu").vae
    kinds = {"as the DiT sees them": latents.SCENES, "as the VAE sees them": train_vae.SCENES}
    for kind, scenes in kinds.items():
        errors = train_vae.held_out_errors(vae, args.clips, scenes)
        mean, whole = train_vae.psnr(errors).mean(), train_vae.psnr(errors.mean())
        print(f"{args.clips} clips {kind}: mean {mean:.2f} dB, all pixels {whole:.2f} dB")


if __name__ == "__main__":
    main()
