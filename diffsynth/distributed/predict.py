"""What a run takes on several ranks: memory of one, bytes that one sends, and time from given speeds.

S tokens in P shares of n; D width, w bytes of a number. A block's attention sends of q, k, v and its result
4 n D w (P - 1) / P bytes (all-to-all), or of k and v 2 n D w (P - 1), and as much again backward.
"""

from dataclasses import dataclass, replace
from math import prod

from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.planning.cost import guidance_passes
from diffsynth.planning.memory import FLOAT, Shape, StageMemory, predict_stages, run_bytes, token_grid
from diffsynth.planning.plan import RunPlan
from diffsynth.planning.sizes import DiTSize, ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """Of one of `ranks`: bytes at its peak, bytes sent in a step and for a gradient, seconds of the run."""

    ranks: int
    memory: int
    step_bytes: float
    gradient_bytes: float
    seconds: float

    def __str__(self) -> str:
        step, gradient = self.step_bytes / 1e9, self.gradient_bytes / 1e9
        sends = f"sends {step:.4g} GB a step, {gradient:.4g} GB a gradient; {self.seconds:.4g} s"
        return f"on each of {self.ranks}: {self.memory / 2**30:.2f} GB at the peak; {sends}"


def plan_ranks(
    sizes: ModelSizes, plan: RunPlan, ranks: int, tflops: float, gb_per_s: float, shard: bool = False
) -> RankPlan:
    """Predict a planned run on several ranks, each of so many TFLOP/s that sends so many GB/s.

    With `shard`, each keeps a share of the DiT's blocks, and gathers them for each pass.
    """
    dit, run, motion = sizes.dit, plan.options, plan.options.motion
    latents = sizes.latent_shape(run.height, run.width, run.num_frames)
    prompts = 2 if run.cfg_scale != 1 else 1
    halves = prompts == 2 and ranks % 2 == 0
    group, alone = (ranks // 2 if halves else ranks), run_bytes(dit, latents)
    others, blocks = (ranks - 1) / ranks, dit.weights.blocks
    settings = replace(plan.settings, offload=True) if shard else plan.settings
    held = dit.weights.rest + sum(blocks) / ranks if shard else 0  # in all stages

    def peak(stage: StageMemory) -> float:
        if stage.stage not in ("guidance", "sampling"):
            return stage.total + held
        # Shares, the block that runs, FSDP's copy of it, and the next one.
        weights = held + 3 * max(blocks) if shard else stage.weights
        return weights + alone + (stage.activations - alone) / ranks

    memory = max(map(peak, predict_stages(sizes, run, settings, motion is not None)))
    step = velocity_bytes(dit, latents, group) * (1 if halves else prompts)
    step += prod(latents) * dit.out_dim * FLOAT if halves else 0
    step += sum(blocks) * others * (1 if halves or settings.batch_cfg else prompts) if shard else 0
    gradient, sent = 0.0, run.num_inference_steps * step
    if motion is not None and DESCRIPTORS[motion.mode].needs_backward:
        references, gradients = guidance_passes(motion, run.num_inference_steps)
        grid, depth = token_grid(dit, latents, motion.coarse), motion.block_for(dit.num_layers)
        windowed, again = motion.attention_window is not None, settings.checkpoint != "none"
        weights = sum(blocks[: depth + 1]) * others if shard else 0
        width = dit.dim if motion.heads == "mean_logits" else dit.dim // dit.num_heads
        features = 2 * width * -(-prod(grid) // ranks) * FLOAT * (ranks - 1)
        forward = depth * block_bytes(dit, grid, ranks, windowed)
        total = 2 * dit.in_dim * prod(latents) / motion.coarse**2 * FLOAT * others
        gradient = forward * (3 if again else 2) + 2 * (features + weights) + total
        sent += references * (forward + features + weights) + gradients * gradient
    time = plan.cost.flops / (tflops * 1e12 * ranks) + sent / (gb_per_s * 1e9)
    return RankPlan(ranks=ranks, memory=round(memory), step_bytes=step, gradient_bytes=gradient, seconds=time)


def block_bytes(dit: DiTSize, grid: Shape, ranks: int, windowed: bool = False) -> float:
    """Return the bytes that a rank sends in the forward of a block."""
    share = -(-prod(grid) // ranks) * dit.dim // dit.num_heads * dit.dtype.itemsize
    if dit.num_heads % ranks and not windowed:
        return 2 * share * dit.num_heads * (ranks - 1)
    return 4 * share * -(-dit.num_heads // ranks) * (ranks - 1)


def velocity_bytes(dit: DiTSize, latents: Shape, ranks: int) -> float:
    """Return the bytes that a rank sends for the velocity of one prompt."""
    grid = token_grid(dit, latents)
    patches = -(-prod(grid) // ranks) * prod(dit.patch_size) * dit.out_dim * FLOAT * (ranks - 1)
    return dit.num_layers * block_bytes(dit, grid, ranks) + patches
