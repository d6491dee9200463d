"""What ranks send and keep, counted in small runs, against what is predicted for large ones."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_sequence_parallel import GUIDANCE, a_dit, inputs
from torch.autograd.graph import saved_tensors_hooks

from diffsynth.configs.options import RunOptions
from diffsynth.distributed import collectives
from diffsynth.distributed.predict import plan_ranks, velocity_bytes
from diffsynth.distributed.sequence import Mesh, spread
from diffsynth.distributed.sharding import shard
from diffsynth.motion import guided_step
from diffsynth.planning.plan import plan_run
from diffsynth.planning.sizes import DiTSize, ModelSizes, published_sizes

GRID = (6, 8, 7)
# The feed-forward is 2.7 times as wide as the model, as in Wan's 14B: what a block keeps depends on it.


def sent(counted: list[float]) -> None:
    """Count the bytes that this rank sends, as rings and pairwise exchanges do."""
    shares = {
        "_join": lambda x, p: x.nbytes * (p - 1),
        "_exchange": lambda x, p: x.nbytes * (p - 1) / p,
        "_scatter": lambda x, p: x.nbytes * (p - 1) / p,
        "_sum": lambda x, p: 2 * x.nbytes * (p - 1) / p,
    }
    for name, share in shares.items():
        real = getattr(collectives, name)

        def counting(x: torch.Tensor, group: Any, real: Any = real, share: Any = share) -> torch.Tensor:
            counted.append(share(x, group.size()))
            return real(x, group)

        setattr(collectives, name, counting)


def counted_run(ranks: bool, sharded: bool = False) -> tuple[float, float, int]:
    """Bytes sent for a velocity and for a guided step with one gradient, and bytes kept for the gradient.

    With `sharded`, weights are split, and their bytes alone are counted.
    """
    dit, given, counted, kept = a_dit(ffn_dim=96 if sharded else 130), inputs(GRID), [], {}
    if sharded:
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        setattr(dist, name, counting_gather(getattr(dist, name), counted))
    elif ranks:
        sent(counted)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in parameters):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    parameters = list(dit.parameters())
    with spread(dit, Mesh.over_all("cpu")) if ranks else nullcontext():
        if sharded:
            shard(dit, "cpu")
        with torch.no_grad():
            dit(given["x"], torch.tensor([700.0]), given["context"])
        velocity = sum(counted)
        x = given.pop("x")
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            guided_step(dit, x, sigma=0.7, timestep=700.0, guidance=GUIDANCE, **given)
    return velocity, sum(counted) - velocity, sum(size for size, _ in kept.values())


def counting_gather(real: Any, counted: list[float]) -> Any:
    def gather(output: torch.Tensor, own: torch.Tensor, **named: Any) -> Any:
        counted.append(output.nbytes - own.nbytes)
        return real(output, own, **named)

    return gather


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_as_predicted_and_each_rank_keeps_its_share(size):
    dit, latents = DiTSize.of(a_dit(ffn_dim=130)), (GRID[0], 2 * GRID[1], 2 * GRID[2])
    models = published_sizes("1.3b")
    sizes = ModelSizes(name="small", dit=dit, text_encoder=models.text_encoder, vae=models.vae)
    run = RunOptions(
        height=latents[1] * 8, width=latents[2] * 8, num_frames=21, motion=GUIDANCE, num_inference_steps=1,
        cfg_scale=1.0,
    )  # fmt: skip
    predicted = plan_ranks(sizes, plan_run(sizes, run, with_reference=True), size, 1e30, 1e-9)
    alone = counted_run(False)
    for velocity, guided, kept in on_ranks(size, counted_run, True):
        assert velocity == pytest.approx(velocity_bytes(dit, latents, size), rel=0.02)
        assert velocity == pytest.approx(predicted.step_bytes, rel=0.02)
        # At a byte a second: a step's velocity, its look at the reference and one gradient.
        assert velocity + guided == pytest.approx(predicted.seconds, rel=0.02)
        assert kept <= (1 / size + 0.1) * alone[2]


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_split_weights_are_as_predicted(size):
    models = published_sizes("1.3b")
    sizes = ModelSizes(
        name="small", dit=DiTSize.of(a_dit()), text_encoder=models.text_encoder, vae=models.vae
    )
    run = RunOptions(
        height=GRID[1] * 16, width=GRID[2] * 16, num_frames=21, motion=GUIDANCE, num_inference_steps=1,
        cfg_scale=1.0,
    )  # fmt: skip
    plan = plan_run(sizes, run, with_reference=True)
    whole, split = (plan_ranks(sizes, plan, size, 1e30, 1e-9, shard) for shard in (False, True))
    for velocity, guided, _ in on_ranks(size, counted_run, True, True):
        # Tensors of one row are sent whole by each rank: 2 % of so small a block.
        assert velocity == pytest.approx(split.step_bytes - whole.step_bytes, rel=0.03)
        assert velocity + guided == pytest.approx(split.seconds - whole.seconds, rel=0.03)


def test_split_weights_are_a_share_of_the_blocks_and_three_of_them():
    sizes = published_sizes("14b")
    plan = plan_run(sizes, RunOptions(height=480, width=832, num_frames=81), with_reference=False)
    blocks, rest = sizes.dit.weights.blocks, sizes.dit.weights.rest
    whole, split = (plan_ranks(sizes, plan, 8, 400, 200, shard) for shard in (False, True))
    sampling = next(stage for stage in plan.stages if stage.stage == "sampling")
    assert split.memory >= sum(blocks) / 8 + 3 * max(blocks) + rest + sampling.activations / 8
    assert split.memory < whole.memory - sum(blocks) * 7 / 8


def test_a_plan_over_ranks_shrinks_activations_and_time():
    sizes = published_sizes("14b")
    plan = plan_run(sizes, RunOptions(height=480, width=832, num_frames=81), with_reference=False)
    one, eight = (plan_ranks(sizes, plan, ranks, 400, 200) for ranks in (1, 8))
    assert one.step_bytes == 0
    assert one.memory == plan.peak
    assert eight.memory < one.memory
    assert one.seconds / 8 < eight.seconds < one.seconds / 4
    blocks, patches = 40 * 4 * 8190 * 5120 * 2 * 3 / 4, 8190 * 64 * 4 * 3
    assert eight.step_bytes == blocks + patches + 32760 * 64 * 4
