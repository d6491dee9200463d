"""The released code, to the letter: flows, losses and gradients, and whole guided steps."""

import pytest
import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, guided_step, make_descriptor
from diffsynth.motion.descriptors import StepInputs
from diffsynth.motion.guided_step import frozen
from diffsynth.motion.losses import amf_loss, pair_weights
from diffsynth.motion.released import released_tile_flow

FLOWS = [("amf_tile", case) for case in ("small", "hot", "tile22", "sf1")]
FLOWS += [("amf_tile_full", case) for case in ("full_sf2", "full_sf3")]


@pytest.mark.parametrize(("name", "case"), FLOWS)
def test_flow_loss_and_gradients_equal_the_released_ones(golden, name, case):
    g, info = golden(name)
    c = info["cases"][case]
    q, k = (g[f"{case}.{part}"].clone().requires_grad_() for part in ("q", "k"))
    found = released_tile_flow(q, k, sf=c["sf"], window=c["l"], tile=tuple(c["tile"]), tau=c["tau"])
    assert [list(pair) for pair in found.pairs] == c["pairs_in_order"]
    torch.testing.assert_close(found.flow, g[f"{case}.amf"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.window_loss, g[f"{case}.track_loss"], atol=1e-7, rtol=1e-5)
    weights = pair_weights(found.pairs, c["sf"], (1.0, 0.8), 1.0)
    torch.testing.assert_close(torch.tensor(weights), g[f"{case}.weights"], atol=1e-6, rtol=0)
    amf = amf_loss(found.flow, g[f"{case}.amf_ref"], weights, None)
    torch.testing.assert_close(amf, g[f"{case}.amf_loss"], atol=0, rtol=1e-5)
    loss = 5 * amf + found.window_loss
    torch.testing.assert_close(loss, g[f"{case}.loss"], atol=0, rtol=1e-5)
    for part, gradient in zip(("q", "k"), torch.autograd.grad(loss, [q, k]), strict=True):
        wanted = g[f"{case}.grad_{part}"]
        torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def dit(golden):
    weights, info = golden("guidance_dit")
    c = info["config"]
    sizes = {
        "dim": c["dim"],
        "ffn_dim": c["ffn"],
        "freq_dim": c["freq"],
        "text_dim": c["text"],
        "text_len": 8,
    }
    channels = {"in_dim": c["ch"], "out_dim": c["ch"]}
    model = WanModel(num_heads=c["heads"], num_layers=c["layers"], **sizes, **channels)
    model.load_state_dict({key.removeprefix("sd."): value for key, value in weights.items()})
    return model


VARIANTS = {"released": "token_groups", "corrected": "mean_qk"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["guidance_small", pytest.param("guidance_l21", marks=pytest.mark.slow)])
def test_a_guided_step_equals_the_released_one(golden, dit, name, variant):
    g, info = golden(name)
    c, wanted = info["config"], info["results"][variant]
    guidance = MotionGuidance.released(
        block=c["block"], window=c["window"], sf=c["sf"], heads=VARIANTS[variant]
    )
    latents, record = guided_step(
        dit,
        g["latents_in"],
        reference=g["clean_latents"],
        noise=g["reference_noise"],
        sigma=g["sigma"],
        timestep=g["timestep"],
        context=g["context_positive"],
        null_context=g["context_null"],
        guidance=guidance,
    )
    assert list(record.evaluated_at) == wanted["inner_steps_that_ran_the_dit"]
    assert record.lrs == pytest.approx(wanted["lr"])
    assert record.losses == pytest.approx(wanted["loss_at_recomputed_steps (5*amf+track)"], rel=1e-5)
    assert [part["amf"] for part in record.parts] == pytest.approx(wanted["amf_loss"], rel=1e-5)
    assert [part["window"] for part in record.parts] == pytest.approx(wanted["track_loss"], rel=1e-5)
    # Elements with a gradient near zero may take the other sign.
    off = (latents - g[f"{variant}.latents_out"]).abs() > 1e-5
    assert off.float().mean() <= 3e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_flow_and_gradients_equal_the_released_ones(golden, dit, variant):
    g, info = golden("guidance_small")
    c = info["config"]
    guidance = MotionGuidance.released(
        block=c["block"], window=c["window"], sf=c["sf"], heads=VARIANTS[variant]
    )
    descriptor = make_descriptor(guidance)
    null = g["context_null"]
    inputs = StepInputs(dit=dit, timestep=g["timestep"], sigma=g["sigma"].item(), null_context=null)
    noised = (1 - g["sigma"]) * g["clean_latents"] + g["sigma"] * g["reference_noise"]
    with frozen(dit):
        target = descriptor.describe(descriptor.observe(noised, null, inputs))
        torch.testing.assert_close(target.flow, g[f"{variant}.amf_ref"], atol=1e-4, rtol=0)
        starts = [g["latents_in"], *g[f"{variant}.latents_after_inner_step"][[2, 5, 8]]]
        for start, wanted in zip(starts, g[f"{variant}.recomputed.grad"], strict=True):
            x = start.clone().requires_grad_()
            seen = descriptor.describe(descriptor.observe(x, g["context_positive"], inputs), target)
            (gradient,) = torch.autograd.grad(descriptor.loss(seen, target).total, x)
            torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("grid", [(10, 12), (9, 13), (9, 4)])
def test_grids_on_which_the_released_code_breaks_are_refused(grid):
    x = torch.randn(3, *grid, 4)
    with pytest.raises(ValueError, match="needs a token grid divisible by the tile"):
        released_tile_flow(x, x, sf=3, window=11, tile=(3, 4), tau=1.0)
