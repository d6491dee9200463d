"""Golden tensors for the tests; one thread per worker, so that parallel workers do not fight over cores."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN_DIR = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    torch.set_num_threads(1)


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
