"""Muon on matrices and kernels, AdamW on everything else, a moving average of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration that brings singular values near to 1 (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrix with all singular values about 1: [..., m, n] -> the same shape."""
    a, b, c = QUINTIC
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    # Half precision is enough: the iteration corrects itself.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if matrix.shape[-2] > matrix.shape[-1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; kernels count as matrices [out, in * positions].

    An update has the root mean square 0.2 * lr, so that rates compare with AdamW's (Liu et al., 2025).
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # takes no closure
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            for shape in sorted({tuple(p.shape) for p in used}):
                self._step_alike([p for p in used if tuple(p.shape) == shape], group)

    def _step_alike(self, params: list[nn.Parameter], group: dict) -> None:
        """One step of parameters of one shape, as one batch of matrices."""
        updates = []
        for parameter in params:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None  # those without are left out
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))
        steps = orthogonalised(torch.stack(updates))
        size = 0.2 * max(steps.shape[1:]) ** 0.5 * group["lr"]
        for parameter, step in zip(params, steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(step.view_as(parameter), alpha=size)


def make_optimisers(
    model: nn.Module,
    is_matrix: Callable[[str, nn.Parameter], bool],
    muon_lr: float,
    adam_lr: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Muon for the parameters that `is_matrix(name, parameter)` names, AdamW for the others."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if is_matrix(name, p)]
    others = [p for name, p in named if not is_matrix(name, p)]
    optimisers = [
        Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def set_rate(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def update_average(average: dict[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """Move each averaged weight towards the current one by 1 - decay."""
    for name, value in weights.items():
        average[name].lerp_(value, 1 - decay)
