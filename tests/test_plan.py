"""Plans: what a run costs by count, which settings fit into a budget, and what is said where none do."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.configs.caches import CacheOptions, choose_cache
from diffsynth.configs.defaults import published_defaults
from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.motion import MotionGuidance
from diffsynth.planning import ladder
from diffsynth.planning.cost import (
    computed_steps,
    forward_flops,
    guidance_cost,
    guided_flops,
    guided_share,
    run_cost,
    vae_flops,
)
from diffsynth.planning.plan import GAPS, GB, RESERVED, NotEnoughMemoryError, plan_run, resolve_plan
from diffsynth.planning.sizes import DiTSize, VAESize, published_sizes

FULL = (21, 60, 104)
TEMPORAL = (True, False)
MOTION = MotionGuidance()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def plan_of(model, vram_gb=None, dtype=torch.bfloat16, **options):
    """The plan of a published checkpoint; what is not given is free to choose."""
    run = RunOptions(**{"tiled": None, **options})
    sizes = published_sizes(model, dtype)
    return plan_run(sizes, run, vram_gb=vram_gb, with_reference=run.motion is not None)


def cost_of(dit, **options):
    return run_cost(dit, FULL, RunOptions(**options))


@pytest.fixture(scope="module")
def count_flops():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("measure").count_flops


@pytest.fixture(scope="module")
def dit():
    return WanModel(
        dim=64, ffn_dim=192, num_heads=4, num_layers=3,
        in_dim=16, out_dim=8, text_dim=32, freq_dim=16, text_len=24,
    ).requires_grad_(False)  # fmt: skip


def test_a_forward_has_the_operations_that_are_counted(dit, count_flops):
    x, context = torch.randn(1, 16, 3, 12, 16), torch.randn(1, 24, 32)
    counted = count_flops(lambda: dit(x, torch.ones(1), context))
    assert forward_flops(DiTSize.of(dit), (3, 12, 16)) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("coarse", [1, 2])
def test_a_guided_pass_and_its_backward_have_the_operations_that_are_counted(dit, count_flops, coarse):
    x = torch.randn(1, 16, 3, 12 // coarse, 16 // coarse, requires_grad=True)
    features = []
    forward = count_flops(
        lambda: features.extend(dit.features(x, torch.ones(1), torch.randn(1, 24, 32), block=2))
    )
    backward = count_flops(lambda: torch.autograd.grad(features[0].sum() + features[1].sum(), x))
    motion = MotionGuidance(block=2, coarse=coarse)
    expected = guided_flops(DiTSize.of(dit), (3, 12, 16), motion)
    assert expected == pytest.approx((forward, backward), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "small", "large"),
    [
        ({}, 60.7, 45.5),
        ({"attention_window": (2, 6, 6)}, 22.9, 24.3),
        ({"coarse": 2}, 7.2, 6.9),
        ({"coarse": 2, "attention_window": (2, 4, 4)}, 5.3, 5.9),
        ({"attention_window": (20, 29, 51)}, 60.7, 45.5),
        ({"recompute_every": 2}, 30.3, 22.75),
        ({"recompute_every": 3}, 24.3, 18.2),
        ({"recompute_every": 5}, 12.1, 9.1),
        ({"coarse": 2, "recompute_every": 3}, 2.9, 2.8),
        ({"checkpoint": "attention"}, 66.3, 52.2),
        ({"checkpoint": "block"}, 79.3, 59.5),
        ({"checkpoint": "offload"}, 79.3, 59.5),
        ({"recompute_every": 3, "recompute_below": 0.5}, 60.7, 45.5),
        ({"reuse_above": 0.5}, 144.7, 108.5),
    ],
)
def test_guidance_at_the_published_size_costs_so_many_forwards(changes, small, large):
    motion = MotionGuidance(**changes)
    for name, expected in (("1.3b", small), ("14b", large)):
        counted = cost_of(published_sizes(name).dit, motion=motion)
        assert counted.guidance_ffe == pytest.approx(expected, rel=0.01)
        assert counted.sampling_ffe == 100
        assert counted.total_ffe == counted.guidance_ffe + 100


def test_flow_motion_costs_seven_full_forwards_a_guided_step():
    dit = published_sizes("1.3b").dit
    motion = MotionGuidance.for_mode("FlowMotion")
    counted = cost_of(dit, motion=motion)
    assert counted.guidance_ffe == 70
    assert counted.flops == 170 * forward_flops(dit, FULL)
    assert guided_share(dit, FULL, motion) == 1
    assert guidance_cost(MotionGuidance.for_mode("FlowMotion", {"prediction_cfg": 1.0}), 30, 50) == 40


def test_sampling_counts_the_prompts_that_run():
    dit = published_sizes("1.3b").dit
    one = forward_flops(dit, FULL)
    alone = cost_of(dit, cfg_scale=1)
    assert (alone.sampling_ffe, alone.guidance_ffe, alone.flops) == (50, 0, 50 * one)
    assert cost_of(dit, cfg_interval=(0.1, 0.5)).sampling_ffe == 70
    assert cost_of(dit, num_inference_steps=25).sampling_ffe == 50


def test_magcache_is_counted_by_its_ratios_and_other_caches_as_if_they_skipped_nothing():
    dit = published_sizes("1.3b").dit
    mag = choose_cache("magcache", None, dit.dim)
    counted = cost_of(dit, cache=mag)
    assert counted.sampling_ffe == 42
    assert counted.flops == pytest.approx(42 * forward_flops(dit, FULL), rel=0.002)
    assert computed_steps(mag, "negative", range(10, 30), 50) < 20
    assert computed_steps(mag, "negative", range(0), 50) == 0
    first = CacheOptions(name="first_block", threshold=0.1)
    assert cost_of(dit, cache=first).sampling_ffe == 100


@pytest.mark.parametrize(
    ("model", "gigabytes", "expected"),
    [
        ("1.3b", None, ("none", False, None, False, False)),
        ("1.3b", 80, ("none", False, None, False, False)),
        ("1.3b", 40, ("none", True, None, False, False)),
        ("1.3b", 24, ("attention", False, None, False, False)),
        ("1.3b", 12, ("attention", True, None, False, True)),
        ("1.3b", 8, ("block", True, 6, False, True)),
        ("1.3b", 5.8, ("offload", True, 10, True, True)),
        ("14b", 80, ("attention", False, None, False, False)),
        ("14b", 24, ("block", True, 4, False, False)),
        ("14b", 16, ("offload", True, 5, False, False)),
    ],
)
def test_the_fastest_settings_that_fit_are_taken(model, gigabytes, expected):
    plan = plan_of(model, motion=MOTION, vram_gb=gigabytes)
    checkpoint, offload, resident, tiled, streamed_text = expected
    block = published_sizes(model).dit.block_parameters
    assert plan.chosen() == {
        "checkpoint": checkpoint,
        "batch_cfg": True,
        "tiled": tiled,
        "offload": offload,
        "num_persistent_param_in_dit": None if resident is None else resident * block,
        "stream_text_encoder": streamed_text,
    }
    if gigabytes is not None:
        assert (1 + GAPS) * plan.peak + RESERVED <= gigabytes * GB


def test_more_memory_never_makes_a_run_dearer_and_every_plan_fits():
    costs = []
    for gigabytes in (4.7, 5, 6, 7, 9, 11, 14, 18, 30, 36, 48):
        plan = plan_of("1.3b", motion=MOTION, vram_gb=gigabytes)
        assert plan.peak * (1 if plan.tight else 1 + GAPS) + RESERVED <= gigabytes * GB
        assert plan.tight == (gigabytes < 4.8)
        costs.append(plan.cost.total_ffe)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_published_models_meet_the_memory_they_are_to_fit_into():
    small = plan_of("1.3b", motion=MOTION, vram_gb=5.8)
    denoising = [stage.total for stage in small.stages if stage.stage in ("guidance", "sampling")]
    assert max(denoising) < 5.8e9
    for model, budget, dtype in (
        ("1.3b", 8e9, torch.bfloat16),
        ("14b", 24e9, torch.bfloat16),
        ("14b", 12e9, torch.float8_e4m3fn),
    ):
        plan = plan_of(model, motion=MOTION, vram_gb=budget / GB, dtype=dtype)
        assert plan.peak * (1 if plan.tight else 1 + GAPS) + RESERVED <= budget


def test_what_is_given_is_obeyed():
    motion = MotionGuidance(checkpoint="none")
    plan = plan_of("1.3b", motion=motion, vram_gb=48, batch_cfg=False, tiled=True)
    assert (plan.settings.checkpoint, plan.settings.batch_cfg, plan.settings.tiled) == ("none", False, True)
    assert plan_of("1.3b", cfg_scale=1.0).settings.batch_cfg is False
    plain = plan_run(published_sizes("14b"), RunOptions(num_frames=1), with_reference=True)
    assert [stage.stage for stage in plain.stages] == ["encode text", "encode video", "sampling", "decode"]
    assert (plain.options.mode, plain.cost.guidance_ffe) == ("No_transfer", 0)


def test_a_plan_reads_as_a_table_and_as_json():
    plan = plan_of("14b", motion=MOTION, vram_gb=24)
    lines = str(plan).splitlines()
    assert lines[0] == "Wan2.1-T2V-14B, 480x832x81, 50 steps, effi_AMF"
    assert [line.split("  ")[0] for line in lines[2:7]] == [stage.stage for stage in plan.stages]
    assert [line.endswith("<- peak") for line in lines[2:7]] == [False, False, True, False, False]
    assert lines[-2] == (
        "settings: guidance keeps each block's input; prompts in one call; VAE whole; models each on the "
        "device in its own stages, the DiT's blocks but 4 streamed"
    )
    assert (
        lines[-1] == "cost: 100 FFE of sampling + 59.5 of guidance = 159.5; 263.4 PFLOP and 0.439 of the VAE"
    )
    read = json.loads(plan.to_json())
    assert read["peak"] == plan.peak == max(s["weights"] + s["activations"] for s in read["stages"])
    assert read["cost"]["total_ffe"] == pytest.approx(159.5)
    assert read["num_persistent_param_in_dit"] == plan.num_persistent_param_in_dit
    assert "no budget" in str(plan_of("1.3b"))


def test_where_nothing_fits_it_is_said_what_is_needed_and_what_helps():
    with pytest.raises(
        NotEnoughMemoryError, match=r"at least 4\.6 GB \(stage 'guidance'\), and vram_gb is 3\.0"
    ) as error:
        plan_of("1.3b", motion=MOTION, vram_gb=3)
    assert error.match(r"half the frames \(3\.\d GB\), half of height and width .*, coarse=2 \(3\.\d GB\)")
    plan_of("1.3b", motion=MOTION, vram_gb=error.value.needed / GB + 0.01)
    forced = {"motion": MotionGuidance(checkpoint="none"), "tiled": False, "vram_gb": 6}
    with pytest.raises(NotEnoughMemoryError, match=r"checkpoint='auto' \(7\.0 GB\)"):
        plan_of("1.3b", **forced)
    with pytest.raises(NotEnoughMemoryError, match=r"stage 'decode'.*tiled=True"):
        plan_of("1.3b", tiled=False, vram_gb=6)
    with pytest.raises(NotEnoughMemoryError, match=r"stage 'sampling'.*batch_cfg=False"):
        plan_of("14b", batch_cfg=True, vram_gb=8)


def test_arguments_that_cannot_be_are_refused():
    for given in (0, -1, float("nan"), "8"):
        with pytest.raises(ValueError, match="vram_gb must be a finite number above 0"):
            plan_of("1.3b", vram_gb=given)


def test_a_loaded_pipeline_is_planned_by_its_own_sizes_and_computes_what_is_counted(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    motion = MotionGuidance(
        guided_steps=2, inner_steps=3, interval=2, recompute_every=2, block=1, checkpoint="block", sf=2
    )
    size = {"height": 32, "width": 32, "num_frames": 5}
    plan = pipe.plan(**size, num_inference_steps=3, motion=motion, tiled=False)
    own = {
        name: sum(t.nbytes for t in model.state_dict().values())
        for name, model in pipe.residency.models.items()
    }
    weights = {stage.stage: stage.weights for stage in plan.stages}
    assert weights["encode text"] == own["text_encoder"]
    assert weights["sampling"] == sum(own.values())
    video = torch.rand(5, 32, 32, 3).mul(255).byte().numpy()
    pipe(
        "a cat", input_video=video, **size, num_inference_steps=3, motion=motion, tiled=False, seed=0,
        progress_bar_cmd=list,
    )  # fmt: skip
    layers, share = pipe.dit.num_layers, guided_share(DiTSize.of(pipe.dit), (2, 4, 4), motion)
    # Of the four forwards that a gradient counts as, the others run inside its backward.
    gradients = 2
    expected = plan.cost.total_ffe * layers - 3 * gradients * share
    assert pipe.costs[0].dit_block_calls == pytest.approx(expected)
    assert pipe.costs[0].gradient_evaluations == gradients


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"dim": 16, "z_dim": 4, "dim_mult": (1, 2, 3), "temperal_downsample": (True, False)}]
)
def test_the_operations_of_the_vae_are_those_of_the_real_one(count_flops, tiled, sizes):
    with torch.device("meta"):
        vae = WanVideoVAE(**sizes)
    options = RunOptions(num_frames=5, tile_size=(30, 40), tile_stride=(15, 26))
    side = vae.spatial_factor
    noise = torch.empty(1, vae.z_dim, 4 // vae.temporal_factor + 1, 480 // side, 832 // side, device="meta")
    latents = tuple(noise.shape[2:])
    tiling = {**options.tiling, "tiled": tiled}
    with torch.no_grad():
        decoded = count_flops(lambda: vae.decode(noise, **tiling))
        video = torch.empty(1, 3, 5, 480, 832, device="meta")
        encoded = count_flops(lambda: vae.encode(video, **tiling))
    size = VAESize.of(vae)
    assert vae_flops(size, latents, options, tiled, False) == pytest.approx(decoded, rel=1e-3)
    assert vae_flops(size, latents, options, tiled, True) == pytest.approx(decoded + encoded, rel=1e-3)


def test_the_vae_at_full_size_costs_less_than_half_untiled():
    size, options = published_sizes("1.3b").vae, RunOptions()
    whole, tiled = (vae_flops(size, FULL, options, tiled, True) / 1e12 for tiled in (False, True))
    assert (round(whole), round(tiled)) == (439, 984)
    plan = plan_of("1.3b", motion=MOTION, vram_gb=24)
    assert plan.cost.vae_flops == pytest.approx(439e12, rel=0.01)


def test_minutes_are_those_of_the_published_anchors():
    """Wan2.1's README: 1.3B, 5 s of 480P, in about 4 minutes on an RTX 4090; FastVideo: 95 s on an H200."""
    minutes = plan_of("1.3b", vram_gb=80).minutes()
    assert minutes["RTX 4090"] == pytest.approx(4.3, rel=0.1)
    assert 1.0 < minutes["H100"] < 1.6
    assert list(minutes)[:4] == ["H100", "A100", "RTX 4090", "RTX 3090"]
    assert minutes["RTX 4090"] < minutes["RTX 4070"] < minutes["RTX 4060 Ti"] < minutes["RTX 3060"]


@pytest.mark.parametrize(("gigabytes", "expected"), [(80, False), (40, False), (24, True), (8, True)])
def test_by_default_the_vae_is_whole_where_it_fits_beside_the_models(monkeypatch, gigabytes, expected):
    """The 1.3B checkpoint's weights are 14.1 GB, and the VAE untiled takes 5.8 more."""
    monkeypatch.setattr(ladder, "device_memory", lambda _: gigabytes * GB)
    empty = ladder.Ladder(None, SimpleNamespace(device=torch.device("cuda")))
    assert empty._in_tiles(published_sizes("1.3b"), RunOptions()) == expected


@pytest.mark.parametrize(
    ("model", "tensors", "ffe"),
    [("wan2.2-ti2v-5b", 20.9, 169.4), ("wan2.2-t2v-a14b", 21.5, 139.5), ("wan2.1-i2v-14b-480p", 21.4, 139.5)],
)
def test_the_family_fits_one_card_of_24_gb(model, tensors, ffe):
    sizes, defaults = published_sizes(model), published_defaults(model)
    plan = plan_run(sizes, resolve_plan({}, defaults, sizes.facts()), vram_gb=24, with_reference=True)
    assert plan.peak / GB == pytest.approx(tensors, abs=0.1)
    assert plan.cost.total_ffe == pytest.approx(ffe, abs=0.1)
    stages = {stage.stage: stage for stage in plan.stages}
    assert ("encode picture" in stages) == ("i2v" in model.split("-"))
    if "encode picture" in stages:
        # The visual tower up to its last block but one, in bfloat16.
        assert stages["encode picture"].weights == pytest.approx(2 * 0.612e9, rel=0.01)
        assert sizes.dit.context_len == 512 + 257


def test_a_forward_of_the_small_model_of_wan22_is_the_cheaper_one():
    """97 TFLOP for TI2V-5B against 283 for the 1.3B at 480x832x81."""
    small, old = published_sizes("wan2.2-ti2v-5b"), published_sizes("1.3b")
    flops = [forward_flops(s.dit, s.latent_shape(480, 832, 81)) / 1e12 for s in (small, old)]
    assert flops == pytest.approx([97, 283], rel=0.015)
