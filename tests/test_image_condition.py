"""Conditions from pictures, and the choice of the expert, against golden tensors of the official code."""

import pytest
import torch

from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.experts import expert_steps, is_high_noise
from diffsynth.pipelines.image_condition import image_condition
from diffsynth.schedulers import make_scheduler

SWITCHES = ["pipe_a14b_t2v_tiny", "pipe_a14b_i2v_tiny"]


@pytest.fixture(scope="module")
def vae(golden) -> WanVideoVAE:
    vae = WanVideoVAE(dim=4).requires_grad_(False)
    vae.load_state_dict(golden("vae_tiny_weights")[0])
    return vae


@pytest.mark.parametrize("name", ["pipe_i2v21_tiny", "pipe_flf2v_tiny", "pipe_a14b_i2v_tiny"])
def test_the_condition_is_the_official_mask_and_latents(vae, golden, name):
    g, _ = golden(name)
    y = image_condition(vae, g["image"], 9, g.get("last_image"))
    assert torch.equal(y[:, :4], g["mask"])
    torch.testing.assert_close(y[:, 4:], g["condition_latents"], atol=2e-5, rtol=0)


def test_a_last_frame_inside_a_latent_frame_is_repeated_as_the_vae_repeats_it(vae, golden):
    g, _ = golden("pipe_flf2v_tiny")
    image = g["image"].expand(2, -1, -1, -1)
    y = image_condition(vae, image, 7, g["last_image"].expand_as(image))
    assert y.shape == (2, 20, 3, 6, 8)
    assert y[0, :4, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert image_condition(vae, image, 1)[0, :4, :, 0, 0].tolist() == [[1]] * 4
    with pytest.raises(ValueError, match=r"last_image must be .*got \(1, 3, 48, 64\), 9 frames"):
        image_condition(vae, image, 9, g["last_image"])
    with pytest.raises(ValueError, match="1 frames"):
        image_condition(vae, image, 1, image)


@pytest.mark.parametrize("name", SWITCHES)
def test_the_switch_lies_where_the_official_code_has_it(golden, name):
    g, info = golden(name)
    assert is_high_noise(**{k: info["equality"][k] for k in ("timestep", "boundary")})
    assert not is_high_noise(torch.tensor(874.99), 0.875)
    for sampler in ("euler", "unipc"):
        for case in info.get("switch_table", []):
            scheduler = make_scheduler(sampler, case["shift"])
            scheduler.set_timesteps(case["steps"], 1.0)
            count = case[f"high_noise_steps_{sampler}"]
            assert expert_steps(scheduler.timesteps, 0, case["boundary"]) == range(count)
            rest = range(count, case["steps"])
            assert expert_steps(scheduler.timesteps, count, case["boundary"]) == rest
        count = info["run"]["high_noise_steps"][sampler]
        boundary = info["run"]["boundary"]
        assert expert_steps(g[f"{sampler}.timesteps"], 0, boundary) == range(count)
