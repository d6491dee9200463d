"""The inner loop, the guidance's numbers, and descriptors beside the flow."""

import logging
from dataclasses import fields, replace

import pytest
import torch

from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, NonFiniteGuidanceError, guided_step, optimize_latents
from diffsynth.motion.amf import _say_if_windows_have_no_course
from diffsynth.motion.latent_prediction import damp_across, frame_differences
from diffsynth.motion.optimizer import Evaluation


def quadratic(target, calls=None):
    """|x - target|^2 with its gradient."""

    def objective(x):
        if calls is not None:
            calls.append(x.clone())
        return Evaluation(
            (x - target).square().sum(), 2 * (x - target), {"square": (x - target).square().sum()}
        )

    return objective


def plain_adamw(x, target, guidance):
    """AdamW on |x - target|^2 written out, with a fresh gradient every `interval` steps."""
    (first, end), n = guidance.lr, guidance.inner_steps
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(n):
        if k % guidance.interval == 0:
            gradient = 2 * (x - target)
        lr = first - (first - end) * k / n
        x = x * (1 - lr * guidance.weight_decay)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        x = x - lr * (mean / (1 - 0.9 ** (k + 1))) / ((square / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    return x


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_the_loop_is_adamw_with_gradient_reuse(interval):
    torch.manual_seed(0)
    x, target = torch.randn(2, 50, dtype=torch.float64)
    guidance = MotionGuidance(interval=interval, lr=(0.1, 0.02))
    moved, record = optimize_latents(x, quadratic(target), guidance)
    torch.testing.assert_close(moved, plain_adamw(x, target, guidance))
    assert record.evaluated_at == tuple(range(0, 10, interval))
    assert record.gradient_evaluations == {1: 10, 3: 4, 10: 1}[interval]
    assert record.lrs == pytest.approx([0.1 - 0.008 * k for k in range(10)])
    assert record.losses[0] == pytest.approx((x - target).square().sum().item())


def test_latents_in_bfloat16_move_through_a_float32_copy():
    torch.manual_seed(0)
    x = torch.randn(1000).mul(3)
    calls = []
    moved, _ = optimize_latents(x.bfloat16(), quadratic(x + 100, calls), MotionGuidance())
    assert moved.dtype == torch.bfloat16
    assert {call.dtype for call in calls} == {torch.float32}
    wide = (calls[-1] - x.bfloat16().float()).abs()
    assert (wide[x.abs() > 1] > 0.02).all()


def test_a_value_that_is_not_finite_stops_with_the_last_good_latents():
    x, seen = torch.zeros(4), []

    def objective(latents):
        seen.append(latents.clone())
        bad = float("nan") if len(seen) == 3 else 1.0
        return Evaluation(torch.tensor(1.0), torch.full((4,), bad), {"amf": torch.tensor(2.0)})

    with pytest.raises(
        NonFiniteGuidanceError, match=r"gradient of motion guidance .* inner step 6 .*amf=2"
    ) as error:
        optimize_latents(x, objective, MotionGuidance())
    assert torch.equal(error.value.latents, seen[1])
    assert x.abs().max() == 0


def test_an_interrupt_ends_the_loop_before_the_next_step():
    answers = iter([False, False, True])
    _, record = optimize_latents(
        torch.zeros(3), quadratic(torch.ones(3)), MotionGuidance(), lambda: next(answers)
    )
    assert len(record.lrs) == 2


def make_dit(**changes):
    torch.manual_seed(0)
    sizes = {
        "dim": 24,
        "ffn_dim": 24,
        "freq_dim": 16,
        "num_heads": 2,
        "num_layers": 3,
        "text_len": 4,
    } | changes
    return WanModel(in_dim=4, out_dim=4, text_dim=8, **sizes)


def step_inputs(frames=3, rows=12, cols=16):
    generator = torch.Generator().manual_seed(1)
    latents, reference, noise = torch.randn(3, 1, 4, frames, rows, cols, generator=generator)
    context, null = torch.randn(2, 1, 4, 8, generator=generator)
    return latents, {
        "reference": reference, "noise": noise, "sigma": 0.9, "timestep": 900.0, "context": context,
        "null_context": null,
    }  # fmt: skip


@pytest.mark.parametrize("mode", DESCRIPTORS)
def test_a_step_lowers_the_loss_of_every_descriptor(mode):
    latents, inputs = step_inputs()
    guidance = replace(MotionGuidance.for_mode(mode), interval=1, inner_steps=8, lr=(0.01, 0.01))
    moved, record = guided_step(make_dit(), latents, guidance=guidance, **inputs)
    assert record.losses[-1] < 0.97 * record.losses[0]
    assert (moved - latents).abs().max() < 0.1


def test_activations_kept_or_computed_again_give_the_same_step():
    latents, inputs = step_inputs()
    kept, again = (
        guided_step(make_dit(), latents, guidance=MotionGuidance(checkpoint=policy), **inputs)[0]
        for policy in ("none", "block")
    )
    torch.testing.assert_close(kept, again, atol=1e-6, rtol=0)


def test_latent_prediction_takes_no_gradient_through_the_dit():
    """z0 = x - sigma v with v constant; a step of Adam moves each element by lr against its sign."""
    latents, inputs = step_inputs()
    dit = make_dit()
    guidance = MotionGuidance.for_mode(
        "FlowMotion", {"inner_steps": 1, "prediction_cfg": 1.0, "difference_weight": 0.0}
    )
    moved, record = guided_step(dit, latents, guidance=guidance, **inputs)
    t = torch.tensor([900.0])
    with torch.no_grad():
        noised = 0.1 * inputs["reference"] + 0.9 * inputs["noise"]
        target = noised - 0.9 * dit(noised, t, inputs["null_context"])
        distance = latents - 0.9 * dit(latents, t, inputs["context"]) - target
    assert record.losses[0] == pytest.approx(20 * distance.square().mean().item(), rel=1e-4)
    torch.testing.assert_close(moved, latents - 0.003 * distance.sign(), atol=1e-4, rtol=0)


def test_frame_differences_are_of_neighbours_and_of_all_pairs():
    x = torch.tensor([0.0, 1.0, 4.0]).reshape(1, 1, 3, 1, 1)
    assert frame_differences(x).flatten().tolist() == [1.0, 3.0, 1.0, 4.0, 3.0]


def test_velocity_across_the_mean_is_damped_over_channels():
    velocity, mean = (
        torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1, 1),
        torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1, 1),
    )
    torch.testing.assert_close(damp_across(velocity, mean, 0.1).flatten(), torch.tensor([3.0, 0.4]))


def test_no_later_frames_make_the_window_loss_zero_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    _say_if_windows_have_no_course.cache_clear()  # another test may have had it said
    latents, inputs = step_inputs(frames=2)
    _, record = guided_step(make_dit(), latents, guidance=MotionGuidance(inner_steps=1, tau=1.01), **inputs)
    assert record.parts[0]["window"] == 0
    assert "the window loss is 0" in caplog.text


def test_the_defaults_are_the_published_numbers():
    guidance = MotionGuidance()
    published = {
        "block": 14, "window": 21, "tile": (3, 4), "tau": 1.0, "sf": 4, "guided_steps": 10, "inner_steps": 10,
        "interval": 3, "lr": (0.003, 0.002), "amf_weight": 5.0, "window_weight": 1.0, "weight_decay": 0.01,
    }  # fmt: skip
    assert {name: getattr(guidance, name) for name in published} == published
    assert [guidance.block_for(depth) for depth in (30, 40)] == [14, 14]
    assert MotionGuidance(block=None).block_for(6) == 3
    assert guidance.block_for(2) == 1
    with pytest.raises(ValueError, match=r"block must be in 0\.\.5 for this DiT; got 9"):
        MotionGuidance(block=9).block_for(6)


BAD = {
    "window": (4, "window must be an odd"),
    "tile": ((3,), "tile must be"),
    "sf": (1, "sf must be .* at least 2; got 1"),
    "interval": (0, "interval must be"),
    "inner_steps": (0, "inner_steps must be"),
    "guided_steps": (-1, "guided_steps must be"),
    "tau": (float("inf"), "tau must be"),
    "lr": ((0.1,), "lr must be two values"),
    "chunk": (0, "chunk must be"),
    "mode": ("MOFT", "mode must be one of effi_AMF, AMF, FlowMotion; got 'MOFT'"),
    "block": (-1, "block must be"),
    "checkpoint": ("all", "checkpoint must be one of auto, none, attention, block, offload"),
    "heads": ([], "heads must be"),
    "amf_weight": (-1.0, "amf_weight must be"),
    "variant": ("draft", "variant must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_numbers_that_are_not_allowed_are_named(name):
    given, message = BAD[name]
    assert name in {field.name for field in fields(MotionGuidance)}
    with pytest.raises(ValueError, match=message):
        MotionGuidance(**{name: given})


def test_shapes_that_do_not_fit_are_named():
    latents, inputs = step_inputs()
    with pytest.raises(ValueError, match=r"latents and noise must both be \[1, C, F, h, w\]"):
        guided_step(make_dit(), latents, guidance=MotionGuidance(), **inputs | {"noise": latents[:, :, :2]})
