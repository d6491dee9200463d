"""One run on several ranks: start them, join them, and end them together with one message.

`fastvmt transfer --gpus N` starts N processes on this machine as `torchrun --nproc-per-node N -m diffsynth
transfer` does. All ranks make the same run; rank 0 alone saves and writes.
"""

import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
import torch.distributed as dist

from diffsynth.configs.resolve import NEW_SEED
from diffsynth.data.files import written_whole
from diffsynth.distributed.sequence import Mesh, SequenceParallel, replaced, spread
from diffsynth.distributed.sharding import shard
from diffsynth.distributed.tiles import spread_blend
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.planning.ladder import MemoryRanOutError
from diffsynth.runs.checkpoint import RUNG, saved_seed
from diffsynth.vram_management import choose_device

logger = logging.getLogger(__name__)

AGAIN = 75  # exit code of ranks that can start again, on the rung that is in the run's folder
GRACE = 2.0  # seconds in which ranks that wait for the same one fail, too
FAILURES = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m diffsynth` on ranks of this machine, again if memory ran out; return its exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meet: dict[str, Any] = {
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
    }
    config = LaunchConfig(1, 1, ranks, max_restarts=0, **meet)
    # A rank has reported what failed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    try:
        elastic_launch(config, sys.executable)("-m", "diffsynth", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == AGAIN:
            return launch([*arguments, "--resume"], ranks)
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        told = f"rank {rank} was ended by {name}; the same command continues after the last saved step"
        raise RuntimeError(told) from error
    return 0


@contextmanager
def as_rank(seconds: float) -> Iterator[tuple[int, torch.device]]:
    """Join the other ranks; yield this one's number and device. Only the first that fails raises its error.

    Args:
        seconds: that a rank waits for the others before it gives up and tells which one does not answer.

    Raises:
        RuntimeError: a rank does not answer.
        SystemExit: another rank has told its error, or memory ran out and all can start again (AGAIN).
    """
    device = choose_device("auto")
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    store, rank, ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # torchrun's restarts
    limit = timedelta(seconds=seconds)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    if rank:
        logging.getLogger("diffsynth").setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, device
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except FAILURES as error:
        store.set(f"ended {rank}", str(error))
        if store.add("ended", 1) > 1:
            with suppress(*FAILURES):
                store.wait(["told"], timedelta(seconds=5 * GRACE))
                raise SystemExit(int(store.get("told"))) from error
            raise SystemExit(1) from error
        if getattr(error, "rung", None):
            logger.error("%s", error)
            store.set("told", str(AGAIN))
            raise SystemExit(AGAIN) from error
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
        if lost:  # if a rank has died, the one who started it ends this one meanwhile
            time.sleep(GRACE)
        silent = [other for other in range(ranks) if not store.check([f"ended {other}"])] if lost else []
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store.set("told", "1")
        if silent:
            told = f"rank(s) {silent} did not answer for {seconds:g} s; finished steps are saved"
            raise RuntimeError(told) from error
        raise
    dist.destroy_process_group()


@contextmanager
def spread_run(
    pipe: WanVideoPipeline, call: Mapping[str, Any], saving: Mapping[str, Any], sharded: bool = False
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Spread the models of a pipeline over all ranks; yield this rank's arguments of `run` and of saving it.

    All start with rank 0's seed and the steps that it has saved, which the others copy, and on the rung that
    one saves that runs out of memory. With `sharded`, the DiTs' weights are split, for good, and other models
    are on the device in their own stages only.
    """
    if sharded:
        pipe.residency.stop_streaming()
        pipe.residency.offload = True
        pipe.residency.staying |= set(pipe.models.experts)
    folder, mesh = Path(saving["checkpoint_dir"]), Mesh.over_all(pipe.device.type)
    lacked = saving["resume"] and (folder / RUNG).exists()
    rung = SequenceParallel.agreed(json.loads((folder / RUNG).read_text()) if lacked else None)
    with ExitStack() as stack:
        stack.enter_context(replaced((pipe.vae, "blend", spread_blend)))
        for dit in (getattr(pipe.models, name) for name in pipe.models.experts):
            if sharded:
                shard(dit, pipe.device.type)
            stack.enter_context(spread(dit, mesh, rung))
        seed = call.get("seed")
        if seed in (None, NEW_SEED):
            seed = (saved_seed(folder) if saving["resume"] else None) or secrets.randbelow(2**32)
        call = {**call, "seed": SequenceParallel.agreed(seed)}
        if dist.get_rank():
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in folder.glob("*.safetensors"):
                copyfile(file, copy / file.name)
            saving = {**saving, "checkpoint_dir": copy, "checkpoint_every": 10**9}
            call["output_type"] = "latent" if call.get("output_type") == "latent" else "pt"
        dist.barrier()  # before rank 0 saves anything
        try:
            yield dict(call), dict(saving)
        except MemoryRanOutError as error:
            if error.rung:
                with written_whole(folder / RUNG) as file:
                    file.write_text(json.dumps(error.rung))
            raise
