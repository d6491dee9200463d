"""One DiT over several ranks against the same DiT in one process: gradients, velocities, whole runs."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from diffsynth.distributed import collectives
from diffsynth.distributed.sequence import Mesh, spread
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import GradientMemory, MotionGuidance, guided_step
from diffsynth.pipelines.denoise import dit_velocity
from diffsynth.runs.state import ImageCondition

SIZES = {"dim": 48, "ffn_dim": 96, "freq_dim": 32, "text_dim": 32, "text_len": 8, "num_layers": 3}
GUIDANCE = MotionGuidance(
    block=2, window=3, tile=(2, 2), sf=3, inner_steps=1, interval=1, recompute_every=2, lr=(0.01, 0.01)
)
GUIDANCES = {
    "tile": GUIDANCE,
    "dense": replace(GUIDANCE, mode="AMF", heads="mean_logits"),
    "windowed, blocks computed again": replace(GUIDANCE, attention_window=(1, 2, 2), checkpoint="block"),
    "as released": replace(GUIDANCE, mode="AMF", heads="token_groups", token_scale=None),
    "coarse": replace(GUIDANCE, coarse=2),
}


def a_dit(**changes: Any) -> WanModel:
    torch.manual_seed(0)
    return WanModel(**{**SIZES, "in_dim": 4, "out_dim": 4, "num_heads": 4, **changes}).requires_grad_(False)


def inputs(grid: tuple[int, int, int], channels: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = dict.fromkeys(("x", "reference", "noise"), (1, channels, grid[0], 2 * grid[1], 2 * grid[2]))
    shapes |= dict.fromkeys(("context", "null_context"), (1, 5, SIZES["text_dim"]))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradient(
    grid: tuple[int, int, int], guidance: MotionGuidance, dtype: torch.dtype, picture: str, ranks: bool
):
    """The gradient of a guided step, its loss, and the latents that it moves."""
    dit, given = a_dit(in_dim=9 if picture == "y" else 4).to(dtype), inputs(grid)
    given = {name: t.to(dtype) for name, t in given.items()}
    memory = GradientMemory(guidance)
    if picture:
        pictures = {"first_frame": given["noise"][:, :, :1]}
        pictures = {"y": inputs(grid, 5)["x"].to(dtype)} if picture == "y" else pictures
        given |= {name: ImageCondition(**pictures) for name in ("condition", "reference_condition")}
    with spread(dit, Mesh.over_all("cpu")) if ranks else nullcontext():
        moved, record = guided_step(
            dit, given.pop("x"), sigma=0.7, timestep=700.0, guidance=guidance, memory=memory, **given
        )
    return memory.state()["gradient.0"], record, moved


def gradients(cases: list[tuple], ranks: bool = True) -> list[Any]:
    return [gradient(*case, ranks) for case in cases]


CASES = [((5, 3, 4), guidance, torch.float64, "") for guidance in GUIDANCES.values() if guidance.coarse == 1]
CASES += [
    ((5, 3, 4), GUIDANCE, torch.float64, "first frame"),
    ((5, 3, 4), GUIDANCES["dense"], torch.float64, "y"),
    ((3, 4, 6), GUIDANCES["coarse"], torch.float64, ""),
    ((1, 1, 31), GUIDANCES["dense"], torch.float64, ""),  # a prime number of tokens, and of one frame
    ((7, 5, 3), GUIDANCE, torch.float64, ""),
    ((7, 5, 3), GUIDANCE, torch.float32, ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_rank_has_the_gradient_of_one_process(size):
    expected = gradients(CASES, ranks=False)
    for found in on_ranks(size, gradients, CASES):
        for case, (one, record, moved), (several, spread_record, spread_moved) in zip(
            CASES, expected, found, strict=True
        ):
            bound = 1e-11 if case[2] == torch.float64 else 1e-6
            assert one.norm() > 0
            assert (several - one).norm() <= bound * one.norm(), case
            assert spread_record.losses == pytest.approx(record.losses, rel=bound)
            assert spread_record.parts[0] == pytest.approx(record.parts[0], rel=10 * bound, abs=1e-7)
            assert (spread_moved - moved).abs().max() <= 1e-5


def compiled_results(backend: str | None) -> list[torch.Tensor]:
    """A gradient, and velocities of two prompts and of one; with a backend, of compiled blocks on ranks."""
    dit, given, memory = a_dit(), inputs((5, 3, 4)), GradientMemory(GUIDANCE)
    if backend is not None:
        compile_blocks(dit, backend)
    both = torch.cat([given["context"], given["null_context"]])
    with nullcontext() if backend is None else spread(dit, Mesh.over_all("cpu")):
        x = given.pop("x")
        guided_step(dit, x, sigma=0.7, timestep=700.0, guidance=GUIDANCE, memory=memory, **given)
        with torch.no_grad():
            two = dit(x.expand(2, -1, -1, -1, -1), torch.tensor([700.0]), both)
            one = dit(x, torch.tensor([700.0]), given["context"])
    return [memory.state()["gradient.0"], two, one]


@pytest.mark.slow
def test_compiled_blocks_communicate_and_give_the_same():
    expected = compiled_results(None)
    for found in on_ranks(2, compiled_results, "aot_eager"):
        for several, one in zip(found, expected, strict=True):
            assert (several - one).norm() <= 1e-6 * one.norm()


def without_the_sum() -> torch.Tensor:
    collectives._sum = lambda tensor, _group: tensor
    return gradient((5, 3, 4), GUIDANCES["as released"], torch.float64, "", True)[0]


def test_without_the_sum_over_ranks_the_gradient_would_be_wrong():
    one = gradient((5, 3, 4), GUIDANCES["as released"], torch.float64, "", False)[0]
    found = on_ranks(2, without_the_sum)
    assert min((own - one).norm() / one.norm() for own in found) > 0.1


def velocities(ranks: bool = True) -> list[torch.Tensor]:
    """Velocities of one prompt and of two, with and without a first frame, and of an image model."""
    found = []
    for channels, heads in ((4, 4), (9, 3)):
        dit, given = a_dit(in_dim=channels, num_heads=heads), inputs((3, 5, 7))
        x, both = given["x"], torch.cat([given["context"], given["null_context"]])
        first = ImageCondition(first_frame=given["noise"][:, :, :1])
        if channels == 9:
            first = ImageCondition(y=inputs((3, 5, 7), 5)["x"])
        with spread(dit, Mesh.over_all("cpu")) if ranks else nullcontext(), torch.no_grad():
            for condition in (first, ImageCondition()) if channels == 4 else (first,):
                for context in (given["context"], both):
                    latents = x.expand(len(context), -1, -1, -1, -1)
                    found.append(
                        dit_velocity(dit, latents, torch.tensor(700.0), context, condition=condition)
                    )
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_has_the_velocity_of_one_process(size):
    expected = velocities(ranks=False)
    for found in on_ranks(size, velocities):
        for one, several in zip(expected, found, strict=True):
            assert (several - one).abs().max() <= 2e-6 * one.abs().max()


def own_latents() -> None:
    dit, given = a_dit(), inputs((2, 2, 2))
    with spread(dit, Mesh.over_all("cpu")), torch.no_grad():
        dit(given["x"] + 1e-6 * dist.get_rank(), torch.tensor([700.0]), given["context"])


def test_ranks_with_other_latents_are_told():
    with pytest.raises(AssertionError, match=r"the latents of rank\(s\) \[1\] are not those of rank 0"):
        on_ranks(2, own_latents)


def test_the_dit_is_itself_again_afterwards():
    dit, mesh = a_dit(), Mesh(None, None)
    before = dict(vars(dit)), [dict(vars(block.self_attn)) for block in dit.blocks]
    with spread(dit, mesh):
        assert dit.spread.dit is dit
        assert dit.forward == dit.spread.forward
    assert (dict(vars(dit)), [dict(vars(block.self_attn)) for block in dit.blocks]) == before
