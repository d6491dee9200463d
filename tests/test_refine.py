"""The second pass after a run with motion: from the finished sample, noised, without transfer."""

import itertools
import logging

import pytest
import torch

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.options import RunOptions
from diffsynth.motion import MotionGuidance
from diffsynth.planning.cost import run_cost
from diffsynth.planning.sizes import ModelSizes
from diffsynth.testing import write_clip

STEPS, SEED = 4, 2**32 - 1
CALL = {
    "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "seed": SEED, "cfg_scale": 1.0,
    "denoising_strength": 1.0, "progress_bar_cmd": None, "output_type": "latent",
}  # fmt: skip
GUIDANCE = {"guided_steps": 2, "inner_steps": 1, "block": 1, "window": 3, "tile": (1, 1), "sf": 2}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 9, height=32, width=32)
    return {**CALL, "input_video": VideoData(path), "motion": MotionGuidance(**GUIDANCE)}


def test_the_second_pass_denoises_the_noised_sample_without_guidance(pipe, call):
    events = []
    found = pipe("a dog", **call, refine=0.5, observer=events.append)
    first = pipe("a dog", **call)

    shift = pipe.defaults["sigma_shift"]
    levels = [shift * u / (1 + (shift - 1) * u) for u in (0.5, 0.25, 0.0)]
    x = (1 - levels[0]) * first + levels[0] * torch.randn(
        first.shape, generator=torch.Generator().manual_seed(0)
    )
    context = pipe.models.prompter.encode_prompt("a dog", pipe.models.text_encoder)
    for level, below in itertools.pairwise(levels):
        with torch.no_grad():
            x = x + (below - level) * pipe.dit(x, torch.tensor([1000 * level]), context)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    told = [(event.stage, event.step, event.steps) for event in events]
    after = told[told.index(("refine", 0, 0)) + 1 :]
    assert after == [("sampling", 1, 2), ("sampling", 2, 2), ("decode", 0, 0)]


def test_there_is_no_second_pass_without_motion_and_whoever_asks_for_it_is_told(pipe, call, caplog):
    plain = {**call, "motion": None, "mode": "No_transfer", "input_video": None}
    with caplog.at_level(logging.WARNING, "diffsynth"):
        refined = pipe("a dog", **plain, refine=0.5)
    assert "refine has no effect without transfer" in caplog.text
    assert torch.equal(refined, pipe("a dog", **plain))


class Boom(Exception):
    pass


def test_a_run_killed_in_the_second_pass_goes_on_to_the_same_video(pipe, call, tmp_path):
    def observer(event):
        seen.append(event.stage)
        if "refine" in seen and event.step == 1:
            raise Boom

    seen = []
    with pytest.raises(Boom):
        pipe("a dog", **call, refine=0.5, observer=observer, checkpoint_dir=tmp_path, checkpoint_every=1)
    steps = []
    resumed = pipe(
        "a dog", **call, refine=0.5, checkpoint_dir=tmp_path,
        observer=lambda event: steps.append(event.stage),
    )  # fmt: skip
    assert "guidance" not in steps
    assert torch.equal(resumed, pipe("a dog", **call, refine=0.5))


def test_its_steps_are_counted(pipe):
    sizes = ModelSizes.of(pipe.residency.models)
    plain = RunOptions(num_inference_steps=10, motion=MotionGuidance(**GUIDANCE), cfg_scale=3.0)
    refined = RunOptions(num_inference_steps=10, motion=plain.motion, cfg_scale=3.0, refine=0.4)
    few, more = (run_cost(sizes.dit, (2, 4, 4), options) for options in (plain, refined))
    assert more.total_ffe - few.total_ffe == 2 * 4
    assert more.flops - few.flops == pytest.approx(2 * 4 * few.flops / few.total_ffe, rel=0.1)
