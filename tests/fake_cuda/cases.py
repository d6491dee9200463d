"""The cases of tests/test_fake_cuda.py: each runs the package on a device without data and tells what it saw.

Run in a process of its own, with guard.cpp preloaded; prints one JSON object, case -> what was counted.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partialmethod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from tracer import Trace, traced

from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.motion import MotionGuidance, guided_step
from diffsynth.pipelines.decode import decode_frames
from diffsynth.pipelines.sample import begin_denoising, sample
from diffsynth.planning.memory import (
    decode_bytes,
    encode_bytes,
    guided_pass_bytes,
    sampling_pass_bytes,
    text_encoder_bytes,
)
from diffsynth.planning.sizes import DiTSize, TextEncoderSize, VAESize, WeightBytes
from diffsynth.runs.cost import RunCost
from diffsynth.runs.state import PromptEmbeddings, RunInputs
from diffsynth.schedulers import run_scheduler
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.streaming import tensors_of

LATENTS = (21, 60, 104)  # 81 frames of 480x832
CLIP = (3, 60, 104)  # 9 frames, for the VAE, which works frame by frame
BF16 = torch.bfloat16


@contextmanager
def of_dtype(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Inside this context, weights are made in a dtype on a device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_dit(name: str, device: str = "cuda:0", num_layers: int | None = None) -> WanModel:
    sizes = PUBLISHED[name].dit_kwargs
    with of_dtype(BF16, device):
        dit = WanModel(**{**sizes, "num_layers": num_layers or sizes["num_layers"]})
    return dit.requires_grad_(False)


def step_inputs(device: str = "cuda:0") -> dict[str, Any]:
    with of_dtype(torch.float32, device):
        latents, reference, noise = (torch.randn(1, 16, *LATENTS) for _ in range(3))
        context, null = (torch.randn(1, 512, 4096, dtype=BF16) for _ in range(2))
    return {
        "latents": latents, "reference": reference, "noise": noise, "context": context, "null_context": null,
        "sigma": 0.9, "timestep": 900.0,
    }  # fmt: skip


def counted(trace: Trace, resting: int = 0, plan: int | None = None) -> dict[str, Any]:
    """What was seen since the last restart; bytes above those that rested before, besides the plan's."""
    return {
        "peak": trace.peak - resting,
        "plan": plan,
        "flops": trace.flops,
        "waits": dict(trace.waits),
        "doubles": dict(trace.doubles),
        "devices": sorted(trace.devices),
        "math_attention": trace.math_attention,
    }


def guided_peaks(name: str, *motions: MotionGuidance) -> dict[str, Any]:
    """First gradient of a guided step at the published size, one for each kind of guidance."""
    seen = {}
    with traced() as trace:
        dit = make_dit(name)
        size, weights = DiTSize.of(dit), trace.live
        inputs = step_inputs()
        for motion in motions:
            trace.restart()
            guided_step(dit, **inputs, guidance=motion)
            plan = guided_pass_bytes(size, LATENTS, motion, motion.checkpoint)
            label = f"guided {name} {motion.mode} {motion.checkpoint} coarse={motion.coarse}"
            seen[label] = counted(trace, weights, plan)
    return seen


def denoising(name: str, device: str, motion: MotionGuidance | None, **more: Any) -> dict[str, Any]:
    """Steps of the denoising loop of a model of four blocks; the first one also builds the tables."""
    options = RunOptions(
        height=480, width=832, num_frames=81, num_inference_steps=3, motion=motion, batch_cfg=False, **more
    )
    scheduler = run_scheduler(options)
    cost = RunCost(options.seed, options.mode, options.num_inference_steps)
    label = (
        f"{name} {device} {options.sampler} {options.mode}{' ' + options.cache.name if options.cache else ''}"
    )
    seen: dict[str, Any] = {}
    waits = patch.object(torch.cuda, "synchronize", lambda _=None: trace.wait("synchronize"))
    with traced() as trace, waits, torch.no_grad():
        dit = make_dit(name, device, num_layers=4)
        size, weights = DiTSize.of(dit), trace.live
        given = step_inputs(device)
        prompt = PromptEmbeddings(given["context"], given["null_context"], given["null_context"])
        inputs = RunInputs(prompts=[prompt], noise=given["noise"], reference=given["reference"], seconds={})
        phase = range(options.num_inference_steps)
        plan = sampling_pass_bytes(size, LATENTS, options, batch=1)
        _, steps, _ = begin_denoising(dit, scheduler, phase, 0, inputs, options, cost, lambda: False, None)
        trace.restart()
        for event in steps:
            seen[f"{event.stage} {event.step} of {label}"] = counted(
                trace, weights, plan if event.stage == "sampling" else None
            )
            trace.restart()
    return seen


def both_prompts(name: str) -> dict[str, Any]:
    with traced() as trace, torch.no_grad():
        dit = make_dit(name, num_layers=4)
        size, weights = DiTSize.of(dit), trace.live
        given = step_inputs()
        both = torch.cat([given["context"], given["null_context"]])
        trace.restart()
        dit(given["latents"].expand(2, -1, -1, -1, -1), torch.tensor([900.0]), both)
        options = RunOptions(height=480, width=832, num_frames=81)
        return {
            f"both prompts {name}": counted(trace, weights, sampling_pass_bytes(size, LATENTS, options, 2))
        }


def passes(name: str) -> dict[str, Any]:
    """What a forward pass moves besides its products, as written and with fused functions."""
    seen = {}
    for fuse in (False, True):
        with traced(fuse) as trace, torch.no_grad():
            dit, given = make_dit(name), step_inputs()
            trace.restart()
            dit(given["latents"], torch.tensor([900.0]), given["context"])
            seen[f"passes {name} fuse={fuse}"] = {**counted(trace), "moved": trace.moved}
    return seen


def vae_stages(dtype: torch.dtype, device: str) -> dict[str, Any]:
    seen = {}
    with traced() as trace, torch.no_grad():
        with of_dtype(dtype, device):
            vae = WanVideoVAE().requires_grad_(False)
            latents = torch.randn(1, 16, *CLIP, dtype=torch.float32)
        video, size = torch.randn(1, 3, 9, 480, 832), VAESize.of(vae)
        for tiled in (True, False):
            options = RunOptions(height=480, width=832, num_frames=9, tiled=tiled, output_type="np")
            tile = options.tile_size if tiled else None
            resting = trace.live
            trace.restart()
            vae.encode(video, **options.tiling)
            seen[f"encode {dtype} tiled={tiled}"] = counted(trace, resting, encode_bytes(size, CLIP, tile))
            resting = trace.live
            trace.restart()
            decode_frames(vae, latents, options)
            seen[f"decode {dtype} tiled={tiled}"] = counted(trace, resting, decode_bytes(size, CLIP, tile, 9))
    return seen


def text_encoder() -> dict[str, Any]:
    with traced() as trace, torch.no_grad():
        with of_dtype(BF16, "cuda:0"):
            encoder = WanTextEncoder().requires_grad_(False)
        resting = trace.live
        tokens = torch.ones(1, 512, dtype=torch.long, device="cuda:0")
        trace.restart()
        encoder(tokens, tokens)
        sizes = TextEncoderSize(num_heads=64, weights=WeightBytes(blocks=(0,), rest=0))
        return {"encode text": counted(trace, resting, text_encoder_bytes(sizes, 512))}


def streamed(name: str, resident: int, checkpoint: str) -> dict[str, Any]:
    """A guided step whose blocks come from CPU memory, and where the weights are afterwards."""
    motion = MotionGuidance(checkpoint=checkpoint, inner_steps=1)
    with traced() as trace:
        dit = make_dit(name, "cpu")
        size = DiTSize.of(dit)
        inputs = step_inputs()
        residency = Residency({"dit": dit}, torch.device("cuda:0"))
        staying = sum(t.numel() for block in dit.blocks[:resident] for t in tensors_of(block))
        residency.stream("dit", dit.blocks, staying)
        before = trace.live
        trace.restart()
        with residency.using("dit"):
            guided_step(dit, **inputs, guidance=motion)
        plan = guided_pass_bytes(size, LATENTS, motion, checkpoint) + size.weights.streamed(resident)
        label = f"streamed {name} resident={resident} {checkpoint}"
        left = trace.live - before
        homes = sorted({parameter.device.type for parameter in dit.parameters()})
        return {label: {**counted(trace, plan=plan), "left": left, "weights_on": homes}}


class WatchedResidency(Residency):
    """Notes which models were used."""

    def using(self, *names: str) -> AbstractContextManager[None]:
        self.used = [*getattr(self, "used", []), *names]
        return super().using(*names)


def relay(name: str) -> dict[str, Any]:
    """A step of each of two experts that rest in CPU memory, and one of the first alone."""
    size = {"height": 480, "width": 832, "num_frames": 81, "cfg_scale": 1}
    cost, device = RunCost(0, "No_transfer", 2), torch.device("cuda:0")
    seen: dict[str, Any] = {}
    # A device without data has no such numbers, which are those of PyTorch's allocator.
    numbers = {"reset_peak_memory": None, "peak_memory": 0, "memory_peaks": {}, "synchronize": None}
    unknown = {name: lambda _device, told=told: told for name, told in numbers.items()}
    experts = ["dit", "low_noise_dit"]
    # Timesteps without data say nothing of the boundary.
    turns = patch("diffsynth.pipelines.sample.expert_at", lambda _m, _t, i, _b: (experts[i], range(i, i + 1)))
    # The weights of all blocks come, and four run: each leaves the memory as it found it.
    four = patch.object(WanModel, "run_blocks", partialmethod(WanModel.run_blocks, stop=4))
    quiet = patch.multiple("diffsynth.runs.cost", **unknown)
    with traced() as trace, quiet, turns, four, torch.no_grad():
        dits = {one: make_dit(name, "cpu") for one in experts}
        weights = sum(tensor.nbytes for tensor in tensors_of(dits["dit"]))
        given = step_inputs()
        prompt = PromptEmbeddings(given["context"], None, None)
        inputs = RunInputs(prompts=[prompt], noise=given["noise"], reference=None, seconds={})
        before = trace.live
        for count in (1, 2):
            residency = WatchedResidency({one: dits[one] for one in experts[:count]}, device)
            residency.offload = True
            models = SimpleNamespace(**dits, residency=residency, device=device)
            options = RunOptions(**size, num_inference_steps=count)
            trace.restart()
            watching = {"on_step": lambda _event: None, "progress": iter, "stop": lambda: False}
            sample(models, 0, inputs, options, None, cost, **watching, saved=None)
            more = {"used": residency.used, "left": trace.live - before, "weights": weights}
            seen[f"relay of {count}"] = {**counted(trace), **more}
    return seen


def main() -> None:
    one = {"inner_steps": 1}
    peaks = [MotionGuidance(checkpoint=kept, **one) for kept in ("none", "attention", "block", "offload")]
    peaks.append(MotionGuidance(checkpoint="block", coarse=2, **one))
    guided = MotionGuidance(checkpoint="none", guided_steps=2, block=2, sf=2)
    flow = MotionGuidance(mode="FlowMotion", **one)
    cases = {
        "guided 1.3b": lambda: guided_peaks("1.3b", *peaks[:4], flow),
        "guided 14b": lambda: guided_peaks("14b", peaks[4]),
        "denoising": lambda: denoising("1.3b", "cuda:1", guided, sampler="euler"),
        "unipc": lambda: denoising(
            "1.3b", "cuda:0", None, sampler="unipc", cache=CacheOptions(name="first_block", threshold=0.1)
        ),
        "plain 14b": lambda: denoising("14b", "cuda:0", None, sampler="euler"),
        "both": lambda: both_prompts("1.3b"),
        "passes": lambda: passes("1.3b"),
        "passes 14b": lambda: passes("14b"),
        "vae": lambda: vae_stages(torch.float32, "cuda:1"),
        "text": text_encoder,
        "relay": lambda: relay("wan2.2-t2v-a14b"),
        "streamed": lambda: streamed("14b", 4, "block"),
    }
    chosen = sys.argv[1:] or list(cases)
    seen: dict[str, Any] = {}
    for name in chosen:
        seen |= cases[name]()
    with unset_fake_temporarily():
        sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
