"""The procedures that benchmarks/run.py compares: for each, the kinds of its work and how often each runs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import released_guidance
import torch
from torch import Tensor, nn

from diffsynth.configs.cache_tables import PROMPTS
from diffsynth.configs.caches import choose_cache
from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.configs.defaults import EXACT, RunDefaults
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import official_key
from diffsynth.motion import MotionGuidance, guided_step
from diffsynth.planning.cost import computed_steps

SIGMA = 0.9
# The released procedure's numbers; other sizes have the same depth, for the same share of blocks.
SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {
        "dim": 256, "ffn_dim": 1536, "num_heads": 2, "num_layers": 30,
        "in_dim": 16, "out_dim": 16, "text_dim": 256, "freq_dim": 256,
    },
    "1.3b": PUBLISHED["1.3b"].dit_kwargs,
    "14b": PUBLISHED["14b"].dit_kwargs,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A whole run: kind of work -> times. work names calls of `Work`."""

    name: str
    work: Mapping[str, int]


class Work:
    """The kinds of work by name, over one DiT with random weights: each call returns a tensor."""

    def __init__(self, size: str, latent_shape: tuple[int, int, int], device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with torch.device(device):
            self.dit = WanModel(**SIZES[size]).to(dtype).requires_grad_(False)
            shape = (3, 1, self.dit.in_dim, *latent_shape)
            self.latents, self.reference, self.noise = torch.randn(shape)
            self.contexts = torch.randn(3, 1, 512, self.dit.text_dim, dtype=dtype)
            self.timestep = torch.tensor([1000 * SIGMA])
        self.motions: dict[str, MotionGuidance] = {}
        self._diffusers: nn.Module | None = None

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "forward": self.forward,
            "diffusers forward": self.diffusers_forward,
            "released guided step": self.released,
            **{name: lambda g=motion: self.guided(g) for name, motion in self.motions.items()},
        }

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.dit(self.latents, self.timestep, self.contexts[0])

    @torch.no_grad()
    def diffusers_forward(self) -> Tensor:
        if self._diffusers is None:
            self._diffusers = same_in_diffusers(self.dit)
        x = self.latents.to(self.dit.dtype)
        return self._diffusers(x, self.timestep, self.contexts[0], return_dict=False)[0]

    def released(self) -> Tensor:
        noised = (1 - SIGMA) * self.reference + SIGMA * self.noise
        positive, _, null = self.contexts
        return released_guidance.guided_step(
            self.dit, self.latents, noised, self.timestep, positive, null
        ).detach()

    def guided(self, motion: MotionGuidance) -> Tensor:
        positive, _, null = self.contexts
        moved, _ = guided_step(
            self.dit, self.latents, reference=self.reference, noise=self.noise, sigma=SIGMA,
            timestep=self.timestep, context=positive, null_context=null, guidance=motion,
        )  # fmt: skip
        return moved


def same_in_diffusers(dit: WanModel) -> nn.Module:
    """diffusers' DiT, which shares the weights of ours."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=dit.num_heads, attention_head_dim=dit.dim // dit.num_heads,
            in_channels=dit.in_dim, out_channels=dit.in_dim, text_dim=dit.text_dim, freq_dim=dit.freq_dim,
            ffn_dim=dit.ffn_dim, num_layers=dit.num_layers,
        )  # fmt: skip
    rope = type(model.rope)(dit.dim // dit.num_heads, (1, 2, 2), 1024)
    weights = dit.state_dict()
    model.load_state_dict({key: weights[official_key(key)] for key in model.state_dict()}, assign=True)
    model.rope = rope.to(weights["patch_embedding.weight"].device)
    return model.eval().requires_grad_(False)


def contenders(work: Work, checkpoint: str, peers: bool) -> list[Contender]:
    """Whole runs with the published numbers: 50 steps, guidance in the first 10; presets change them.

    checkpoint: of MotionGuidance, for our own. peers: whether diffusers is there to be compared with.
    """
    defaults = RunDefaults()
    plain = 2 * defaults["num_inference_steps"]
    guided = MotionGuidance().guided_steps
    flow_motion = MotionGuidance.for_mode("FlowMotion")
    work.motions["FlowMotion guided step"] = flow_motion
    compared = [
        Contender(name="released", work={"forward": plain, "released guided step": guided}),
        Contender(
            name="FlowMotion",
            work={"forward": plain, "FlowMotion guided step": flow_motion.guided_steps},
        ),
    ]
    for preset in (EXACT, *defaults.presets):
        chosen = defaults.with_preset(preset)
        numbers = {**chosen.motion.get("effi_AMF", {}), "checkpoint": checkpoint}
        motion = MotionGuidance.for_mode("effi_AMF", numbers)
        kind = f"{preset} guided step"
        work.motions[kind] = motion
        fresh = math.ceil(motion.guided_steps / motion.recompute_every)
        compared.append(Contender(name=preset, work={"forward": forwards(chosen, work.dit.dim), kind: fresh}))
    compared.append(Contender(name="No_transfer", work={"forward": plain}))
    if peers:
        compared.append(Contender(name="diffusers, no transfer", work={"diffusers forward": plain}))
    return compared


def forwards(defaults: RunDefaults, dim: int) -> int:
    """Return how many DiT calls of a run with both prompts run the blocks: all, or those that MagCache leaves
    by the ratios of the published model of this width, else of the 1.3B one.
    """
    width = dim if dim == SIZES["14b"]["dim"] else SIZES["1.3b"]["dim"]
    name, steps = defaults["cache"], defaults["num_inference_steps"]
    cache = None if name is None else choose_cache(name, defaults["cache_threshold"], width)
    return sum(computed_steps(cache, prompt, range(steps), steps) for prompt in PROMPTS)
