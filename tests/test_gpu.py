"""What only a CUDA device can show; skipped without one."""

import importlib.util

import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.models.attention import BACKENDS, attention
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, attention_motion_flow, guided_step, tile_motion_flow
from diffsynth.vram_management import activation_bytes, peak_memory, reset_peak_memory

pytestmark = pytest.mark.gpu
OPTIONS = {
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "num_inference_steps": 3,
    "seed": 1,
    "progress_bar_cmd": list,
}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32, device="cuda")


def test_flows_and_gradients_equal_those_of_the_cpu():
    q, k = torch.randn(2, 4, 9, 13, 16)
    windows = tile_motion_flow(q, k, sf=3, window=5).windows
    results = []
    for device in ("cpu", "cuda"):
        a, b = (x.to(device).requires_grad_() for x in (q, k))
        tiled = tile_motion_flow(a, b, sf=3, window=5, windows=windows.to(device))
        dense = attention_motion_flow(a, b, sf=3)
        loss = tiled.flow.square().sum() + dense.square().sum() + tiled.window_loss
        results.append([x.cpu() for x in (tiled.flow, dense, *torch.autograd.grad(loss, [a, b]))])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, atol=1e-4 * cpu.abs().max().item(), rtol=0)


def test_the_pipeline_starts_from_the_cpu_noise_and_comes_near_the_cpu_result(tiny_checkpoint, pipe):
    cpu = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    near, exact = (p("a cat", **OPTIONS, output_type="latent").cpu() for p in (pipe, cpu))
    torch.testing.assert_close(near, exact, atol=1e-2, rtol=0)


def test_offload_changes_no_bit_and_leaves_the_device_empty(tiny_checkpoint, pipe):
    expected = pipe("a cat", **OPTIONS, output_type="latent")
    other = WanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32, device="cuda")
    other.enable_vram_management(num_persistent_param_in_dit=None)
    assert torch.equal(other("a cat", **OPTIONS, output_type="latent"), expected)
    assert {p.device.type for model in other.residency.models.values() for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_2", "sage"])
def test_attention_backends_agree_with_sdpa(name):
    if importlib.util.find_spec(BACKENDS[name].module) is None:
        pytest.skip(f"{BACKENDS[name].module} is not installed")
    q, k, v = torch.randn(3, 2, 512, 4, 128, device="cuda", dtype=torch.bfloat16)
    out, reference = attention(q, k, v, backend=name), attention(q, k, v, backend="sdpa")
    torch.testing.assert_close(out, reference, atol=3e-2, rtol=0)


@pytest.mark.parametrize("policy", ["none", "block"])
def test_a_guided_step_of_published_width_keeps_what_is_predicted(policy):
    sizes = {"dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "num_heads": 12, "num_layers": 16, "text_dim": 64}
    dit = WanModel(in_dim=16, out_dim=16, **sizes).to("cuda", torch.bfloat16).requires_grad_(False)
    latents, reference, noise = torch.randn(3, 1, 16, 3, 60, 104, device="cuda")
    context = torch.randn(1, 16, 64, device="cuda")
    reset_peak_memory(latents.device)
    before = peak_memory(latents.device)
    step = {"sigma": 0.9, "timestep": 900.0, "context": context, "null_context": context}
    guidance = MotionGuidance(checkpoint=policy, inner_steps=1)
    moved, _ = guided_step(dit, latents, reference=reference, noise=noise, guidance=guidance, **step)
    assert moved.isfinite().all()
    kept = activation_bytes(dit, 3 * 30 * 52, 14 if policy == "none" else 2)
    assert peak_memory(latents.device) - before < 1.5 * kept + 2**30
