"""Whole runs of image models and of Wan2.2 against golden trajectories of the official code."""

import pytest
import torch
from PIL import Image

from diffsynth import WanVideoPipeline
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import dit_config_from_shapes
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae22 import WanVideoVAE22
from diffsynth.pipelines import generate

CLOSE = {"atol": 2e-5, "rtol": 0}


def dit_of(tensors, info, prefix="sd."):
    weights = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    dit = WanModel(**dit_config_from_shapes(shapes, info["config"])).eval().requires_grad_(False)
    dit.load_state_dict(weights)
    return dit


class Texts:
    """A prompter that knows the golden embeddings of two texts."""

    def __init__(self, g):
        self.known = {"a prompt": g["context"], "its opposite": g["negative_context"]}

    def cached(self, _texts, _encoder):
        return True

    def encode_prompt(self, texts, _encoder):
        length = max(self.known[text].shape[1] for text in texts)
        padded = [
            torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[1])) for t in map(self.known.get, texts)
        ]
        return torch.cat(padded)


@pytest.fixture
def run(golden, monkeypatch):
    """A function: golden run, solver, pictures, options -> final latents, which are the golden ones."""

    def make(name, sampler, pictures=(), key=None, **options):
        g, info = golden(name)
        weights = info["weights"]
        text = WanTextEncoder(
            vocab=8, dim=40, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1, num_buckets=4
        )
        more = {}
        if "sd_high.head.modulation" in g:
            dit = dit_of(g, info, "sd_high.")
            more["low_noise_dit"] = dit_of(g, info, "sd_low.")
        else:
            dit = dit_of(*golden(weights["dit"]))
        vae_name = weights.get("vae", "vae_tiny_weights")
        vae = WanVideoVAE22(**golden(vae_name)[1]["kwargs"]) if "22" in vae_name else WanVideoVAE(dim=4)
        vae.load_state_dict(golden(vae_name)[0])
        if "clip" in weights:
            clip, clip_info = golden(weights["clip"])
            more["image_encoder"] = WanImageEncoder(**clip_info["kwargs"]).requires_grad_(False)
            more["image_encoder"].load_state_dict({k[3:]: v for k, v in clip.items() if k[:3] == "sd."})
        pipe = WanVideoPipeline(dit, text, vae.requires_grad_(False), Texts(g), "cpu", **more)
        # Golden pictures are no whole numbers: pictures of another brightness stand for them.
        stand_ins = {name: Image.new("L", (64, 48), i) for i, name in enumerate(pictures)}
        tensors = {(i, i, i): g[name] for i, name in enumerate(pictures)}
        monkeypatch.setattr(generate, "picture_to_tensor", lambda p, *_: tensors[p.getpixel((0, 0))])
        monkeypatch.setattr(generate, "draw_noise", lambda *_: g["noise"])
        numbers = info.get("run", info["kwargs"])
        seen = [g["noise"]]
        result = pipe(
            "a prompt",
            "its opposite",
            **dict(zip(("input_image", "end_image"), stand_ins.values(), strict=False)),
            **{name: numbers[name] for name in ("num_frames", "height", "width")},
            num_inference_steps=numbers["steps"],
            sigma_shift=numbers["shift"],
            sampler=sampler,
            tiled=False,
            output_type="latent",
            progress_bar_cmd=None,
            callback_on_step_end=lambda _pipe, _step, _t, kwargs: seen.append(kwargs["latents"]),
            **{"cfg_scale": numbers.get("cfg_scale"), **options},
        )
        expected = g[f"{key + '.' if key else ''}{sampler}.trajectory"]
        torch.testing.assert_close(torch.cat(seen[1:]), expected[1:], **CLOSE)
        torch.testing.assert_close(result[0], expected[-1], **CLOSE)
        return result

    return make


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_image_to_video_of_wan21_is_the_official_one(run, sampler):
    run("pipe_i2v21_tiny", sampler, ["image"])


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_first_and_last_frame_to_video_is_the_official_one(run, sampler):
    run("pipe_flf2v_tiny", sampler, ["image", "last_image"])


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_ti2v_with_and_without_a_picture_is_the_official_one(run, sampler, golden):
    result = run("pipe_ti2v_tiny", sampler, ["image"], key="i2v")
    first = golden("pipe_ti2v_tiny")[0]["first_frame_latents"]
    torch.testing.assert_close(result[:, :, :1], first, **CLOSE)
    run("pipe_ti2v_tiny", sampler, key="t2v")


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_two_experts_of_texts_are_the_official_ones(run, sampler):
    scales = {"cfg_scale": 4.0, "low_noise_cfg_scale": 3.0}
    run("pipe_a14b_t2v_tiny", sampler, **scales)
    with pytest.raises(AssertionError):
        run("pipe_a14b_t2v_tiny", sampler, **scales, boundary=0.0)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("batch_cfg", [False, True])
def test_two_experts_of_pictures_are_the_official_ones(run, sampler, batch_cfg):
    scales = {"cfg_scale": 4.0, "low_noise_cfg_scale": 2.5}
    run("pipe_a14b_i2v_tiny", sampler, ["image"], **scales, batch_cfg=batch_cfg)
