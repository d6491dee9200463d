"""Golden tensors and a tiny checkpoint for the tests; what a test process needs of its surroundings."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN_DIR = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    """Under pytest-xdist, compute with one thread a worker, so that workers do not compete for cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _no_settings_of_this_machine():
    """Forget what a user has set for work: a proxy for local addresses, an attention kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIFFSYNTH_ATTENTION", raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(autouse=True)
def _auto_is_the_cpu(request, monkeypatch):
    """On a machine with a card, run all tests but those of the card as on one without."""
    if "gpu" not in request.keywords and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that they start


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_not_ignored():
    """Restore Python's SIGINT handler: a shell without job control starts `pytest &` with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def golden():
    """Return a function: name -> (tensors, description) of tests/golden/<name>.safetensors and .json."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        return load_file(GOLDEN_DIR / f"{name}.safetensors"), json.loads(
            (GOLDEN_DIR / f"{name}.json").read_text()
        )

    return load


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN_DIR


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none here"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A tiny random checkpoint in the official layout. Read only: copy it before changing files."""
    from diffsynth.testing import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
