"""Motion transfer through the pipeline, on a tiny random checkpoint."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, NonFiniteGuidanceError, guided_step, make_descriptor
from diffsynth.motion.descriptors import StepInputs
from diffsynth.runs.cost import RunCost, measured
from diffsynth.testing import write_clip

MODES = ("effi_AMF", "AMF", "FlowMotion")
QUICK = {
    "num_inference_steps": 3,
    "seed": 1,
    "progress_bar_cmd": list,
    "tiled": False,
    "output_type": "latent",
}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return VideoData(
        write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", num_frames=13, height=64, width=96)
    )


def distance(pipe, latents, clip, guidance, sigma=0.1):
    """The guidance loss between the motion of latents and that of the clip, both a little noised alike."""
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in clip]).permute(3, 0, 1, 2)[None]
    reference = pipe.vae.encode(pixels / 127.5 - 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    null = pipe.prompter.encode_prompt("", pipe.text_encoder)
    descriptor = make_descriptor(guidance)
    inputs = StepInputs(dit=pipe.dit, timestep=torch.tensor([1000 * sigma]), sigma=sigma, null_context=null)

    def motion(x, target=None):
        return descriptor.describe(descriptor.observe((1 - sigma) * x + sigma * noise, null, inputs), target)

    with torch.no_grad():
        target = motion(reference)
        return descriptor.loss(motion(latents, target), target).parts["amf"].item()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_a_video_and_repeats_bit_for_bit(pipe, clip, mode):
    frames = pipe("a red car", input_video=clip, mode=mode, **{**QUICK, "output_type": "pil"})
    assert len(frames) == 13
    assert frames[0].size == (96, 64)
    first, second = (pipe("a red car", input_video=clip, mode=mode, **QUICK) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe("a red car", input_video=clip, mode="No_transfer", **QUICK))


def test_guidance_brings_the_motion_closer_to_the_reference(pipe, clip, caplog):
    caplog.set_level(logging.INFO)
    guidance = MotionGuidance(window=5, tau=4.0, lr=(0.05, 0.02))
    options = {**QUICK, "num_inference_steps": 10, "denoising_strength": 0.9, "cfg_scale": 1}
    guided = pipe("a red car", input_video=clip, motion=guidance, **options)
    free = pipe("a red car", input_video=clip, mode="No_transfer", **options)
    guided, free = (distance(pipe, latents, clip, guidance) for latents in (guided, free))
    assert guided < 0.9 * free
    assert "guided step 10: loss" in caplog.text


def test_the_mode_defaults_to_tile_flow_with_a_reference_and_says_so(pipe, clip, caplog):
    caplog.set_level(logging.INFO)
    default = pipe("a cat", input_video=clip, **QUICK)
    assert "no mode is named: using effi_AMF" in caplog.text
    assert torch.equal(default, pipe("a cat", input_video=clip, mode="effi_AMF", sf=4, **QUICK))
    assert not torch.equal(default, pipe("a cat", input_video=clip, sf=2, **QUICK))
    assert torch.equal(default, pipe("a cat", input_video=clip, motion=MotionGuidance(), **QUICK))
    pipe("a cat", height=32, width=32, num_frames=1, **QUICK)
    assert "no mode is named: using No_transfer" in caplog.text


def test_only_the_first_guided_steps_are_guided_and_cost_is_counted(pipe, clip, tmp_path):
    guidance = MotionGuidance(guided_steps=2, checkpoint="none")
    pipe(
        "a cat",
        input_video=clip,
        motion=guidance,
        cfg_scale=1,
        test_latency=True,
        latency_dir=tmp_path,
        **QUICK,
    )
    (line,) = [json.loads(text) for text in (tmp_path / "latency.jsonl").read_text().splitlines()]
    assert line["mode"] == "effi_AMF"
    assert line["seed"] == 1
    assert len(line["time_guidance"]) == 2
    assert line["gradient_evaluations"] == 2 * 4
    # Block 1 of 2 is read: one whole block for the reference and for each gradient; then two blocks a step.
    assert line["dit_block_calls"] == 2 * (1 + 4) + 3 * 2
    assert line["time_gen"] > sum(line["time_guidance"]) > 0


def test_learning_rates_fade_over_the_guided_steps(pipe, clip, monkeypatch):
    """How far each guided step moves the latents falls with them; the first is as without."""
    moves = {}

    def spy(dit, latents, **options):
        moved, record = guided_step(dit, latents, **options)
        moves[options["guidance"].fade].append((options["guidance"].lr, (moved - latents).abs().mean()))
        return moved, record

    monkeypatch.setattr("diffsynth.pipelines.denoise.guided_step", spy)
    numbers = {"guided_steps": 2, "inner_steps": 1, "interval": 1, "update": "gradient", "lr": (0.2, 0.1)}
    for fade in (1.0, 0.0):
        moves[fade] = []
        pipe("a cat", input_video=clip, motion=MotionGuidance(fade=fade, **numbers), **QUICK)
    (first, length), (second, shorter) = moves[0.0]
    assert (first, second) == ((0.2, 0.1), (0.1, 0.05))
    assert length == moves[1.0][0][1]
    assert [lr for lr, _ in moves[1.0]] == [(0.2, 0.1)] * 2
    assert 0.3 < shorter / length < 0.7


def test_a_guided_step_at_published_depth_runs_fourteen_blocks_a_gradient():
    torch.manual_seed(0)
    dit = WanModel(
        dim=24,
        in_dim=4,
        ffn_dim=24,
        out_dim=4,
        text_dim=8,
        freq_dim=16,
        num_heads=2,
        num_layers=30,
        text_len=8,
    )
    latents, reference, noise = torch.randn(3, 1, 4, 3, 12, 16)
    context = torch.randn(2, 1, 4, 8)
    projections = []
    hook = dit.blocks[14].self_attn.norm_q.register_forward_hook(lambda *_: projections.append(1))
    others = [
        block.self_attn.norm_q.register_forward_hook(lambda *_: projections.append(99))
        for block in dit.blocks[15:]
    ]
    cost = RunCost(seed=0, mode="effi_AMF", num_inference_steps=1)
    with measured(cost, dit, torch.device("cpu")):
        _, record = guided_step(
            dit, latents, reference=reference, noise=noise, sigma=0.9, timestep=900.0, context=context[0],
            null_context=context[1], guidance=MotionGuidance(checkpoint="none"),
        )  # fmt: skip
    for handle in (hook, *others):
        handle.remove()
    assert record.gradient_evaluations == 4
    assert record.evaluated_at == (0, 3, 6, 9)
    assert cost.dit_block_calls == 14 * (4 + 1)
    assert projections == [1] * 5
    assert all(parameter.grad is None and parameter.requires_grad for parameter in dit.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size", [(368, 640), (256, 256), (480, 848), (208, 112)])
def test_odd_sizes_and_portrait_are_guided(pipe, size, tmp_path):
    """Token grids of 23 x 40, 16 x 16, 30 x 53 and 13 x 7: partial tiles, windows as large as the grid."""
    rng = np.random.default_rng(0)
    video = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(2)]
    options = {
        **QUICK,
        "num_inference_steps": 1,
        "test_latency": True,
        "latency_dir": tmp_path,
        "cfg_scale": 1,
    }
    guidance = MotionGuidance(guided_steps=1, inner_steps=2, interval=2)
    latents = pipe("a cat", input_video=video, motion=guidance, **options)
    assert latents.shape == (1, 16, 2, size[0] // 8, size[1] // 8)
    assert json.loads((tmp_path / "latency.jsonl").read_text())["gradient_evaluations"] == 1


@pytest.mark.parametrize("num_frames", [2, 10, 17, 30])
def test_any_number_of_frames_is_guided(pipe, num_frames):
    video = np.random.default_rng(0).integers(0, 255, (num_frames, 32, 48, 3), dtype=np.uint8)
    frames = pipe("a cat", input_video=video, **{**QUICK, "output_type": "np", "num_inference_steps": 1})
    assert frames.shape == (num_frames, 32, 48, 3)


@pytest.mark.parametrize(
    ("dtype", "weight"), [(torch.bfloat16, 5.0), (torch.float16, 5.0), (torch.float16, 1e7)]
)
def test_weights_of_half_width_move_the_latents_as_in_float32(tiny_checkpoint, pipe, dtype, weight):
    """With the large weight the gradient overflows in float16 unless the loss is scaled down."""
    half = WanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=dtype, device="cpu")
    torch.manual_seed(0)
    latents, reference, noise = torch.randn(3, 1, 16, 4, 8, 12)
    context, null_context = torch.randn(2, 1, 6, 32)
    step = {
        "reference": reference,
        "noise": noise,
        "sigma": 0.9,
        "timestep": 900.0,
        "guidance": MotionGuidance(amf_weight=weight),
    }
    step |= {"context": context, "null_context": null_context}
    moves = [guided_step(pipeline.dit, latents, **step)[0] - latents for pipeline in (pipe, half)]
    large = latents.abs() > 1
    for move in moves:
        assert (move[large].abs() > 0.005).float().mean() > 0.95
    assert (moves[0].sign() == moves[1].sign()).float().mean() > 0.9


def test_unipc_and_lists_of_prompts_work_with_guidance(pipe, clip):
    options = {**QUICK, "input_video": clip, "sampler": "unipc"}
    both = pipe(["a cat", "a dog"], **options)
    assert torch.equal(both[1], pipe("a dog", **options))
    assert not torch.equal(both[0], pipe("a cat", mode="No_transfer", **options))


def test_interrupt_stops_within_a_guided_step(pipe, clip):
    evaluations = []

    def count_and_stop(*_):
        evaluations.append(1)
        if len(evaluations) == 3:
            pipe.interrupt()

    hook = pipe.dit.blocks[0].register_forward_hook(count_and_stop)
    pipe("a cat", input_video=clip, motion=MotionGuidance(interval=1), cfg_scale=1, **QUICK)
    hook.remove()
    # The reference, two gradients, and the step's own DiT call, which is finished.
    assert len(evaluations) == 3 + 1


@pytest.fixture
def broken_block(pipe):
    """Block 1's queries are not numbers."""
    weight = pipe.dit.blocks[1].self_attn.norm_q.weight
    before = weight.clone()
    weight.fill_(float("nan"))
    yield
    weight.copy_(before)


def state_of(dit):
    return [(parameter.requires_grad, parameter.grad) for parameter in dit.parameters()], dit.training


def test_the_model_is_left_as_found(pipe, clip):
    before = state_of(pipe.dit)
    pipe("a cat", input_video=clip, **QUICK)
    assert state_of(pipe.dit) == before
    assert not pipe.dit.blocks[0]._forward_hooks


@pytest.mark.usefixtures("broken_block")
def test_values_that_are_not_finite_stop_the_run_with_the_step_and_the_last_good_latents(pipe, clip):
    before = state_of(pipe.dit)
    with pytest.raises(
        NonFiniteGuidanceError,
        match=r"denoising step 0: .*not finite at inner step 0 .*DiT is in .*: try float32",
    ) as error:
        pipe("a cat", input_video=clip, **QUICK)
    assert error.value.latents.isfinite().all()
    assert state_of(pipe.dit) == before
    assert not pipe.dit.blocks[0]._forward_hooks


BAD_ARGUMENTS = {
    "no reference": (
        {"mode": "effi_AMF", "input_video": None},
        "mode 'effi_AMF' transfers motion and needs input_video",
    ),
    "one frame": (
        {"input_video": [Image.new("RGB", (32, 32))]},
        "needs num_frames and input_video of 2 frames or more; got 1",
    ),
    "sf": ({"sf": 1}, "sf must be .* at least 2 or None; got 1"),
    "block": ({"motion": MotionGuidance(block=5)}, r"block must be in 0\.\.1 for this DiT; got 5"),
    "mode": (
        {"mode": "MOFT"},
        "mode must be one of effi_AMF, AMF, FlowMotion, No_transfer or None; got",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_any_model_runs(pipe, clip, case, monkeypatch):
    arguments, message = BAD_ARGUMENTS[case]
    for model in pipe.residency.models.values():
        monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **{"input_video": clip, **QUICK, **arguments})


def test_more_guided_steps_than_steps_are_clamped_with_a_warning(pipe, clip, caplog):
    ten = pipe("a cat", input_video=clip, motion=MotionGuidance(guided_steps=10), **QUICK)
    assert "guided_steps=10: the run has only 3 steps" in caplog.text
    assert torch.equal(ten, pipe("a cat", input_video=clip, motion=MotionGuidance(guided_steps=3), **QUICK))


def test_numbers_of_the_method_are_said_to_have_no_effect_without_transfer(pipe, clip, caplog):
    options = {"input_video": clip, "mode": "No_transfer", **QUICK}
    assert torch.equal(pipe("a cat", sf=3, **options), pipe("a cat", **options))
    assert "motion, sf and motion_scale have no effect in mode No_transfer" in caplog.text


def test_a_mode_beside_a_guidance_replaces_its_mode(pipe, clip):
    guidance = replace(MotionGuidance(), tau=2.0)
    one = pipe("a cat", input_video=clip, motion=guidance, mode="AMF", **QUICK)
    assert torch.equal(one, pipe("a cat", input_video=clip, motion=replace(guidance, mode="AMF"), **QUICK))
