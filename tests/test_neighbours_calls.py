"""What users of DiffSynth and diffusers type: it works, or the answer names what it is called here."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffsynth import ModelManager, WanVideoPipeline
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.schedulers import make_scheduler

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture
def manager(tiny_checkpoint):
    return ModelManager(torch_dtype=torch.float32, file_path_list=[tiny_checkpoint])


@pytest.fixture
def pipe(manager):
    return WanVideoPipeline.from_model_manager(manager, device="cpu", use_usp=False)


def run(pipe, **options):
    return pipe("a cat", progress_bar_cmd=iter, **{**SMALL, "seed": 1, **options})


def test_arguments_of_features_that_are_not_used_are_none(pipe):
    unused = (
        "input_image",
        "end_image",
        "control_video",
        "vace_video",
        "reference_image",
        "motion_bucket_id",
    )
    whole = run(pipe)
    assert torch.equal(
        run(pipe, **dict.fromkeys(unused), negative_prompt=None, tea_cache_l1_thresh=None), whole
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'control_video'"):
        run(pipe, control_video=np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="this model takes no input_image"):
        run(pipe, input_image=np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("guidance_scale", "cfg_scale"),
        ("generator", "seed"),
        ("strength", "denoising_strength"),
        ("flow_shift", "sigma_shift"),
        ("cfg_merge", "batch_cfg"),
    ],
)
def test_other_names_are_answered_with_ours(pipe, theirs, ours):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{theirs}'; here it is {ours}"):
        run(pipe, **{theirs: 1})


def test_the_seed_of_minus_one_is_a_new_one_and_known_afterwards(pipe):
    first, second = run(pipe, seed=-1), run(pipe, seed=-1)
    assert not torch.equal(first, second)
    assert pipe.costs[0].seed >= 0
    assert torch.equal(run(pipe, seed=pipe.costs[0].seed), second)


def test_numbers_of_numpy_are_numbers(pipe):
    numbers = {
        "seed": np.int64(1),
        "height": np.int32(32),
        "num_frames": np.uint8(5),
        "cfg_scale": np.float32(2),
    }
    assert torch.equal(run(pipe, **numbers), run(pipe, cfg_scale=2.0))


def test_the_pipeline_moves_and_takes_loras_as_there(pipe, tmp_path):
    assert pipe.torch_dtype == torch.float32
    assert pipe.to("cpu") is pipe
    schedulers = pipe.scheduler, make_scheduler("euler", pipe.defaults["sigma_shift"])
    for scheduler in schedulers:
        scheduler.set_timesteps(4, 1.0)
    assert torch.equal(schedulers[0].sigmas, schedulers[1].sigmas)
    whole = run(pipe)
    name = "blocks.0.self_attn.q"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    pipe.load_lora(pipe.dit, tmp_path / "lora.safetensors", alpha=0.5)
    changed = run(pipe)
    assert not torch.equal(changed, whole)
    pipe.clear_lora()
    assert torch.equal(run(pipe), whole)
    with pytest.raises(ValueError, match=r"load_lora takes pipe\.dit"):
        pipe.load_lora(pipe.vae, tmp_path / "lora.safetensors")
    for alone in ({"torch_dtype": torch.bfloat16}, {"device": torch.float32}, {"device": torch.bfloat16}):
        assert pipe.to(**alone).dit.dtype == next(iter(alone.values()))
    assert pipe.vae.dtype == torch.float32


def test_the_manager_answers_as_there(tiny_checkpoint, caplog):
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models([tiny_checkpoint], model_names=["wan_video_dit"])
    assert [entry.name for entry in manager.loaded] == ["wan_video_dit"]
    caplog.set_level(logging.WARNING)
    assert manager.fetch_model("wan_video_vae") is None
    assert "no model 'wan_video_vae' is loaded" in caplog.text
    dit, files = manager.fetch_model("wan_video_dit", require_model_path=True)
    assert isinstance(dit, WanModel)
    assert files[0].is_file()
    manager.to("cpu")


def test_several_gpus_are_refused(manager):
    with pytest.raises(ValueError, match="use_usp=True is not supported"):
        WanVideoPipeline.from_model_manager(manager, use_usp=True)
