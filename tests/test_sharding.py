"""A DiT whose blocks are split over ranks: results as with whole weights, and bytes that a rank holds."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from test_sequence_parallel import GUIDANCES, a_dit, inputs

from diffsynth.cli import transfer
from diffsynth.cli.main import main
from diffsynth.distributed.sequence import Mesh, spread
from diffsynth.distributed.sharding import shard
from diffsynth.models.packed_linear import pack_block_linears
from diffsynth.motion import GradientMemory, guided_step
from diffsynth.testing import write_clip

GRID = (5, 3, 4)
CASES = [
    GUIDANCES["windowed, blocks computed again"],
    *(replace(GUIDANCES["dense"], checkpoint=kept) for kept in ("none", "attention", "offload")),
]


def results(ranks: bool = True) -> list[tuple[torch.Tensor, ...]]:
    """Gradient, moved latents and their velocity, case by case with the same DiT."""
    dit, found = a_dit(), []
    with spread(dit, Mesh.over_all("cpu")) if ranks else nullcontext():
        if ranks:
            shard(dit, "cpu")
        for guidance in CASES:
            given, memory = inputs(GRID), GradientMemory(guidance)
            moved, _ = guided_step(
                dit, given.pop("x"), sigma=0.7, timestep=700.0, guidance=guidance, memory=memory, **given
            )
            both = torch.cat([given["context"], given["null_context"]])
            with torch.no_grad():
                velocity = dit(moved.expand(2, -1, -1, -1, -1), torch.tensor([700.0]), both)
            found.append((memory.state()["gradient.0"], moved, velocity))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_and_velocities_are_those_of_one_process(size):
    expected = results(ranks=False)
    for found in on_ranks(size, results):
        for one, several in zip(expected, found, strict=True):
            for whole, split in zip(one, several, strict=True):
                assert (split - whole).norm() <= 2e-6 * whole.norm()


def bytes_alive() -> int:
    """Bytes of all tensors of this process; those that share memory count once."""
    gc.collect()
    found = {}
    for tensor in [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def bytes_of_a_velocity(sharded: bool) -> tuple[list[int], list[int], int, int]:
    """Bytes alive after each block and inside of it; those of all blocks' weights, and of one's."""
    gc.freeze()  # what is there already is not looked at again and again
    dit, given, seen = a_dit(num_layers=6), inputs((1, 2, 2)), []
    inside: list[int] = []
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in dit.blocks]
    with spread(dit, Mesh.over_all("cpu")), torch.no_grad():
        if sharded:
            shard(dit, "cpu")
        for block in dit.blocks:
            block.register_forward_hook(lambda *_: seen.append(bytes_alive()))
            block.ffn.register_forward_pre_hook(lambda *_: inside.append(bytes_alive()))
        dit(given["x"], torch.tensor([700.0]), given["context"])
    return seen, inside, sum(sizes), sizes[0]


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_holds_its_share_and_the_blocks_at_hand(size):
    wholes, splits = (on_ranks(size, bytes_of_a_velocity, sharded) for sharded in (False, True))
    for (*whole, blocks, block), (*split, _, _) in zip(wholes, splits, strict=True):
        between, inside = (
            [blocks - (one - several) for one, several in zip(*held, strict=True)]
            for held in zip(whole, split, strict=True)
        )
        assert max(between[:-1]) <= 1.05 * (blocks / size + block)
        assert between[-1] <= 1.05 * blocks / size  # no block is next
        assert min(between) >= blocks / size * 0.9
        assert 1.05 * (blocks / size + 3 * block) >= max(inside) > blocks / size + 2 * block


def packed() -> str:
    dit = a_dit()
    pack_block_linears(dit)
    with pytest.raises(ValueError, match="--shard splits no packed weights") as refused:
        shard(dit, "cpu")
    return str(refused.value)


def test_packed_weights_are_refused():
    on_ranks(1, packed)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--offload"], "--offload"),
        (["--persistent", "0"], "--persistent"),
        (["--vram", "8"], "--vram"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_what_does_not_go_with_shares_is_refused_with_both_options(options, named, tmp_path, capsys):
    write_clip(tmp_path / "ref.mp4")
    command = ["transfer", str(tmp_path / "ref.mp4"), "--prompt", "a", "--model", "nano", "--shard"]
    assert main([*command, "-o", str(tmp_path / "out.mp4")]) == 2
    assert "blocks in each process; it needs --gpus N" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "out.mp4"), "--gpus", "2", *options]) == 2
    told = capsys.readouterr().err
    assert "--shard" in told
    assert named in told


def test_what_a_record_has_is_refused_like_an_option(monkeypatch, tmp_path, capsys):
    (tmp_path / "fox.json").touch()
    record = SimpleNamespace(model={"setup": {"dtype": "bfloat16", "offload": False, "compile": True}})
    monkeypatch.setattr(transfer, "read_record", lambda _: record)
    assert (
        main(["transfer", "--from", str(tmp_path / "fox.json"), "-o", "fox.mp4", "--gpus", "2", "--shard"])
        == 2
    )
    assert "it takes no --compile" in capsys.readouterr().err
