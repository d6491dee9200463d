"""The self-test: what the embedded model computes on a device, stage by stage, against stored numbers.

Every stage has separate inputs, drawn on the CPU, so that a fault shows in the stage that has it. The
stored numbers are those of benchmarks/self_test_numbers.py: float32 on a CPU.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import WIDE_DTYPES, RunOptions
from diffsynth.models.attention import BACKENDS, attention
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.motion import attention_motion_flow, make_descriptor
from diffsynth.pipelines.components import Components
from diffsynth.pipelines.sample import begin_denoising
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.cost import RunCost
from diffsynth.runs.state import PromptEmbeddings, RunInputs
from diffsynth.schedulers import make_scheduler, run_scheduler
from diffsynth.vram_management import Residency

REFERENCE = Path(__file__).with_suffix(".safetensors")
NUM_SAMPLES = 256  # elements of a result that are compared, besides its norm
TEXT = (20, 64)  # rows and width; fewer rows than the DiT reads
LATENTS = (1, 8, 4, 16, 12)  # upright, so that rows and columns cannot be taken for each other
GUIDANCE = MotionGuidance(
    block=4, heads="mean_logits", tau=2.0, sf=3, window=5, update="gradient", lr=(0.05, 0.03), inner_steps=2,
    interval=1, recompute_every=2,
)  # fmt: skip
# Relative errors allowed in float32, bfloat16 and float16: 4 to 30 times the rounding measured on a CPU, and
# less than the faults in tests/test_self_test.py cause.
ROUNDED = (2e-5, 4e-2, 5e-3)
DIFFERENTIATED = (1e-4, 0.15, 2e-2)
IN_FLOAT32 = (1e-5, 1e-5, 1e-5)  # whatever dtype the models compute in
FAULTS = (RuntimeError, TypeError, ValueError, ImportError)  # what a broken device or kernel raises
Outputs = dict[str, Tensor]
Stage = Callable[[Components], Outputs]
_ATTENTION = "attention "
HEADING = f"{'stage':<24}dtype         error  tolerance"


class StageResult(NamedTuple):
    """One stage in one dtype: its relative error (infinite or NaN fails, too), and why it has none."""

    stage: str
    dtype: str
    tolerance: float
    error: float = math.inf
    skipped: bool = False
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Return whether the stage ran and missed its tolerance."""
        return not self.skipped and not self.error <= self.tolerance

    def __str__(self) -> str:
        """Return a line of the table, under `HEADING`."""
        state = "skipped" if self.skipped else "FAILED" if self.failed else "ok"
        numbers = f"{self.error:>9.1e}  {self.tolerance:>9.1e}  {state} {self.reason}"
        return f"{self.stage:<24}{self.dtype:<10}{numbers}".rstrip()


def _draw(models: Components, seed: int, *shape: int) -> Tensor:
    """Normal random numbers in float32, the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(models.device)


def _text_encoder(models: Components) -> Outputs:
    ids = torch.arange(1, 13, device=models.device)[None]
    masked = models.text_encoder(ids, (ids <= 8).long())[:, :8]
    texts = ("a red circle on a blue background", "a star")
    return {"rows": models.prompter.encode_prompt(texts, models.text_encoder), "masked": masked}


def _attention(backend: str, models: Components) -> Outputs:
    # Logits far above what half precision can take the exponential of.
    q, k, v = (_draw(models, 10 + i, 2, 48, 4, 64).to(models.dit.dtype) for i in range(3))
    return {"out": attention(2 * q, 3 * k, v, backend=backend)}


def _dit_forward(models: Components) -> Outputs:
    timestep = torch.tensor([900.0, 250.0], device=models.device)
    x, context = _draw(models, 20, 2, *LATENTS[1:]), _draw(models, 21, 2, *TEXT)
    return {"velocity": models.dit(x, timestep, context)}


def _queries_keys(models: Components) -> Outputs:
    timestep = torch.tensor([600.0], device=models.device)
    inputs = (_draw(models, 22, *LATENTS), timestep, _draw(models, 23, 1, *TEXT))
    q, k = models.dit.features(*inputs, block=4)
    near_q, near_k = models.dit.features(*inputs, block=4, attention_window=(1, 2, 2))
    return {"q": q, "k": k, "near_q": near_q, "near_k": near_k}


def _flow(models: Components) -> Outputs:
    q, k = _draw(models, 30, 2, 4, 8, 6, 5, 32)
    tile = make_descriptor(GUIDANCE).describe((q, k)).flow
    return {"dense": attention_motion_flow(q, k, sf=3, tau=2.0, heads="mean_qk"), "tile": tile}


def _loss(models: Components) -> Outputs:
    descriptor, (q, k, other_q, other_k) = make_descriptor(GUIDANCE), _draw(models, 40, 4, 4, 8, 6, 5, 32)
    reference = descriptor.describe((q, k))
    total, parts = descriptor.loss(descriptor.describe((other_q, other_k), reference), reference)
    return {"total": total, **parts}


def _sampler(models: Components) -> Outputs:
    outputs: Outputs = {}
    for name in ("euler", "unipc"):
        scheduler = make_scheduler(name, 3.0)
        scheduler.set_timesteps(4, 0.8)
        clean, noise, *velocities = _draw(models, 60, 6, *LATENTS)
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[0])
        for velocity, timestep in zip(velocities, scheduler.timesteps, strict=True):
            x = scheduler.step(velocity, timestep, x)
        outputs[name] = x
    return outputs


def _guided(models: Components, names: Sequence[str] = ()) -> Outputs:
    """The first step of a run: its gradient, and how far guidance and sampling move the latents."""
    prompt, (noise, reference) = _draw(models, 70, 3, *TEXT).split(1), _draw(models, 71, 2, *LATENTS)
    inputs = RunInputs(prompts=[PromptEmbeddings(*prompt)], noise=noise, reference=reference, seconds={})
    options = RunOptions(num_inference_steps=4, cfg_scale=5.0, sigma_shift=3.0, motion=GUIDANCE)
    cost = RunCost(seed=0, mode=options.mode, num_inference_steps=4)
    scheduler = run_scheduler(options)
    start, steps, parts = begin_denoising(
        models.dit, scheduler, range(4), 0, inputs, options, cost, stop=lambda: False, finished=None
    )
    guided, moved = next(steps).latents, next(steps).latents
    assert guided is not None
    assert moved is not None
    found = {"start": start, "guided": guided - start, "sampled": moved - guided}
    found["gradient"] = parts["memory"].state()["gradient.0"]
    return {name: found[name] for name in names or found}


def _resident(models: Components) -> Outputs:
    return _guided(models) | _dit_forward(models)


def _streamed(models: Components) -> Outputs:
    models = replace(models, dit=copy.deepcopy(models.dit).cpu())
    residency = Residency({"dit": models.dit}, models.device)
    residency.stream("dit", models.dit.blocks)
    with residency.using("dit"):
        return _resident(models)


def _compiled(models: Components) -> Outputs:
    """Run the DiT compiled; on a CPU only traced, because inductor takes half a minute there."""
    models = replace(models, dit=copy.deepcopy(models.dit))
    compile_blocks(models.dit, "aot_eager" if models.device.type == "cpu" else "inductor")
    return _dit_forward(models)


# Of each stage, what runs and the errors that it may have.
STAGES: dict[str, tuple[Stage, tuple[float, ...]]] = {
    "text encoder": (_text_encoder, ROUNDED),
    "VAE encode": (lambda m: {"latents": m.vae.encode(_draw(m, 1, 1, 3, 9, 32, 24).tanh())}, ROUNDED),
    "VAE decode": (lambda m: {"video": m.vae.decode(0.5 * _draw(m, 2, 1, 8, 3, 8, 6))}, ROUNDED),
    "DiT forward": (_dit_forward, ROUNDED),
    "q and k": (_queries_keys, ROUNDED),
    "flow": (_flow, IN_FLOAT32),
    "loss": (_loss, IN_FLOAT32),
    "gradient": (partial(_guided, names=("gradient",)), DIFFERENTIATED),
    "sampler": (_sampler, IN_FLOAT32),
    "guided step": (_guided, DIFFERENTIATED),
    "streaming": (_streamed, (1e-5, 1e-2, 2e-3)),  # equal on a CPU; a GPU may add up in another order
    "compile": (_compiled, ROUNDED),
    # SageAttention rounds q and k to 8 bits.
    **{_ATTENTION + n: (partial(_attention, n), (0.15,) * 3 if n == "sage" else ROUNDED) for n in BACKENDS},
}


def self_test(device: torch.device, dtypes: Sequence[str] = WIDE_DTYPES) -> Iterator[StageResult]:
    """Yield the result of each stage on a device, one dtype after the other."""
    stored = load_file(REFERENCE)
    for dtype in dtypes:
        models = load_models(device, dtype)
        yield from (_measure(models, dtype, name, stored) for name in STAGES if _runs(name, device, dtype))


def dtype_refusal(device: torch.device, dtype: str) -> str:
    """Return why a device cannot compute in a dtype; empty if it can."""
    try:
        x = torch.ones(1, 1, 2, 2, 2, dtype=getattr(torch, dtype), device=device)
        F.linear(F.conv3d(x, x), x[0, 0, 0, :1, :1]).sum().item()
    except FAULTS as error:
        return str(error).partition("\n")[0]
    return ""


def load_models(device: torch.device, dtype: str) -> Components:
    """Load the embedded model for a test."""
    wide = getattr(torch, dtype)
    models = WanVideoPipeline.from_pretrained("nano", wide, device, vae_dtype=wide).models
    # The embedded VAE's own statistics, 0 and 1, would hide a fault in how they are used.
    rising = tuple(0.1 * i for i in range(1, models.vae.z_dim + 1))
    models.vae.latents_mean, models.vae.latents_std = rising, rising[::-1]
    return models


def run_stage(models: Components, run: Stage) -> Outputs:
    """Return the norm and NUM_SAMPLES elements of each result, always the same ones, in float64."""
    residency, samples = models.residency, dict[str, Tensor]()
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 has 10 bits
    with residency.exclusive(), residency.using(*residency.models), precise, torch.no_grad():
        for name, value in run(models).items():
            flat = value.cpu().double().flatten()
            chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:NUM_SAMPLES]
            samples |= {name: flat[chosen], f"{name} norm": flat.norm()}
    return samples


def _runs(stage: str, device: torch.device, dtype: str) -> bool:
    """Whether a stage is for a device and dtype: its kernel takes them; compiling once takes long enough."""
    if stage.startswith(_ATTENTION):
        backend = BACKENDS[stage.removeprefix(_ATTENTION)]
        return backend.refusal(device.type, getattr(torch, dtype), 64, needs_grad=False) is None
    return stage != "compile" or dtype == ("float32" if device.type == "cpu" else "bfloat16")


def _measure(models: Components, dtype: str, stage: str, stored: Outputs) -> StageResult:
    run, tolerances = STAGES[stage]
    result = StageResult(stage, dtype, tolerances[WIDE_DTYPES.index(dtype)])
    source = f"{_ATTENTION}sdpa" if stage.startswith(_ATTENTION) else stage.replace("compile", "DiT forward")
    try:
        found = run_stage(models, run)
        # Streamed weights must give what resident ones give.
        resident = run_stage(models, _resident) if stage == "streaming" else {}
        expected = resident or {name: stored[f"{source}/{name}"] for name in found}
        errors = [(found[name] - expected[name]).norm() / expected[name].norm() for name in found]
    except FAULTS as error:
        return result._replace(skipped=stage == "compile", reason=str(error).partition("\n")[0])
    return result._replace(error=torch.stack(errors).max().item())
