"""The path that a CUDA device takes, held on a CPU: memory, waits, devices and kernels at published sizes.

Tensors have no data, so that nothing here says that numbers are right; tests/test_gpu.py does on a card. A
small library in C++ stands for the device (fake_cuda/guard.cpp): without a compiler these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent / "fake_cuda"
TORCH = Path(torch.__file__).parent
REMAINS = 20 * 2**20  # bytes of tables and results that may stay on the device after a stage


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """The compiled library; one for all workers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, g++ or clang++, and there is none")
    if torch.cuda.is_available() or sys.platform != "linux":
        pytest.skip("stands for a device where PyTorch has none, on Linux")
    library = tmp_path_factory.getbasetemp().parent / f"guard-{torch.__version__}.so"
    if not library.exists():
        written = tmp_path_factory.mktemp("guard") / "guard.so"
        includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(FOLDER / "guard.cpp"), *includes]
        command += ["-o", str(written), f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            pytest.skip(f"the compiler cannot build against PyTorch's headers: {built.stderr[-300:]}")
        os.replace(written, library)
    return library


@pytest.fixture(scope="module")
def seen(guard):
    """A function: cases -> what was counted in them, by name."""

    def run(*cases):
        environment = {
            **os.environ,
            "LD_PRELOAD": str(guard),
            "LD_LIBRARY_PATH": str(TORCH / "lib"),
            "PYTHONPATH": os.pathsep.join(map(str, (FOLDER, *FOLDER.parents[:2]))),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(FOLDER / "cases.py"), *cases]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def check(counted, device="cuda:0"):
    """What holds everywhere: all on one device, in fused attention, nothing in 64-bit floating point."""
    for case, found in counted.items():
        assert found["devices"] == [device], case
        assert found["doubles"] == {}, case
        assert found["math_attention"] == 0, case


def plan_over_peak(counted):
    return {case: found["plan"] / found["peak"] for case, found in counted.items() if found["plan"]}


@pytest.mark.parametrize(("cases", "count"), [(("guided 1.3b",), 5), (("guided 14b", "both"), 2)])
def test_the_plan_knows_the_peak_of_a_gradient(seen, cases, count):
    counted = seen(*cases)
    check(counted)
    ratios = plan_over_peak(counted)
    assert len(ratios) == count
    assert all(0.99 < ratio < 1.03 for ratio in ratios.values()), ratios


def test_steps_do_not_wait_for_the_device_and_stay_on_the_one_asked_for(seen):
    counted = seen("denoising")
    check(counted, "cuda:1")
    waits = {case[:10]: sum(found["waits"].values()) for case, found in counted.items()}
    # The first builds tables. Later ones: four gradients, each found finite, and the clock of guidance.
    assert waits.pop("guidance 1") <= 16
    assert waits.pop("guidance 2") <= 5
    assert set(waits.values()) == {0}
    ratios = plan_over_peak(counted)
    assert all(0.97 < ratio < 1.03 for ratio in ratios.values()), ratios


def test_plain_steps_of_both_samplers_do_not_wait(seen):
    counted = seen("plain 14b", "unipc")
    check(counted)
    for case, found in counted.items():
        # The first step moves the table of rotary positions; in later ones the rule of this cache looks at a
        # number for each prompt.
        allowed = 1 if case.startswith("sampling 1 ") else 2 if "first_block" in case else 0
        assert sum(found["waits"].values()) <= allowed, case
        assert 0.97 < found["plan"] / found["peak"] < (1.2 if "first_block" in case else 1.03), case


def test_the_vae_waits_for_frames_alone(seen):
    counted = seen("vae", "text")
    check({case: found for case, found in counted.items() if case != "encode text"}, "cuda:1")
    for case, found in counted.items():
        frames = [place for place in found["waits"] if "copy to the device models/wan_video_vae.py" in place]
        frames += [place for place in found["waits"] if "copy to the CPU data/tensors.py" in place]
        others = {place: count for place, count in found["waits"].items() if place not in frames}
        assert sum(others.values()) <= 1, (case, others)  # all chunks are found finite, at the end
        assert 0.97 < found["plan"] / found["peak"] < 1.07, case


def test_streamed_blocks_take_what_is_planned_and_go_home(seen):
    (found,) = seen("streamed").values()
    check({"streamed": found})
    assert 0.99 < found["plan"] / found["peak"] < 1.03
    assert found["left"] < REMAINS
    assert found["weights_on"] == ["cpu"]


def test_two_experts_of_the_official_size_need_the_memory_of_one(seen):
    alone, both = (found := seen("relay")).values()
    check(found)
    assert (alone["used"], both["used"]) == (["dit"], ["dit", "low_noise_dit"])
    assert both["weights"] > 28e9  # of each expert, in bfloat16
    assert both["weights"] < both["peak"] <= 1.05 * alone["peak"]
    assert both["left"] < REMAINS


def test_fused_functions_move_a_third_of_the_bytes(seen):
    as_written, fused = seen("passes").values()
    assert as_written["moved"] < 0.42e12
    assert fused["moved"] < 0.15e12
    assert fused["flops"] == as_written["flops"]
