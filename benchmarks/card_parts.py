"""The parts of first_card.py: each measures one thing on a device and writes down every figure at once."""

import json
import logging
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import SIZES, Work, contenders
from first_card import append
from measure import count_flops, peak_increase
from torch import Tensor, nn
from torch.nn import functional as F

from diffsynth import WanVideoPipeline
from diffsynth.configs.options import RunOptions
from diffsynth.models.attention import BACKENDS, attention
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.motion import MotionGuidance, guided_step
from diffsynth.planning import ladder
from diffsynth.planning.memory import predict_stages
from diffsynth.planning.plan import GB, NotEnoughMemoryError, plan_run
from diffsynth.planning.sizes import ModelSizes, published_sizes
from diffsynth.runs.record import describe_device
from diffsynth.vram_management import Residency, choose_device, device_memory, residency, synchronize

CAPS = (5.8, 8.0, 12.0, 24.0)  # GB, of cards with 6 to 24
# What a driver, PyTorch and its kernels raise; a part continues with its next figure.
FAULTS = (RuntimeError, ImportError, NotImplementedError, ValueError)
Emit = Callable[..., None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The device, the size of the work, and where figures go.

    Attributes:
        latents: (F, h, w), of 81 frames of 480x832 or a toy's.
        sizes: of models, by name, as `contenders` names them.
    """

    device: torch.device
    tiny: bool
    emit: Emit

    @property
    def latents(self) -> tuple[int, int, int]:
        return (3, 8, 12) if self.tiny else (21, 60, 104)

    @property
    def sizes(self) -> tuple[str, ...]:
        return ("small",) if self.tiny else ("1.3b", "14b")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def capped(self) -> bool:
        """Whether PyTorch can be told to use no more than a part of the device's memory."""
        return self.device.type == "cuda"

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """The median, after a call that warms up."""
        call()
        taken = []
        for _ in range(1 if self.tiny else repeats):
            synchronize(self.device)
            started = time.perf_counter()
            call()
            synchronize(self.device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)


def run(part: str, device: str, tiny: bool, out: Path) -> None:
    """Run a part; its first row says where."""
    torch.manual_seed(0)
    chosen = choose_device(device)
    append(out, {"part": part, "where": json.dumps(describe_device(chosen)), "torch": torch.__version__})
    bench = Bench(device=chosen, tiny=tiny, emit=lambda **row: append(out, {"part": part, **row}))
    PARTS[part](bench)


def self_test(bench: Bench) -> None:
    """The embedded model stage by stage against stored numbers, by `fastvmt doctor`."""
    command = [sys.executable, "-m", "diffsynth.cli.main", "doctor", "--device", str(bench.device), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(told.stdout) if told.stdout.lstrip().startswith("{") else {}
    for problem in found.get("problems", []):
        bench.emit(problem=problem)
    for heading in ("device", "attention_kernels"):
        for name, value in found.get(heading, {}).items():
            bench.emit(fact=name, value=value)
    for result in found.get("self_test", []):
        bench.emit(**result)
    if "self_test" not in found:
        raise RuntimeError(told.stdout[-500:] + told.stderr[-1500:])


def gpu_tests(bench: Bench) -> None:
    """tests/test_gpu.py, test by test."""
    tests = Path(__file__).parent.parent / "tests" / "test_gpu.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--no-header",
        "-p",
        "no:cacheprovider",
        str(tests),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for outcome, what in re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) (.*)$", told, flags=re.MULTILINE):
        bench.emit(outcome=outcome, test=what.replace(str(tests.parent.parent) + "/", "")[:300])


def attention_inputs(bench: Bench) -> list[Tensor]:
    tokens = bench.latents[0] * bench.latents[1] * bench.latents[2] // 4
    heads, width = (2, 64) if bench.tiny else (12, 128)
    shape = (3, 1, tokens, heads, width)
    return [x.requires_grad_() for x in torch.randn(shape, device=bench.device, dtype=bench.dtype)]


def one_kernel(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """One of our backends, or one of PyTorch's kernels by its own name."""
    if name in BACKENDS:
        return attention(q, k, v, backend=name)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_kernels(bench: Bench) -> None:
    """Every attention kernel at the size of the 1.3B model, forward alone and with backward."""
    q, k, v = attention_inputs(bench)
    flops = 4 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]
    with torch.no_grad():
        reference = attention(q, k, v, backend="sdpa").float()
    for name in (*BACKENDS, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):

        def both(name: str = name) -> None:
            torch.autograd.grad(one_kernel(q, k, v, name).float().sum(), (q, k, v))

        try:
            with torch.no_grad():
                error = (one_kernel(q, k, v, name).float() - reference).abs().max().item()
                forward = bench.seconds(partial(one_kernel, q, k, v, name))
            rate = flops / forward / 1e12
            bench.emit(kernel=name, forward_ms=forward * 1e3, TFLOPs=rate, largest_difference=error)
            if name not in BACKENDS or BACKENDS[name].differentiable:
                taken = bench.seconds(both)
                bench.emit(kernel=name, with_backward_ms=taken * 1e3, TFLOPs=3.5 * flops / taken / 1e12)
        except FAULTS as error:
            bench.emit(kernel=name, refused=str(error).strip().splitlines()[0][:200])


def dit_forward(bench: Bench) -> None:
    """A forward of the DiT, ours and diffusers', with the same weights, and the rate of matrix products."""
    from run import matmul_rate

    rate = matmul_rate(bench.device, bench.dtype) if not bench.tiny else 0.0
    bench.emit(matrix_products_TFLOPs=rate / 1e12)
    for size in bench.sizes:
        work = Work(size, bench.latents, bench.device)
        flops = count_flops(work.forward)
        for name, call in (("ours", work.forward), ("diffusers", work.diffusers_forward)):
            try:
                taken = bench.seconds(call)
                peak = peak_increase(call, bench.device) / GB
                bench.emit(model=size, code=name, seconds=taken, TFLOPs=flops / taken / 1e12, peak_GB=peak)
            except FAULTS as error:  # noqa: PERF203
                bench.emit(model=size, code=name, failed=str(error).strip().splitlines()[0][:200])
        del work


def random_models(bench: Bench, size: str) -> dict[str, Any]:
    """DiT and VAE with random weights, made on the device, which is faster, and left on the CPU."""
    with torch.device(bench.device):
        dit = WanModel(**SIZES[size]).to(bench.dtype)
        vae = WanVideoVAE(dim=8) if bench.tiny else WanVideoVAE()
    return {"dit": dit.cpu().requires_grad_(False), "vae": vae.cpu().requires_grad_(False)}


def peaks(bench: Bench) -> None:
    """Measure the stages under the memory limit of a smaller card, beside what its plan predicts."""
    frames, rows, cols = bench.latents
    options = RunOptions(
        height=rows * 8, width=cols * 8, num_frames=4 * (frames - 1) + 1, tiled=None,
        batch_cfg=None, motion=MotionGuidance(inner_steps=1),
    )  # fmt: skip
    for size in bench.sizes:
        models = random_models(bench, size)
        text = published_sizes("1.3b").text_encoder
        sizes = replace(ModelSizes.of({**models, "text_encoder": tiny_text_encoder()}), text_encoder=text)
        for cap in CAPS[-1:] if bench.tiny else CAPS:
            try:
                plan = plan_run(sizes, options, vram_gb=cap, with_reference=True)
            except NotEnoughMemoryError as error:
                bench.emit(model=size, cap_GB=cap, refused=str(error)[:200])
                continue
            if bench.capped:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GB / device_memory(bench.device)))
            where = Residency(models, bench.device)
            plan.settings.place(where)
            chosen = ladder.with_settings(options, ladder._changes(plan.settings, options))
            predicted = {stage.stage: stage for stage in predict_stages(sizes, options, plan.settings, True)}
            for stage, names, call in stages(bench, models, chosen):
                if bench.capped:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    with where.using(*names):
                        call()
                        synchronize(bench.device)
                        allocated, reserved, used = memory_now(bench)
                except FAULTS as error:
                    bench.emit(model=size, cap_GB=cap, stage=stage, failed=str(error).splitlines()[0][:200])
                    continue
                bench.emit(
                    model=size, cap_GB=cap, stage=stage, planned_GB=predicted[stage].total / GB,
                    allocated_GB=allocated / GB, reserved_GB=reserved / GB, device_GB=used / GB,
                )  # fmt: skip
            where.rest()
            where.stop_streaming()
            where.offload = False


def memory_now(bench: Bench) -> tuple[int, int, int]:
    """Most bytes allocated and reserved since the reset, and bytes of the device that are in use."""
    if not bench.capped:
        return 0, 0, 0
    free, total = torch.cuda.mem_get_info(bench.device)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free


def stages(
    bench: Bench, models: dict[str, Any], options: RunOptions
) -> list[tuple[str, tuple[str, ...], Callable[[], object]]]:
    """The stages of a run that need memory: name, models, call."""
    dit, vae = models["dit"], models["vae"]
    shape = (1, dit.in_dim, *bench.latents)
    with torch.device(bench.device):
        latents, reference, noise = (torch.randn(shape) for _ in range(3))
        context = torch.randn(2, dit.text_len, dit.text_dim, dtype=bench.dtype)
    pixels = torch.randn(1, 3, options.num_frames, options.height, options.width).clamp_(-1, 1)

    def guide() -> None:
        guided_step(
            dit, latents, reference=reference, noise=noise, sigma=0.9, timestep=900.0, context=context[:1],
            null_context=context[1:], guidance=options.motion,
        )  # fmt: skip

    @torch.no_grad()
    def sample() -> None:
        for prompts in [context] if options.batch_cfg else context.split(1):
            dit(latents.expand(len(prompts), -1, -1, -1, -1), torch.tensor([900.0]), prompts)

    @torch.no_grad()
    def encode() -> None:
        vae.encode(pixels, **options.tiling)

    @torch.no_grad()
    def decode() -> None:
        if options.tiled:
            vae.decode(latents, num_frames=options.num_frames, **options.tiling)
        else:
            for _ in vae.decode_chunks(latents):
                pass

    return [
        ("guidance", ("dit",), guide),
        ("sampling", ("dit",), sample),
        ("encode video", ("vae",), encode),
        ("decode", ("vae",), decode),
    ]


def tiny_text_encoder() -> nn.Module:
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder

    sizes = {
        "vocab": 8,
        "dim": 8,
        "dim_attn": 8,
        "dim_ffn": 8,
        "num_heads": 1,
        "num_layers": 1,
        "num_buckets": 4,
    }
    return WanTextEncoder(**sizes)


def out_of_memory(bench: Bench) -> None:
    """A run that gets less memory than it takes must end all the same, lower down the ladder."""
    size = (
        {"height": 64, "width": 64, "num_frames": 17}
        if bench.tiny
        else {"height": 512, "width": 512, "num_frames": 81}
    )
    pipe = WanVideoPipeline.from_pretrained("nano", torch_dtype=bench.dtype, device=bench.device)
    options = {**size, "num_inference_steps": 2, "seed": 1, "progress_bar_cmd": list, "output_type": "latent"}
    options |= {
        "motion": {"guided_steps": 1, "inner_steps": 1},
        "input_video": moving(size),
        "mode": "effi_AMF",
    }
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("diffsynth.planning.ladder").addHandler(handler)
    whole = peak_increase(lambda: pipe("a red ball", **options), bench.device)
    bench.emit(limit="none", peak_GB=whole / GB, warnings=len(told), result="in full")
    if not bench.capped:
        bench.emit(limit="skipped", why=f"PyTorch cannot limit the memory of {bench.device}")
        return
    for share in (0.7, 0.5, 0.35):
        told.clear()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((held + share * whole) / device_memory(bench.device))
        try:
            found = pipe("a red ball", **options)
            ended = "in full" if found.isfinite().all() else "not finite"
        except ladder.MemoryRanOutError as error:
            ended = str(error)[:300]
        bench.emit(limit=f"{share:.0%} of it", result=ended, warnings="; ".join(told)[:600])


def moving(size: dict[str, int]) -> Any:
    """Frames with a bright square that moves, uint8 [T, H, W, 3]."""
    frames = torch.zeros(size["num_frames"], size["height"], size["width"], 3, dtype=torch.uint8)
    side = size["height"] // 4
    for index, frame in enumerate(frames):
        left = index * (size["width"] - side) // size["num_frames"]
        frame[side : 2 * side, left : left + side] = 220
    return frames.numpy()


def streaming(bench: Bench) -> None:
    """Blocks of the 14B model that stream: seconds against resident ones, page-locked and not."""
    kinds = SIZES["small" if bench.tiny else "14b"]
    dit = WanModel(**{**kinds, "num_layers": 4 if bench.tiny else 8}).to(bench.dtype).requires_grad_(False)
    x = torch.randn(1, dit.in_dim, *bench.latents, device=bench.device)
    context = torch.randn(1, 512, dit.text_dim, device=bench.device, dtype=bench.dtype)

    @torch.no_grad()
    def forward() -> None:
        dit(x, torch.tensor([500.0]), context)

    size = sum(p.nbytes for block in dit.blocks for p in block.parameters())
    host = [torch.empty(size // 8, dtype=torch.uint8) for _ in "ab"]
    if bench.capped:
        host[1] = host[1].pin_memory()
    rates = {}
    for name, source in zip(("pageable", "page-locked"), host, strict=True):
        taken = bench.seconds(lambda source=source: source.to(bench.device, copy=True))
        rates[name] = source.nbytes / taken
        bench.emit(memory=name, copy_GB_a_second=rates[name] / 1e9)
    where = Residency({"dit": dit}, bench.device)
    with where.using("dit"):
        resident = bench.seconds(forward)
    bench.emit(weights="resident", forward_s=resident)
    for name in ("pageable", "page-locked"):
        with ExitStack() as stack:
            if name == "pageable":
                lock, residency.page_lock = residency.page_lock, lambda _blocks: False
                stack.callback(setattr, residency, "page_lock", lock)
            where.stream("dit", dit.blocks)
        with where.using("dit"):
            taken = bench.seconds(forward)
        copying = size / rates[name]
        hidden = 1 - max(0.0, taken - resident) / copying  # below 0: streaming costs more than its copies
        bench.emit(weights=f"streamed, {name}", forward_s=taken, copies_s=copying, share_hidden=hidden)


def presets(bench: Bench) -> None:
    """Whole runs of every preset, from the seconds of the kinds of work that they are made of."""
    for size in bench.sizes:
        work = Work(size, bench.latents, bench.device)
        runs = contenders(work, "block" if size != "small" else "none", peers=False)
        taken: dict[str, float | None] = {}
        for name in dict.fromkeys(kind for run_ in runs for kind in run_.work):
            try:
                taken[name] = bench.seconds(work.calls()[name], repeats=1)
                bench.emit(model=size, work=name, seconds=taken[name])
            except FAULTS as error:  # noqa: PERF203
                taken[name] = None
                bench.emit(model=size, work=name, failed=str(error).strip().splitlines()[0][:200])
        for run_ in runs:
            if all(taken[name] is not None for name in run_.work):
                whole = sum(count * (taken[name] or 0.0) for name, count in run_.work.items())
                bench.emit(
                    model=size, run=run_.name, denoising_s=whole, FFE=whole / (taken["forward"] or 1.0)
                )
        del work


def vae_stages(bench: Bench) -> None:
    """Encode and decode, whole and in tiles, in float32 and bfloat16, with channels last and not."""
    frames, rows, cols = bench.latents
    options = RunOptions(height=rows * 8, width=cols * 8, num_frames=4 * (frames - 1) + 1)
    video = torch.rand(1, 3, options.num_frames, options.height, options.width) * 2 - 1
    exact = None
    for dtype, last in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        torch.manual_seed(0)
        model = (
            (WanVideoVAE(dim=8) if bench.tiny else WanVideoVAE())
            .to(bench.device, dtype)
            .requires_grad_(False)
        )
        for layer in model.modules():
            if last and isinstance(layer, nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
        latents = torch.randn(1, model.z_dim, *bench.latents, device=bench.device)
        for tiled in (False, True):
            tiling = {"tiled": tiled, "tile_size": options.tile_size, "tile_stride": options.tile_stride}
            row = {"dtype": str(dtype), "channels_last": last, "tiled": tiled}
            try:
                with torch.no_grad():
                    encode = bench.seconds(lambda t=tiling, m=model: m.encode(video, **t), repeats=1)
                    decode = bench.seconds(lambda t=tiling, m=model, z=latents: m.decode(z, **t), repeats=1)
                    decoded = model.decode(latents, **tiling).float().cpu() if not tiled else None
                exact = decoded if exact is None else exact
                bench.emit(**row, encode_s=encode, decode_s=decode)
                if decoded is not None:
                    error = (decoded - exact).square().mean().clamp_min(1e-12)
                    bench.emit(**row, PSNR_dB=(10 * (4 / error).log10()).item())
            except FAULTS as error:
                bench.emit(**row, failed=str(error).strip().splitlines()[0][:200])


def compiled_blocks(bench: Bench) -> None:
    """A forward and a gradient with compiled blocks and without."""
    work = Work(bench.sizes[0], bench.latents, bench.device)
    motion = MotionGuidance(inner_steps=1, checkpoint="none" if bench.tiny else "block")
    for compiled in (False, True):
        if compiled:
            compile_blocks(work.dit, "aot_eager" if bench.tiny else "inductor")
        for name, call in (("forward", work.forward), ("gradient", partial(work.guided, motion))):
            started = time.perf_counter()
            call()
            synchronize(bench.device)
            first = time.perf_counter() - started
            bench.emit(work=name, compiled=compiled, first_call_s=first, seconds=bench.seconds(call))


def nano_training(bench: Bench) -> None:
    """Steps a second of training the embedded DiT on clips of its own size, batch 10."""
    dit = WanVideoPipeline.from_pretrained("nano", torch_dtype=torch.float32, device=bench.device).dit
    dit.to(bench.device).requires_grad_(True)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-5)
    x = torch.randn(10, dit.in_dim, 5, 8, 8, device=bench.device)
    context = torch.randn(10, dit.text_len, dit.text_dim, device=bench.device)
    sigma = torch.rand(10, device=bench.device)

    def step() -> None:
        optimizer.zero_grad()
        noise = torch.randn_like(x)
        level = sigma[:, None, None, None, None]
        velocity = dit((1 - level) * x + level * noise, 1000 * sigma, context)
        F.mse_loss(velocity, noise - x).backward()
        optimizer.step()

    bench.emit(batch=10, steps_a_second=1 / bench.seconds(step, repeats=20))


PARTS: dict[str, Callable[[Bench], None]] = {
    "self_test": self_test,
    "gpu_tests": gpu_tests,
    "attention": attention_kernels,
    "dit_forward": dit_forward,
    "peaks": peaks,
    "out_of_memory": out_of_memory,
    "streaming": streaming,
    "presets": presets,
    "vae": vae_stages,
    "compile": compiled_blocks,
    "nano_training": nano_training,
}
