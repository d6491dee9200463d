"""Store the numbers of the self-test, after a change that is meant to change what the model computes.

python benchmarks/self_test_numbers.py
"""

import torch
from safetensors.torch import save_file

from diffsynth.evaluation.self_test import REFERENCE, STAGES, load_models, run_stage


def main() -> None:
    models = load_models(torch.device("cpu"), "float32")
    results: dict[str, torch.Tensor] = {}
    for stage, (run, _errors) in STAGES.items():
        # The other kernels are compared with sdpa, two stages with what they vary.
        kernel = stage.startswith("attention ") and stage != "attention sdpa"
        if kernel or stage in ("streaming", "compile"):
            continue
        results |= {f"{stage}/{name}": value.float() for name, value in run_stage(models, run).items()}
    save_file(results, REFERENCE)


if __name__ == "__main__":
    main()
