"""The guided steps as a range of noise levels: the same levels at every shift and number of steps."""

import json
import logging

import pytest
import torch
from PIL import Image

from diffsynth import WanVideoPipeline
from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import RunOptions
from diffsynth.configs.resolve import ReferenceFacts, resolve
from diffsynth.planning.cost import guidance_cost
from diffsynth.schedulers import make_scheduler

REFERENCE = ReferenceFacts(num_frames=81, height=480, width=832)


def resolved(motion, defaults=None, **options):
    return resolve({"motion": motion, "seed": 1, **options}, defaults or RunDefaults(), REFERENCE)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 12.0])
@pytest.mark.parametrize(("steps", "strength"), [(50, 0.75), (25, 1.0), (8, 0.5)])
def test_levels_are_those_of_the_solvers(sampler, shift, steps, strength):
    run = RunOptions(num_inference_steps=steps, sigma_shift=shift, denoising_strength=strength)
    scheduler = make_scheduler(sampler, shift)
    scheduler.set_timesteps(steps, strength)
    assert run.levels == pytest.approx(scheduler.sigmas.tolist(), abs=2e-3)
    if sampler == "euler":
        assert run.levels == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(("shift", "steps"), [(3.0, 25), (7.0, 50), (12.0, 40)])
def test_the_guided_steps_are_those_within_the_range(shift, steps):
    run = resolved(
        {"guided": (0.93, 0.6)}, sigma_shift=shift, num_inference_steps=steps, denoising_strength=1.0
    )
    guided = run.motion.guided_range(steps)
    inside = [step for step, level in enumerate(run.levels) if 0.6 <= level <= 0.93]
    assert list(guided) == inside
    assert guided.start > 0
    again = resolve({"motion": run.motion, "seed": 1, "sigma_shift": shift, "num_inference_steps": steps,
                     "denoising_strength": 1.0}, RunDefaults(), REFERENCE)  # fmt: skip
    assert again == run
    assert RunOptions.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_the_published_range_is_that_of_the_first_ten_steps():
    assert resolved({}).motion.guided_range(50) == range(10)
    assert resolved({"guided": (0.956, 0.915)}).motion.guided_range(50) == range(10)


def test_what_is_asked_for_replaces_what_a_checkpoint_declares():
    defaults = RunDefaults(motion={"effi_AMF": {"guided": (1.0, 0.925)}}, presets={
        "few": {"motion": {"effi_AMF": {"guided_steps": 2}}}})  # fmt: skip
    assert resolved(None, defaults).motion.guided_range(50) == range(8)
    assert resolved({"guided_steps": 3}, defaults).motion.guided_range(50) == range(3)
    assert resolved(None, defaults, preset="few").motion.guided_range(50) == range(2)


def test_a_range_without_a_step_and_a_rising_one_are_refused():
    with pytest.raises(ValueError, match=r"no step lies within guided=\(0.99, 0.97\): the run's noise"):
        resolved({"guided": (0.99, 0.97)})
    with pytest.raises(ValueError, match=r"guided must be \(from, to\), falling noise levels; got"):
        MotionGuidance(guided=(0.3, 0.7))


def test_guidance_above_all_motion_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        resolved({}, sigma_shift=7.0, num_inference_steps=50, denoising_strength=0.75)
    assert "all guided steps lie above" not in caplog.text
    with caplog.at_level(logging.WARNING):
        resolved({}, sigma_shift=12.0, num_inference_steps=50, denoising_strength=1.0)
    assert "all guided steps lie above noise level 0.95 (the last at 0.982)" in caplog.text


def test_a_run_guides_these_steps_and_no_others(tiny_checkpoint):
    clip = [Image.linear_gradient("L").rotate(turn).convert("RGB") for turn in range(5)]
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    arguments = {
        "num_inference_steps": 6,
        "denoising_strength": 1.0,
        "sigma_shift": 3.0,
        "num_frames": 5,
        "seed": 2,
    }
    arguments |= {"height": 32, "width": 32, "output_type": "latent", "progress_bar_cmd": None}
    motion = {
        "block": 1,
        "window": 1,
        "tile": (1, 1),
        "sf": 2,
        "inner_steps": 2,
        "interval": 1,
        "guided": (0.9, 0.7),
    }
    events = []
    (made,) = pipe.run("a cat", input_video=clip, motion=motion, **arguments, observer=events.append)
    assert made.options.motion.guided_range(6) == range(2, 4)
    assert [(e.step, e.steps) for e in events if e.stage == "guidance"] == [(1, 2), (2, 2)]
    assert [round(e.timestep.item()) for e in events if e.stage == "guidance"] == [857, 750]
    assert len(made.cost.losses) == 2
    free = []
    pipe.run("a cat", mode="No_transfer", **arguments, observer=free.append)
    latents = [[e.latents for e in found if e.stage == "sampling"] for found in (events, free)]
    assert all(
        torch.equal(guided, plain) for guided, plain in zip(latents[0][:2], latents[1][:2], strict=True)
    )
    assert not torch.equal(latents[0][2], latents[1][2])
    assert guidance_cost(made.options.motion, 2, 6) == guidance_cost(
        MotionGuidance(**{**motion, "guided": None, "guided_steps": 2}), 2, 6
    )
