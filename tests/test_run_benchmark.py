"""What whole runs cost by count, at the sizes that docs/performance.md reports, on tensors without data."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def costs():
    """Full forwards of each run: width 256, 30 blocks, 480x832, three latent frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        contenders, run = (importlib.import_module(name) for name in ("contenders", "run"))
        work = contenders.Work("small", (3, 60, 104), torch.device("meta"))
        runs = contenders.contenders(work, "none", peers=False)
        calls = work.calls()
        kinds = {}
        for kind in {kind for one in runs for kind in one.work}:
            kinds[kind] = run.Kind(flops=run.count_flops(calls[kind]))
        return {one.name: run.run_row(one, kinds, matmul=0.0)["FFE"] for one in runs}


@pytest.mark.slow
def test_presets_cost_the_shares_of_the_released_procedure_that_are_documented(costs):
    assert costs["No_transfer"] == 100
    assert costs["released"] == pytest.approx(197, abs=2)
    shares = {name: costs[name] / costs["released"] for name in ("exact", "balanced", "fast")}
    assert shares["exact"] <= 0.83
    assert shares["balanced"] <= 0.40
    assert shares["fast"] <= 0.15


@pytest.mark.slow
def test_flow_motion_costs_seven_forwards_a_guided_step(costs):
    assert costs["FlowMotion"] - costs["No_transfer"] == pytest.approx(70, abs=0.5)
