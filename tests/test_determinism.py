"""The same seed gives the same bits, whatever saves memory; docs/reliability.md says where it does not."""

import numpy as np
import pytest
import torch

from diffsynth import MotionGuidance, WanVideoPipeline
from diffsynth.testing import write_checkpoint

SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("same") / "tiny")


def latents(checkpoint, prepare=None, motion=None, **options):
    pipe = WanVideoPipeline.from_pretrained(checkpoint, device="cpu")
    if prepare is not None:
        prepare(pipe)
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    motion = MotionGuidance(mode="effi_AMF", window=3, **(motion or {}))
    return pipe("a cat", input_video=video, motion=motion, output_type="latent", **{**SIZE, **options})


@pytest.fixture(scope="module")
def expected(checkpoint):
    return latents(checkpoint)


SAVING = {
    "nothing: a second time": {},
    "offload": {"prepare": lambda pipe: pipe.enable_cpu_offload()},
    "streaming": {"prepare": lambda pipe: pipe.enable_vram_management(0, stream_text_encoder=True)},
    "streaming, one block kept": {"prepare": lambda pipe: pipe.enable_vram_management(20_000)},
    "each block's input kept": {"motion": {"checkpoint": "block"}},
    "these inputs on the CPU": {"motion": {"checkpoint": "offload"}},
    "all activations kept": {"motion": {"checkpoint": "none"}},
}


@pytest.mark.parametrize("saving", SAVING)
def test_what_saves_memory_changes_no_bit(checkpoint, expected, saving):
    assert torch.equal(latents(checkpoint, **SAVING[saving]), expected)


@pytest.mark.parametrize("change", [{"batch_cfg": True}, {"motion": {"chunk": 1}}])
def test_calls_of_other_sizes_differ_by_rounding_alone(checkpoint, change):
    one, two = latents(checkpoint, batch_cfg=False), latents(checkpoint, **{"batch_cfg": False, **change})
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)


def test_another_seed_is_another_video(checkpoint, expected):
    assert (latents(checkpoint, seed=6) - expected).abs().mean() > 0.1
