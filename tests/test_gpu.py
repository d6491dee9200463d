"""What only a CUDA device can show; skipped without one."""

import importlib.util
import shutil

import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.models.attention import BACKENDS, attention
from diffsynth.models.local_attention import attend_in_tiles, local_attention, tile_plan
from diffsynth.models.packed_linear import PACKED_DTYPES, pack_block_linears
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, attention_motion_flow, guided_step, tile_motion_flow
from diffsynth.planning.memory import activation_bytes, guided_pass_bytes
from diffsynth.planning.sizes import DiTSize
from diffsynth.vram_management import Residency, peak_memory, reset_peak_memory

pytestmark = pytest.mark.gpu
needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or importlib.util.find_spec("triton") is None,
    reason="compiled kernels need gcc and triton",
)
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


def wide_dit(num_layers, dim=1536, ffn_dim=8960):
    sizes = {"dim": dim, "ffn_dim": ffn_dim, "freq_dim": 256, "num_heads": dim // 128, "text_dim": 64}
    torch.manual_seed(0)
    dit = WanModel(in_dim=16, out_dim=16, num_layers=num_layers, **sizes)
    return dit.to(torch.bfloat16).requires_grad_(False)


def one_guided_step(dit, policy, device="cuda", **motion):
    generator = torch.Generator().manual_seed(1)
    latents, reference, noise = torch.randn(3, 1, 16, 3, 60, 104, generator=generator).to(device)
    context = torch.randn(1, 16, 64, generator=generator).to(device)
    return guided_step(
        dit, latents, reference=reference, noise=noise, sigma=0.9, timestep=900.0, context=context,
        null_context=context, guidance=MotionGuidance(checkpoint=policy, inner_steps=1, **motion),
    )[0]  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "block", "offload"])
def test_streamed_blocks_give_the_bits_of_resident_ones_and_hold_two_blocks(policy):
    dit = wide_dit(16)
    whole = one_guided_step(dit.to("cuda"), policy).cpu()
    block_bytes = sum(p.nbytes for p in dit.blocks[0].parameters())
    dit.to("cpu")
    resting = torch.cuda.memory_allocated()  # work space of the matrix products, which stays
    residency = Residency({"dit": dit}, torch.device("cuda"))
    residency.stream("dit", dit.blocks)
    with residency.using("dit"):
        assert all(p.is_pinned() for p in dit.blocks[3].parameters())
        assert torch.cuda.memory_allocated() - resting < 3 * block_bytes
        moved = one_guided_step(dit, policy).cpu()
        with torch.no_grad():
            x = torch.randn(1, 16, 3, 60, 104, device="cuda")
            first, again = (dit(x, torch.tensor([500.0], device="cuda"), x.new_zeros(1, 4, 64)) for _ in "ab")
            assert torch.equal(first, again)
    # Gradients differ in last bits between runs on this device, as keys are added to by atomics, and where an
    # element's is near 0, AdamW's first step then goes the other way: by twice the learning rate.
    apart = (moved - whole).abs()
    assert (apart > 1e-3).float().mean() < 0.01
    assert apart.max() < 0.01


def test_streaming_costs_little_where_computing_covers_it():
    dit = wide_dit(8)
    x = torch.randn(1, 16, 11, 60, 104, device="cuda")
    call = (x, torch.tensor([500.0], device="cuda"), x.new_zeros(1, 4, 64))

    def milliseconds():
        """The shortest of five: other programs on the machine add to a measurement and take nothing away."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        times = []
        with torch.no_grad():
            dit(*call)
            for _ in range(5):
                start.record()
                dit(*call)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return min(times)

    residency = Residency({"dit": dit}, torch.device("cuda"))
    with residency.using("dit"):
        resident = milliseconds()
    residency.stream("dit", dit.blocks)
    with residency.using("dit"):
        assert milliseconds() < 1.5 * resident


@needs_compiler
def test_windowed_attention_is_the_same_in_blocks_and_in_tiles():
    grid, window = (5, 30, 52), (1, 6, 6)
    tokens = grid[0] * grid[1] * grid[2]
    # In half precision: the kernel of float32 takes more shared memory than a consumer card has.
    drawn = torch.randn(3, 1, tokens, 2, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in drawn]
    results = []
    for run in (
        lambda q, k, v: local_attention(q, k, v, grid=grid, window=window),
        lambda q, k, v: attend_in_tiles(q, k, v, tile_plan(grid, window, q.device)),
    ):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for blocks, tiles in zip(*results, strict=True):
        torch.testing.assert_close(blocks, tiles, atol=3e-2 * tiles.abs().max().item(), rtol=0)


@pytest.mark.parametrize("policy", ["none", "block", "offload"])
def test_the_plan_predicts_the_peak_of_a_guided_step(policy):
    dit = wide_dit(16).to("cuda")
    size = DiTSize.of(dit)
    motion = MotionGuidance(checkpoint=policy, inner_steps=1)
    predicted = guided_pass_bytes(size, (3, 60, 104), motion, policy)
    one_guided_step(dit, policy)
    device = torch.device("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    reset_peak_memory(device)
    one_guided_step(dit, policy)
    measured = peak_memory(device) - before
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("stored", PACKED_DTYPES)
def test_guidance_goes_through_packed_weights(stored):
    dit = wide_dit(4, dim=256, ffn_dim=512).to("cuda")
    exact = one_guided_step(dit, "none", block=2)
    pack_block_linears(dit, stored)
    packed = one_guided_step(dit, "none", block=2)
    assert 0 < (packed - exact).abs().mean() < 0.01


@needs_compiler
def test_a_compiled_pipeline_comes_near_the_plain_one(tiny_checkpoint, pipe):
    other = WanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32, device="cuda")
    other.enable_compile()
    compiled, plain = (p("a cat", **OPTIONS, output_type="latent") for p in (other, pipe))
    torch.testing.assert_close(compiled, plain, atol=1e-2, rtol=0)
