"""A timestep for each latent frame: the DiT of the TI2V models reads a clean first frame at timestep 0."""

import pytest
import torch

from diffsynth.models.wan_video_dit import WanModel


@pytest.fixture
def dit():
    torch.manual_seed(0)
    sizes = {"dim": 16, "in_dim": 4, "ffn_dim": 32, "out_dim": 4, "text_dim": 8, "freq_dim": 16}
    return WanModel(**sizes, num_heads=2, num_layers=2, text_len=4).double()


def inputs():
    return torch.randn(2, 4, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)


def test_the_same_timestep_for_all_frames_is_that_of_the_clip(dit):
    x, context = inputs()
    timestep = torch.tensor([100.0, 700.0])
    by_frame = dit(x, timestep[:, None].repeat(1, 3), context)
    torch.testing.assert_close(by_frame, dit(x, timestep, context))


def test_another_timestep_of_the_first_frame_changes_the_result(dit):
    x, context = inputs()
    timestep = torch.full((2, 3), 700.0)
    plain = dit(x, timestep, context)
    timestep[:, 0] = 0
    assert not torch.allclose(dit(x, timestep, context), plain)


def test_the_number_of_timesteps_is_checked(dit):
    x, context = inputs()
    with pytest.raises(ValueError, match=r"timestep must be \[B\] or \[B, 3 or 12\]; got"):
        dit(x, torch.zeros(2, 2), context)
