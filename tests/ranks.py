"""Run a function on several ranks, each a process on this machine, over gloo."""

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server imports once and forks ranks, which are there in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers.models.umt5.modeling_umt5", "diffsynth.distributed.ranks"]
)


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """Return what function(*arguments) returns on each of `size` ranks; fail with their tracebacks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_rank, args=(rank, size, folder, timeout, function, *arguments))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout + 30)
            rank.kill()  # one that never ends would keep this process from ending
        errors = "".join(file.read_text() for file in Path(folder).glob("*.error"))
        assert [rank.exitcode for rank in ranks] == [0] * size, errors
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, timeout: float, function: Callable[..., Any], *arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except Exception:  # noqa: BLE001 - told by the process that waits
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        sys.exit(1)
