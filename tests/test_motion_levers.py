"""What makes guidance cheaper: a window for self-attention, coarse latents, gradients of earlier steps."""

import json
import logging
import math

import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import (
    GradientMemory,
    MotionGuidance,
    attention_motion_flow,
    guided_step,
    make_descriptor,
    optimize_latents,
)
from diffsynth.motion.coarse import coarsen, noise_scale
from diffsynth.motion.flow import MotionFlow
from diffsynth.motion.optimizer import Evaluation

PATCH = (1, 2, 2)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return WanModel(
        dim=24,
        in_dim=4,
        ffn_dim=24,
        out_dim=4,
        text_dim=8,
        freq_dim=16,
        num_heads=2,
        num_layers=3,
        text_len=4,
    )


def step(dit, guidance, rows=16, cols=24, **inputs):
    """Latents and what a guided step at noise level 0.9 made of them."""
    generator = torch.Generator().manual_seed(1)
    latents, reference, noise = torch.randn(3, 1, 4, 3, rows, cols, generator=generator)
    context, null = torch.randn(2, 1, 4, 8, generator=generator)
    moved, record = guided_step(
        dit, latents, reference=reference, noise=noise, sigma=0.9, timestep=900.0, context=context,
        null_context=null, guidance=guidance, **inputs,
    )  # fmt: skip
    return latents, moved, record


@pytest.fixture
def seen(dit, monkeypatch):
    """What `features` was called with, call by call."""
    calls, features = [], dit.features

    def spy(x, timestep, context, **options):
        calls.append({"shape": tuple(x.shape), "timestep": timestep.item(), **options})
        return features(x, timestep, context, **options)

    monkeypatch.setattr(dit, "features", spy)
    return calls


def test_no_lever_is_pulled_by_default():
    guidance = MotionGuidance()
    assert (guidance.attention_window, guidance.coarse) == (None, 1)
    assert (guidance.recompute_every, guidance.recompute_below) == (1, None)
    assert all(guidance.faded(step, 0.5).lr == guidance.lr for step in range(guidance.guided_steps))


def test_the_window_bounds_attention_of_the_reference_and_of_what_is_made(dit, seen):
    options = {"inner_steps": 2, "interval": 1, "window": 5}
    _, dense, _ = step(dit, MotionGuidance(**options))
    _, whole, _ = step(dit, MotionGuidance(attention_window=(2, 7, 11), **options))
    _, local, _ = step(dit, MotionGuidance(attention_window=(1, 2, 2), **options))
    assert [call["attention_window"] for call in seen] == [None] * 3 + [(2, 7, 11)] * 3 + [(1, 2, 2)] * 3
    torch.testing.assert_close(whole, dense, atol=1e-5, rtol=0)
    assert (local - dense).abs().max() > 1e-3


def test_averaged_latents_are_a_mix_at_the_lower_noise_level():
    """Exactly the mean of the clean latents and white noise of deviation 1, mixed at the new level."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 3, 64, 64, dtype=torch.float64, generator=generator)
    clean = clean.cumsum(-1).cumsum(-2) / 50 + 3

    def mean(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    for sigma in (0.0, 0.3, 0.9, 1.0):
        lower = sigma * noise_scale(sigma, 2)
        # The shift of noise levels between resolutions at half the side.
        assert lower == pytest.approx(0.5 * sigma / (1 - 0.5 * sigma))
        found = coarsen((1 - sigma) * clean + sigma * noise, sigma, 2, PATCH)
        torch.testing.assert_close(found, (1 - lower) * mean(clean) + lower * 2 * mean(noise))
    assert (2 * mean(noise)).std().item() == pytest.approx(1, abs=0.02)
    third = coarsen(noise[..., :60, :60], 1.0, 3, PATCH)
    assert third.shape[-2:] == (20, 20)
    assert third.std().item() == pytest.approx(1, abs=0.04)


def test_without_averaging_nothing_changes():
    latents = torch.randn(1, 2, 1, 4, 4)
    assert coarsen(latents, 0.9, 1, PATCH) is latents
    assert noise_scale(0.9, 1) == 1


def test_the_dit_sees_a_quarter_of_the_tokens_at_the_level_that_fits(dit, seen):
    guidance = MotionGuidance(coarse=2, inner_steps=2, interval=1, lr=(0.01, 0.01), weight_decay=0.0)
    latents, moved, record = step(dit, guidance)
    assert [call["shape"] for call in seen] == [(1, 4, 3, 8, 12)] * 3
    assert [call["timestep"] for call in seen] == pytest.approx([900 / 1.1] * 3)
    assert record.losses[1] < record.losses[0]
    # The four latents of a square have one gradient.
    move = (moved - latents).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    torch.testing.assert_close(move, move.mean((-3, -1), keepdim=True).expand_as(move), atol=1e-6, rtol=0)
    assert (move.abs() > 0.001).float().mean() > 0.9


@pytest.mark.parametrize("mode", ["effi_AMF", "AMF"])
def test_the_coarse_loss_falls_in_every_mode_that_reads_attention(dit, mode):
    guidance = MotionGuidance(mode=mode, coarse=2, interval=1, inner_steps=8, lr=(0.02, 0.02))
    _, _, record = step(dit, guidance)
    assert record.losses[-1] < 0.97 * record.losses[0]


def test_averages_that_leave_half_a_patch_repeat_the_last_one(dit, seen):
    latents = torch.arange(6.0).repeat_interleave(2)[:, None].expand(1, 1, 1, 12, 8)[..., :6, :]
    out = coarsen(latents, 0.0, 2, PATCH)
    torch.testing.assert_close(out[0, 0, 0, :, 0], torch.tensor([0.0, 1.0, 2.0, 2.0]))
    step(dit, MotionGuidance(coarse=2, inner_steps=1), rows=18, cols=22)
    assert seen[0]["shape"] == (1, 4, 3, 10, 12)
    with pytest.raises(
        ValueError, match="coarse=3 needs latents whose rows and columns are multiples of 3; got 16 x"
    ):
        step(dit, MotionGuidance(coarse=3, inner_steps=1))


def test_displacements_halve_on_the_coarse_grid_and_the_loss_is_of_full_size_tokens():
    frame = torch.randn(1, 16, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    latents = torch.cat([frame, frame.roll(4, dims=-1)], dim=2)
    flows = []
    for coarse in (1, 2):
        tokens = coarsen(latents, 0.0, coarse, (1, 1, 1))[0].permute(1, 2, 3, 0)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        flow = attention_motion_flow(tokens, tokens, pairs=[(0, 1)], hard=True)
        inside = flow[:, :, : 28 // coarse]
        torch.testing.assert_close(inside, torch.tensor([0.0, 4.0 / coarse]).expand_as(inside))
        flows.append(inside)
    losses = [
        make_descriptor(MotionGuidance(mode="AMF", coarse=coarse)).loss(
            *(MotionFlow(flow=f, pairs=[(0, 1)]) for f in (flow, torch.zeros_like(flow)))
        )
        for coarse, flow in zip((1, 2), flows, strict=True)
    ]
    assert losses[0].total.item() == pytest.approx(losses[1].total.item())
    assert losses[1].parts["amf"].item() == pytest.approx(1560 * 16 * (1 - 0.2 / 3))


def quadratic(target, calls):
    """Loss |x - target|^2 / 2, its gradient, and where it was asked."""

    def objective(x):
        calls.append(x.clone())
        return Evaluation(0.5 * (x - target).square().sum(), x - target, {})

    return objective


def run(guidance, target, num_steps):
    """So many guided steps on one memory: the latents after each, the records, where gradients were asked."""
    memory, x, calls, positions, records = GradientMemory(guidance), torch.zeros(len(target)), [], [], []
    for _ in range(num_steps):
        x, record = optimize_latents(x, quadratic(target, calls), guidance, memory=memory)
        positions.append(x)
        records.append(record)
    return positions, records, calls


def test_every_kth_guided_step_computes_gradients_and_those_between_repeat_them():
    torch.manual_seed(0)
    target = torch.randn(50) * 10
    guidance = MotionGuidance(recompute_every=3)
    positions, records, calls = run(guidance, target, 7)
    assert [record.gradient_evaluations for record in records] == [4, 0, 0, 4, 0, 0, 4]
    assert len(calls) == 12
    assert {len(record.lrs) for record in records} == {10}
    # The second and third steps are the inner loop on the first one's gradients, in their places.
    for before, after in ((0, 1), (1, 2)):
        again = iter(x - target for x in calls[:4])
        expected, _ = optimize_latents(
            positions[before], lambda _x, again=again: Evaluation(torch.zeros(()), next(again), {}), guidance
        )
        assert torch.equal(positions[after], expected)
    fresh, _ = optimize_latents(positions[2], quadratic(target, []), guidance)
    assert torch.equal(positions[3], fresh)


@pytest.mark.parametrize("rule", ["falling", "extrapolate"])
def test_repeated_steps_follow_the_rule_within_a_step(rule):
    guidance = MotionGuidance(recompute_every=2, reuse=rule, update="gradient", weight_decay=0.0)
    positions, records, _ = run(guidance, torch.full((4,), 9.0), 2)
    assert records[0].lrs == records[1].lrs
    torch.testing.assert_close(positions[1] - positions[0], positions[0])


def test_gradients_that_turn_between_guided_steps_are_computed_afresh():
    # The updates go on far from the target; near it each guided step jumps past it.
    options = {"inner_steps": 1, "recompute_every": 4, "update": "gradient", "weight_decay": 0.0}
    far = MotionGuidance(recompute_below=0.5, lr=(0.1, 0.1), **options)
    fresh = [record.gradient_evaluations for record in run(far, torch.full((4,), 100.0), 10)[1]]
    assert fresh == [1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    near = [record.gradient_evaluations for record in run(far, torch.full((4,), 0.04), 10)[1]]
    assert sum(near) > sum(fresh)
    never = MotionGuidance(lr=(0.1, 0.1), **options)
    assert [r.gradient_evaluations for r in run(never, torch.full((4,), 0.04), 5)[1]] == [1, 0, 0, 0, 1]


def test_a_memory_that_repeats_nothing_changes_nothing(dit):
    guidance = MotionGuidance(inner_steps=4, window=5)
    _, without, _ = step(dit, guidance)
    _, beside, record = step(dit, guidance, memory=GradientMemory(guidance))
    assert torch.equal(without, beside)
    assert record.gradient_evaluations == 2


@pytest.mark.parametrize("mode", ["effi_AMF", "FlowMotion"])
def test_a_repeating_step_does_not_run_the_dit(dit, mode):
    guidance = MotionGuidance(mode=mode, recompute_every=2, inner_steps=4)
    memory, blocks = GradientMemory(guidance), []
    hook = dit.blocks[0].register_forward_hook(lambda *_: blocks.append(1))
    _, first, _ = step(dit, guidance, memory=memory)
    run_once = len(blocks)
    latents, second, record = step(dit, guidance, memory=memory)
    hook.remove()
    assert len(blocks) == run_once > 0
    assert (record.losses, record.evaluated_at, len(record.lrs)) == ((), (), 4)
    # From the same latents the same move.
    assert torch.equal(first, second)
    assert not torch.equal(second, latents)


def test_a_run_counts_the_gradients_it_computed(tiny_checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    video = torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8).numpy()
    guidance = MotionGuidance(
        guided_steps=3, recompute_every=2, coarse=2, attention_window=(1, 1, 1), checkpoint="none"
    )
    options = {"num_inference_steps": 4, "seed": 1, "progress_bar_cmd": list, "tiled": False, "cfg_scale": 1}
    options |= {"output_type": "latent", "test_latency": True, "latency_dir": tmp_path}
    first, second = (pipe("a cat", input_video=video, motion=guidance, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    line = json.loads((tmp_path / "latency.jsonl").read_text().splitlines()[0])
    assert line["gradient_evaluations"] == 2 * 4
    assert len(line["time_guidance"]) == 3
    # Block 1 of 2 is read: one block for the reference and each gradient, then two in each of four steps.
    assert line["dit_block_calls"] == 2 * (1 + 4) + 4 * 2
    assert "guided step 2: reused the gradients of an earlier step" in caplog.text


def test_levers_are_read_from_json():
    numbers = json.loads('{"attention_window": [1, 2, 3], "coarse": 2, "recompute_every": 2}')
    assert MotionGuidance.for_mode("AMF", numbers) == MotionGuidance(
        mode="AMF", attention_window=(1, 2, 3), coarse=2, recompute_every=2
    )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"coarse": 0}, "coarse must be a whole number of at least 1; got 0"),
        ({"recompute_every": 1.5}, "recompute_every must be a whole number of at least 1; got 1.5"),
        ({"recompute_below": math.nan}, "recompute_below must be .* at least -1, at most 1 or None; got nan"),
        (
            {"attention_window": (1, 2)},
            r"attention_window must be three values \(frames, rows, columns\).* got \(1, 2\)",
        ),
        (
            {"mode": "FlowMotion", "coarse": 2},
            "attention_window and coarse are for modes that read attention",
        ),
        ({"mode": "FlowMotion", "attention_window": (1, 1, 1)}, "mode 'FlowMotion' does not"),
    ],
)
def test_numbers_that_are_not_allowed_are_named(number, message):
    with pytest.raises(ValueError, match=message):
        MotionGuidance(**number)
